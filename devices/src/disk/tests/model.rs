//! Property tests: whatever is asked of an engine, disk and memory end up as a model says.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use vm_memory::GuestAddress;

use super::rig::{DEPTH, MEMORY_SIZE, Request, Rig, directories, every_way};
use crate::disk::{DetectZeroes, Disk, GuestRange, Operation, SECTOR};

pub(super) const SECTORS: u64 = 256;
/// Guest memory of one transfer; scattered, so more than its data.
const SLOT: usize = MEMORY_SIZE / DEPTH as usize;

/// One transfer of a batch. Transfers of a batch have no order, so each has sectors and memory of its own; but they may
/// touch the same unit of direct I/O.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// Sectors between this and the one before.
    gap: u64,
    sectors: u64,
    kind: u8,
    fill: u8,
    /// Where in its slot of guest memory each piece starts and how long it may be.
    pieces: Vec<(u8, u16)>,
}

fn batch() -> impl Strategy<Value = Vec<Step>> {
    let pieces = prop::collection::vec((any::<u8>(), 1..2048_u16), 1..6);
    let step = (0..6_u64, 1..24_u64, 0..12_u8, any::<u8>(), pieces)
        .prop_map(|(gap, sectors, kind, fill, pieces)| Step { gap, sectors, kind, fill, pieces });
    prop::collection::vec(step, 1..20)
}

/// What `step` asks for.
fn operation(step: &Step) -> Operation {
    match step.kind {
        0..=3 => Operation::Read,
        4..=6 => Operation::Write { durable: false },
        7 => Operation::Write { durable: true },
        8 => Operation::Discard,
        9 => Operation::WriteZeroes { unmap: true, durable: false },
        10 => Operation::WriteZeroes { unmap: false, durable: true },
        _ => Operation::Flush,
    }
}

/// Scatters `length` bytes over a slot of guest memory: odd addresses, odd lengths, no overlap.
fn scatter(slot: usize, length: usize, pieces: &[(u8, u16)]) -> Vec<GuestRange> {
    let mut ranges = Vec::new();
    let (mut at, mut left) = (slot * SLOT, length);
    for (gap, size) in pieces {
        let size = usize::from(*size).min(left);
        at += usize::from(*gap);
        ranges.push(GuestRange { address: GuestAddress(at as u64), length: size as u32 });
        at += size;
        left -= size;
    }
    ranges.push(GuestRange {
        address: GuestAddress(at.next_multiple_of(512) as u64),
        length: left as u32,
    });
    ranges
}

fn gather(rig: &Rig, ranges: &[GuestRange]) -> Vec<u8> {
    ranges.iter().flat_map(|range| rig.get(range.address.0, range.length as usize)).collect()
}

/// What a discarded sector reads as.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Discarded {
    /// Zeroes.
    Zero,
    /// Zeroes or what was there before.
    ZeroOrOld,
}

/// Runs a batch and checks it against the model, which it updates.
fn check(rig: &mut Rig, model: &mut [u8], batch: &[Step], discarded: Discarded) {
    let mut at = 0;
    let mut requests = Vec::new();
    let mut expected: Vec<(Vec<GuestRange>, Vec<u8>)> = Vec::new();
    let mut unsure = Vec::new();
    let before = model.to_vec();
    for (slot, step) in batch.iter().enumerate() {
        let start = (at + step.gap).min(SECTORS);
        let end = (start + step.sectors).min(SECTORS);
        at = end;
        let bytes: Range<usize> = (start * SECTOR) as usize..(end * SECTOR) as usize;
        let operation = operation(step);
        let ranges = match operation {
            Operation::Read | Operation::Write { .. } => scatter(slot, bytes.len(), &step.pieces),
            _ => Vec::new(),
        };
        match operation {
            Operation::Write { .. } => {
                let seed = usize::from(step.fill);
                // One in eight writes nothing but zeroes.
                let data: Vec<u8> = bytes
                    .clone()
                    .map(|i| if seed < 32 { 0 } else { (i * 7 + seed) as u8 })
                    .collect();
                let mut from = 0;
                for range in &ranges {
                    rig.put(range.address.0, &data[from..from + range.length as usize]);
                    from += range.length as usize;
                }
                model[bytes.clone()].copy_from_slice(&data);
            }
            Operation::Discard if discarded == Discarded::ZeroOrOld => unsure.push(bytes.clone()),
            Operation::Discard | Operation::WriteZeroes { .. } => model[bytes.clone()].fill(0),
            Operation::Read => {
                for range in &ranges {
                    rig.put(range.address.0, &vec![0xa5; range.length as usize]);
                }
                expected.push((ranges.clone(), before[bytes.clone()].to_vec()));
            }
            _ => {}
        }
        requests.push(Request {
            operation,
            offset: start * SECTOR,
            length: bytes.len() as u64,
            ranges,
        });
    }
    for (result, request) in rig.run(&requests).into_iter().zip(&requests) {
        assert_eq!(result, Ok(()), "{request:?}");
    }
    for (ranges, data) in expected {
        assert!(gather(rig, &ranges) == data, "read something else from {ranges:?}");
    }
    for bytes in unsure.into_iter().filter(|bytes| !bytes.is_empty()) {
        rig.ok(Request::plain(Operation::Read, bytes.start as u64, 0, bytes.len() as u32));
        for (start, sector) in bytes.step_by(512).zip(rig.get(0, MEMORY_SIZE / 2).chunks(512)) {
            let old = &mut model[start..start + 512];
            assert!(
                sector == old || sector == [0; 512],
                "a discarded sector reads as something new"
            );
            old.copy_from_slice(sector);
        }
    }
}

/// Runs random batches against disks from `open`, which start with the content `image` gives; `verify` sees the content
/// that each should end with.
pub(super) fn run(
    cases: u32,
    discarded: Discarded,
    mut image: impl FnMut() -> Vec<u8>,
    open: impl Fn() -> Arc<dyn Disk>,
    mut verify: impl FnMut(&[u8]),
) {
    let mut config = ProptestConfig::with_cases(cases);
    (config.rng_seed, config.failure_persistence) = (RngSeed::Fixed(20_11), None);
    let batches = prop::collection::vec(batch(), 1..12);
    let (image, verify) = (RefCell::new(&mut image), RefCell::new(&mut verify));
    let result = TestRunner::new(config).run(&batches, |batches| {
        let mut model = image.borrow_mut()();
        let mut rig = Rig::new(open());
        for batch in &batches {
            check(&mut rig, &mut model, batch, discarded);
        }
        drop(rig);
        verify.borrow_mut()(&model);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn every_engine_is_a_disk() {
    for directory in directories() {
        let path = directory.path().join("image");
        for &detect_zeroes in DetectZeroes::ALL {
            std::fs::write(&path, vec![0x11; (SECTORS * SECTOR) as usize]).unwrap();
            for (name, disk) in every_way(&path, detect_zeroes) {
                eprintln!("{name}");
                let content = || std::fs::read(&path).unwrap();
                run(
                    3,
                    Discarded::Zero,
                    content,
                    || disk.clone(),
                    |model| assert!(content() == model),
                );
            }
        }
    }
}

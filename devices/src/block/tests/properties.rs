//! Random drivers: honest ones get what a model disk gives, others get nothing that they should not.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::driver::{BUFFERS, Buffer, Driver, INDIRECT, NEXT, describe};
use super::rig::Rig;
use crate::disk::DiskError;
use crate::virtio::spec::{self, blk};

/// Bytes of guest memory: little, since it is compared after each step.
const MEMORY: u64 = BUFFERS + (1 << 18);
const SECTORS: u64 = 64;
/// Requests of a batch keep to windows of their own: in flight together, they have no order.
const WINDOWS: u64 = 8;
const WINDOW: u64 = SECTORS / WINDOWS;

#[derive(Clone, Debug)]
enum Ask {
    Read { sector: u64, sectors: u64 },
    Write { sector: u64, sectors: u64, fill: u8 },
    Zero { segments: Vec<(u64, u64)> },
    Flush,
    GetId { room: u32 },
    Unknown { request_type: u32 },
}

/// How a request is laid out: where its bytes are cut, and how many of the pieces stay outside an indirect table.
#[derive(Clone, Debug)]
struct Framing {
    cuts: Vec<prop::sample::Index>,
    direct: Option<usize>,
}

fn window() -> impl Strategy<Value = (u64, u64)> {
    (0..WINDOW).prop_flat_map(|sector| (Just(sector), 0..=WINDOW - sector))
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        4 => window().prop_map(|(sector, sectors)| Ask::Read { sector, sectors }),
        4 => (window(), any::<u8>()).prop_map(|((sector, sectors), fill)| Ask::Write { sector, sectors, fill }),
        1 => vec(window(), 1..4).prop_map(|segments| Ask::Zero { segments }),
        1 => Just(Ask::Flush),
        1 => (0..40_u32).prop_map(|room| Ask::GetId { room }),
        1 => (30..u32::MAX).prop_map(|request_type| Ask::Unknown { request_type }),
    ]
}

fn framing() -> impl Strategy<Value = Framing> {
    (vec(any::<prop::sample::Index>(), 0..6), prop::option::of(0..3_usize))
        .prop_map(|(cuts, direct)| Framing { cuts, direct })
}

type Batch = Vec<(Ask, Framing)>;

fn batches() -> impl Strategy<Value = Vec<(Batch, bool)>> {
    vec((vec((ask(), framing()), 1..=WINDOWS as usize), any::<bool>()), 1..6)
}

/// A request that was sent, and what should come of it.
struct Expected {
    head: u16,
    writable: Vec<Range<u64>>,
    /// The writable bytes as they should be at the end, status included.
    answer: Vec<u8>,
    length: u32,
}

/// Cuts `bytes` into buffers with gaps between them; an empty buffer is as good as any.
fn cut(
    driver: &mut Driver,
    bytes: &[u8],
    cuts: &[prop::sample::Index],
    writable: bool,
) -> Vec<Buffer> {
    let mut places: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places
        .windows(2)
        .map(|pair| {
            let piece = &bytes[pair[0]..pair[1]];
            let address = driver.allocate(piece.len() as u64 + 7) + 3;
            driver.write(address, piece);
            Buffer { address, length: piece.len() as u32, writable }
        })
        .collect()
}

/// Sends `ask` within window `window` and plays it on the model.
fn send(rig: &mut Rig, model: &mut [u8], window: u64, ask: &Ask, framing: &Framing) -> Expected {
    let base = window * WINDOW;
    let bytes = |sector: u64, sectors: u64| {
        let start = ((base + sector) * 512) as usize;
        start..start + (sectors * 512) as usize
    };
    let header = |request_type: u32, sector: u64| {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&request_type.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header.to_vec()
    };
    let (readable, answer) = match ask {
        Ask::Read { sector, sectors } => {
            let data = model[bytes(*sector, *sectors)].to_vec();
            (header(blk::T_IN, base + sector), [data, vec![blk::S_OK]].concat())
        }
        Ask::Write { sector, sectors, fill } => {
            let range = bytes(*sector, *sectors);
            let content: Vec<u8> = range
                .clone()
                .map(|byte| fill.wrapping_add(byte as u8 ^ (byte >> 8) as u8))
                .collect();
            model[range].copy_from_slice(&content);
            ([header(blk::T_OUT, base + sector), content].concat(), vec![blk::S_OK])
        }
        Ask::Zero { segments } => {
            let mut message = header(blk::T_WRITE_ZEROES, 0);
            for (sector, sectors) in segments {
                model[bytes(*sector, *sectors)].fill(0);
                let segment =
                    blk::Segment { sector: base + sector, sectors: *sectors as u32, flags: 0 };
                message.extend(segment.to_le_bytes());
            }
            (message, vec![blk::S_OK])
        }
        Ask::Flush => (header(blk::T_FLUSH, 0), vec![blk::S_OK]),
        Ask::GetId { room } => {
            let mut id = b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
            id.resize(*room as usize, super::driver::UNTOUCHED);
            (header(blk::T_GET_ID, 0), [id, vec![blk::S_OK]].concat())
        }
        Ask::Unknown { request_type } => (header(*request_type, 0), vec![blk::S_UNSUPP]),
    };
    let length = match ask {
        Ask::GetId { room } => room.min(&20) + 1,
        _ => answer.len() as u32,
    };
    let half = framing.cuts.len() / 2;
    let mut chain = cut(&mut rig.driver, &readable, &framing.cuts[..half], false);
    let blank = vec![super::driver::UNTOUCHED; answer.len()];
    let answers = cut(&mut rig.driver, &blank, &framing.cuts[half..], true);
    let writable = answers
        .iter()
        .map(|buffer| buffer.address..buffer.address + u64::from(buffer.length))
        .collect();
    chain.extend(answers);
    let head = match framing.direct {
        None => rig.driver.chain(0, &chain),
        Some(direct) => rig.driver.mixed_chain(0, &chain, direct.min(chain.len() - 1)),
    };
    rig.driver.publish(0, head);
    Expected { head, writable, answer, length }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Any legal framing of any request gives what a model disk gives, touches nothing else, and is answered once.
    #[test]
    fn honest_drivers_get_what_a_model_disk_gives(batches in batches(), event_index in any::<bool>()) {
        let mut rig = Rig::with(|setup| {
            setup.options.serial = Some("serial".to_owned());
            setup.ring_size = 256;
            setup.memory = MEMORY;
            setup.accepted = if event_index { u64::MAX } else { !spec::F_EVENT_IDX };
        });
        let mut model = rig.disk.data();
        let mut requests = 0;
        for (batch, slow) in batches {
            if slow { rig.disk.hold() } else { rig.disk.finish_at_once() }
            let expected: Vec<_> = batch
                .iter()
                .zip(0..)
                .map(|((ask, framing), window)| send(&mut rig, &mut model, window, ask, framing))
                .collect();
            let mut memory = rig.driver.read(BUFFERS..MEMORY);
            rig.serve();
            while rig.disk.held() > 0 {
                rig.release(1);
            }
            let mut used = rig.driver.used(0);
            used.sort_unstable();
            let mut answers: Vec<_> = expected.iter().map(|expected| (expected.head, expected.length)).collect();
            answers.sort_unstable();
            prop_assert_eq!(used, answers);
            for Expected { writable, answer, .. } in expected {
                let mut answer = answer.into_iter();
                for range in writable {
                    let range = (range.start - BUFFERS) as usize..(range.end - BUFFERS) as usize;
                    memory[range].iter_mut().zip(&mut answer).for_each(|(byte, answer)| *byte = answer);
                }
            }
            prop_assert!(rig.driver.read(BUFFERS..MEMORY) == memory, "guest memory differs");
            requests += batch.len();
        }
        prop_assert!(rig.disk.data() == model, "the disk differs");
        prop_assert_eq!(rig.driver.interrupt.needs_reset(), 0);
        let stats = rig.stats();
        let kinds = [
            crate::block::Kind::Read,
            crate::block::Kind::Write,
            crate::block::Kind::WriteZeroes,
            crate::block::Kind::Flush,
            crate::block::Kind::Other,
        ];
        let counted: u64 = kinds.iter().map(|kind| stats.kind(*kind)).map(|kind| kind.operations + kind.invalid).sum();
        prop_assert_eq!(counted, requests as u64);
    }

    /// Whatever a driver writes into its rings: the device returns, writes only where a descriptor lets it write, and
    /// works again after a reset.
    #[test]
    fn hostile_drivers_get_nothing(
        table in vec(descriptor(), 16),
        inner in vec(descriptor(), 16),
        headers in vec(any_header(), 4),
        heads in vec(prop_oneof![9 => 0..16_u16, 1 => any::<u16>()], 1..24),
        failure in prop::option::of(0..4_u64),
        slow in any::<bool>(),
    ) {
        let mut rig = Rig::with(|setup| (setup.ring_size, setup.memory) = (16, MEMORY));
        if let Some(every) = failure {
            let mut count = 0;
            rig.disk.judge(move |_| {
                count += 1;
                if count % (every + 2) == 0 { Err(DiskError::Host(libc::EIO)) } else { Ok(()) }
            });
        }
        if slow {
            rig.disk.hold();
        }
        for (index, header) in headers.iter().enumerate() {
            rig.driver.write(ARENA.start + index as u64 * 64, header);
        }
        for (index, descriptor) in inner.iter().enumerate() {
            rig.driver.write(INNER + 16 * index as u64, descriptor.as_slice());
        }
        for (index, descriptor) in table.iter().enumerate() {
            rig.driver.set_descriptor(0, index as u16, *descriptor);
        }
        let before = rig.driver.read(BUFFERS..MEMORY);
        for head in &heads {
            rig.driver.publish(0, *head);
            if head % 3 == 0 {
                rig.serve();
            }
        }
        rig.serve();
        while rig.disk.held() > 0 {
            rig.release(1);
        }
        rig.serve();
        let used = rig.driver.used(0);
        prop_assert!(used.len() <= heads.len());
        prop_assert!(used.iter().all(|(head, _)| heads.contains(head)));
        let mut writable = vec![false; (MEMORY - BUFFERS) as usize];
        for descriptor in table.iter().chain(&inner).filter(|descriptor| descriptor.is_write_only()) {
            let start = descriptor.addr().0.clamp(BUFFERS, MEMORY);
            let end = descriptor.addr().0.saturating_add(descriptor.len().into()).clamp(start, MEMORY);
            writable[(start - BUFFERS) as usize..(end - BUFFERS) as usize].fill(true);
        }
        let after = rig.driver.read(BUFFERS..MEMORY);
        let stray = (0..before.len()).find(|byte| before[*byte] != after[*byte] && !writable[*byte]);
        prop_assert_eq!(stray, None, "a byte outside every writable descriptor changed");
        rig.disk.heal();
        rig.disk.finish_at_once();
        rig.reset();
        rig.assert_alive();
    }
}

/// Where hostile descriptors point, mostly.
const ARENA: Range<u64> = 0x5_0000..0x6_0000;
/// An indirect table.
const INNER: u64 = 0x7_0000;

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        6 => (0..4_u64).prop_map(|index| ARENA.start + index * 64),
        6 => ARENA,
        1 => MEMORY - 4..MEMORY + 4,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => Just(16_u32), 4 => Just(512), 2 => Just(1024), 2 => Just(1), 1 => Just(0), 2 => 0..3000_u32, 1 => any::<u32>()
    ];
    let plain = (
        address,
        length,
        any::<bool>(),
        any::<bool>(),
        prop_oneof![9 => 0..16_u16, 1 => any::<u16>()],
    )
        .prop_map(|(address, length, writable, more, next)| {
            let buffer = Buffer { address, length, writable };
            describe(&buffer, if more { NEXT } else { 0 }, next)
        });
    // Tables that work are never writable: what the device writes must not move what it may write.
    let indirect = (prop_oneof![8 => Just(INNER), 1 => any::<u64>()], 0..18_u32, any::<bool>())
        .prop_map(|(table, entries, more)| {
            Descriptor::new(table, entries * 16, INDIRECT | if more { NEXT } else { 0 }, 1)
        });
    // Every bit of the flags, now and then.
    let wild = (ARENA, any::<u16>(), 0..16_u16)
        .prop_map(|(address, flags, next)| Descriptor::new(address, 512, flags, next));
    prop_oneof![12 => plain, 3 => indirect, 1 => wild]
}

fn any_header() -> impl Strategy<Value = [u8; 16]> {
    let request_type = prop_oneof![6 => 0..2_u32, 3 => 0..16_u32, 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0..SECTORS + 2, 1 => any::<u64>()];
    (request_type, sector).prop_map(|(request_type, sector)| {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&request_type.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    })
}

//! Discard, write-zeroes and secure erase (virtio 1.2 §5.2.6, §5.2.6.2).

use super::driver::Buffer;
use super::rig::{Outcome, Rig};
use crate::block::Kind;
use crate::block::request::segments::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::disk::{DiskError, Operation};
use crate::virtio::spec::blk::{self, Segment};

fn list(rig: &mut Rig, segments: &[(u64, u32, u32)]) -> Buffer {
    let bytes: Vec<u8> = segments
        .iter()
        .flat_map(|&(sector, sectors, flags)| Segment { sector, sectors, flags }.to_le_bytes())
        .collect();
    rig.driver.readable(&bytes)
}

fn run(rig: &mut Rig, request_type: u32, segments: &[(u64, u32, u32)]) -> Outcome {
    let data = list(rig, segments);
    rig.request(request_type, 0, Some(data))
}

fn stretches(rig: &Rig) -> Vec<(Operation, u64, u64)> {
    rig.disk
        .log()
        .iter()
        .map(|seen| (seen.operation, seen.offset / 512, seen.length / 512))
        .collect()
}

#[test]
fn each_segment_reaches_the_disk_in_order() {
    let mut rig = Rig::new();
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(8, 8, 0), (32, 4, 0), (0, 1, 0)]), Outcome::ok(0));
    let discard = Operation::Discard;
    assert_eq!(stretches(&rig), [(discard, 8, 8), (discard, 32, 4), (discard, 0, 1)]);
    let stats = *rig.stats().kind(Kind::Discard);
    assert_eq!((stats.operations, stats.bytes), (1, 13 * 512));

    let mut rig = Rig::new();
    assert_eq!(
        run(&mut rig, blk::T_WRITE_ZEROES, &[(8, 8, blk::SEGMENT_UNMAP), (2, 1, 0)]),
        Outcome::ok(0)
    );
    let zeroes = |unmap| Operation::WriteZeroes { unmap, durable: false };
    assert_eq!(stretches(&rig), [(zeroes(true), 8, 8), (zeroes(false), 2, 1)]);
    assert_eq!(rig.disk.data()[8 * 512..16 * 512], [0; 8 * 512]);

    let mut rig = Rig::new();
    assert_eq!(run(&mut rig, blk::T_SECURE_ERASE, &[(8, 8, 0)]), Outcome::ok(0));
    assert_eq!(stretches(&rig), [(Operation::SecureErase, 8, 8)]);
}

#[test]
fn write_zeroes_is_durable_like_a_write() {
    let mut rig = Rig::with(|setup| setup.options.write_cache = false);
    assert_eq!(run(&mut rig, blk::T_WRITE_ZEROES, &[(0, 8, 0)]), Outcome::ok(0));
    assert_eq!(rig.disk.operations(), [Operation::WriteZeroes { unmap: false, durable: true }]);
}

#[test]
fn a_segment_list_may_be_split_anywhere() {
    let mut bytes = Segment { sector: 8, sectors: 8, flags: 0 }.to_le_bytes().to_vec();
    bytes.extend(Segment { sector: 24, sectors: 1, flags: 0 }.to_le_bytes());
    for cut in 1..bytes.len() {
        let mut rig = Rig::new();
        let header = rig.driver.header(blk::T_DISCARD, 0);
        let parts = [rig.driver.readable(&bytes[..cut]), rig.driver.readable(&bytes[cut..])];
        let status = rig.driver.writable(1);
        assert_eq!(rig.run(&[header, parts[0], parts[1], status]), Outcome::ok(0), "cut at {cut}");
        assert_eq!(stretches(&rig), [(Operation::Discard, 8, 8), (Operation::Discard, 24, 1)]);
    }
}

#[test]
fn unknown_flags_are_unsupported_and_nothing_is_done() {
    let mut rig = Rig::new();
    for (request_type, flags) in [
        (blk::T_DISCARD, blk::SEGMENT_UNMAP),
        (blk::T_SECURE_ERASE, blk::SEGMENT_UNMAP),
        (blk::T_DISCARD, 2),
        (blk::T_WRITE_ZEROES, 2),
        (blk::T_WRITE_ZEROES, 1 << 31 | blk::SEGMENT_UNMAP),
    ] {
        assert_eq!(run(&mut rig, request_type, &[(0, 1, flags)]), Outcome::UNSUPP);
        // Anywhere in the list, even after a segment that is wrong in another way.
        assert_eq!(run(&mut rig, request_type, &[(0, 8, 0), (0, 1, flags)]), Outcome::UNSUPP);
        assert_eq!(run(&mut rig, request_type, &[(1 << 40, 8, 0), (0, 1, flags)]), Outcome::UNSUPP);
    }
    assert_eq!(rig.disk.operations(), []);
}

#[test]
fn one_bad_segment_fails_the_request_before_anything_is_done() {
    let mut rig = Rig::with(|setup| setup.options.logical_block_size = Some(4096));
    for bad in [
        (64, 8),
        (56, 16),
        (1, 8),
        (0, 4),
        (u64::MAX, 8),
        (u64::MAX / 512, 8),
        (0, MAX_SEGMENT_SECTORS + 8),
    ] {
        for request_type in [blk::T_DISCARD, blk::T_WRITE_ZEROES, blk::T_SECURE_ERASE] {
            assert_eq!(
                run(&mut rig, request_type, &[(0, 8, 0), (bad.0, bad.1, 0)]),
                Outcome::IOERR,
                "{bad:?}"
            );
        }
    }
    assert_eq!(rig.disk.operations(), []);
    assert_eq!(rig.stats().kind(Kind::WriteZeroes).invalid, 7);
}

#[test]
fn a_segment_has_at_most_the_sectors_that_were_announced() {
    let mut rig = Rig::new();
    rig.disk.set_capacity(1 << 40);
    for request_type in [blk::T_DISCARD, blk::T_WRITE_ZEROES, blk::T_SECURE_ERASE] {
        assert_eq!(run(&mut rig, request_type, &[(0, MAX_SEGMENT_SECTORS + 1, 0)]), Outcome::IOERR);
        assert_eq!(run(&mut rig, request_type, &[(0, u32::MAX, 0)]), Outcome::IOERR);
    }
    rig.disk.fail(DiskError::Unsupported);
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(0, MAX_SEGMENT_SECTORS, 0)]), Outcome::UNSUPP);
    assert_eq!(rig.disk.log()[0].length, 2 << 30);
}

#[test]
fn the_list_has_a_whole_number_of_segments_within_the_limit() {
    let mut rig = Rig::new();
    for request_type in [blk::T_DISCARD, blk::T_WRITE_ZEROES, blk::T_SECURE_ERASE] {
        assert_eq!(rig.request(request_type, 0, None), Outcome::IOERR);
        for length in [1, 15, 17, 31] {
            let data = rig.driver.readable(&vec![0; length]);
            assert_eq!(rig.request(request_type, 0, Some(data)), Outcome::IOERR);
        }
        let most = vec![(0, 1, 0); MAX_SEGMENTS as usize];
        assert_eq!(run(&mut rig, request_type, &most), Outcome::ok(0));
        let more = vec![(0, 1, 0); MAX_SEGMENTS as usize + 1];
        assert_eq!(run(&mut rig, request_type, &more), Outcome::IOERR);
    }
    assert_eq!(rig.disk.operations().len(), 3 * MAX_SEGMENTS as usize);
}

#[test]
fn empty_segments_are_nothing_to_do() {
    let mut rig = Rig::new();
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(0, 0, 0)]), Outcome::ok(0));
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(0, 0, 0), (8, 8, 0), (64, 0, 0)]), Outcome::ok(0));
    assert_eq!(stretches(&rig), [(Operation::Discard, 8, 8)]);
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(65, 0, 0)]), Outcome::IOERR);
}

#[test]
fn the_first_error_ends_the_request_once() {
    let mut rig = Rig::new();
    rig.disk.judge(
        |seen| if seen.offset == 8 * 512 { Err(DiskError::Host(libc::EIO)) } else { Ok(()) },
    );
    assert_eq!(run(&mut rig, blk::T_DISCARD, &[(0, 8, 0), (8, 8, 0), (16, 8, 0)]), Outcome::IOERR);
    assert_eq!(stretches(&rig), [(Operation::Discard, 0, 8), (Operation::Discard, 8, 8)]);
    let stats = *rig.stats().kind(Kind::Discard);
    assert_eq!((stats.operations, stats.errors), (0, 1));
    rig.assert_alive();
}

#[test]
fn what_the_host_cannot_do_is_unsupported() {
    let mut rig = Rig::new();
    rig.disk.fail(DiskError::Unsupported);
    assert_eq!(run(&mut rig, blk::T_SECURE_ERASE, &[(0, 8, 0)]), Outcome::UNSUPP);
    assert_eq!(rig.events(), []);
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    for (request_type, feature) in [
        (blk::T_DISCARD, blk::F_DISCARD),
        (blk::T_WRITE_ZEROES, blk::F_WRITE_ZEROES),
        (blk::T_SECURE_ERASE, blk::F_SECURE_ERASE),
    ] {
        let mut rig = Rig::with(|setup| setup.accepted &= !feature);
        assert_eq!(run(&mut rig, request_type, &[(0, 8, 0)]), Outcome::UNSUPP);
        assert_eq!(rig.disk.operations(), []);
    }
}

#[test]
fn segments_one_after_the_other_when_the_disk_is_slow() {
    let mut rig = Rig::new();
    rig.disk.hold();
    let data = list(&mut rig, &[(0, 8, 0), (8, 8, 0)]);
    let sent = rig.driver.send(0, blk::T_DISCARD, 0, Some(data));
    rig.serve();
    assert_eq!(rig.driver.used(0), []);
    rig.release(1);
    assert_eq!((rig.driver.used(0), rig.driver.line.count()), (vec![], 0));
    rig.release(1);
    assert_eq!((rig.driver.used(0), rig.driver.line.count()), (vec![(sent.head, 1)], 1));
    assert_eq!(rig.driver.status(&sent), blk::S_OK);
}

#[test]
fn a_reset_does_not_wait_for_segments_that_have_not_begun() {
    for whole_device in [false, true] {
        let mut rig = Rig::new();
        rig.disk.hold();
        let data = list(&mut rig, &[(0, 8, 0), (8, 8, 0), (16, 8, 0)]);
        let sent = rig.driver.send(0, blk::T_DISCARD, 0, Some(data));
        rig.serve();
        rig.disk.finish_at_once();
        if whole_device {
            rig.reset();
        } else {
            assert!(rig.remove_queue(0).is_some());
            assert_eq!(rig.driver.used(0), [(sent.head, 1)]);
        }
        assert_eq!(rig.driver.status(&sent), blk::S_IOERR);
        let discards =
            rig.disk.operations().into_iter().filter(|operation| *operation == Operation::Discard);
        assert_eq!(discards.count(), 1);
    }
}

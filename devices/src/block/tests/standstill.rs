//! A pause and a reset wait for what the engine has, which is bounded, and for nothing else.

use std::ops::Range;

use super::disk::TestDisk;
use super::driver::{BUFFERS, Buffer, Sent, UNTOUCHED};
use super::rig::Rig;
use crate::block::dispatch::{BYTES_PER_TURN, BYTES_WITH_ENGINE};
use crate::block::in_flight::PIECE_BYTES;
use crate::virtio::spec::blk;

/// Bytes of a request: far more than the engine gets at a time, and no multiple of a piece.
const LARGE: u64 = BYTES_WITH_ENGINE + PIECE_BYTES / 2;
/// As many of them are more than a turn.
const COUNT: u64 = BYTES_PER_TURN / LARGE + 1;
/// Where the first request begins on the disk: not where a piece does.
const FIRST: u64 = 3;

fn rig() -> Rig {
    Rig::with(|setup| {
        setup.disk = TestDisk::new(FIRST + COUNT * LARGE / 512);
        setup.memory = BUFFERS + COUNT * LARGE + (1 << 20);
        setup.ring_size = 256;
        setup.options.queue_size = 256;
    })
}

/// Sends request `number`, whose data is cut at odd places.
fn send(rig: &mut Rig, request_type: u32, number: u64) -> Sent {
    let header = rig.driver.header(request_type, FIRST + number * LARGE / 512);
    let status = rig.driver.writable(1);
    let start = rig.driver.allocate(LARGE);
    let (mut at, end) = (start, start + LARGE);
    let mut buffers = vec![header];
    while at < end {
        let length = (end - at).min(1_234_567) as u32;
        buffers.push(Buffer { address: at, length, writable: request_type == blk::T_IN });
        at += u64::from(length);
    }
    buffers.push(status);
    let head = rig.driver.indirect_chain(0, &buffers);
    rig.driver.publish(0, head);
    Sent { head, data: start..end, status: status.address }
}

fn sectors(number: u64) -> Range<usize> {
    let start = (FIRST * 512 + number * LARGE) as usize;
    start..start + LARGE as usize
}

#[test]
fn the_engine_gets_bounded_pieces_however_much_is_asked_for() {
    let mut rig = rig();
    rig.disk.hold();
    for number in 0..COUNT {
        send(&mut rig, blk::T_IN, number);
    }
    rig.serve();
    while rig.disk.held() > 0 {
        let log = rig.disk.log();
        let held: u64 = log[log.len() - rig.disk.held()..].iter().map(|seen| seen.length).sum();
        assert!(held <= BYTES_WITH_ENGINE, "{held} bytes");
        rig.release(1);
    }
    assert_eq!(rig.driver.used(0).len() as u64, COUNT);
    let log = rig.disk.log();
    assert!(log.iter().all(|seen| seen.length <= PIECE_BYTES));
    // Nothing is left out or done twice, and pieces end where clusters do.
    assert_eq!(log.iter().map(|seen| seen.length).sum::<u64>(), COUNT * LARGE);
    let inner = log.iter().filter(|seen| (seen.offset + seen.length).is_multiple_of(PIECE_BYTES));
    assert!(inner.count() as u64 >= COUNT * (LARGE / PIECE_BYTES));
}

#[test]
fn a_large_request_pauses_between_its_pieces_and_goes_on() {
    let mut rig = rig();
    rig.disk.hold();
    let read = send(&mut rig, blk::T_IN, 0);
    let write = send(&mut rig, blk::T_OUT, 1);
    let content = vec![0x42; LARGE as usize];
    rig.driver.write(write.data.start, &content);
    rig.serve();
    (0..3).for_each(|_| rig.release(1));
    rig.worker().pause();
    assert!(!rig.worker().stands_still());
    let submitted = rig.disk.log().len();
    rig.pause();
    // What the engine had is done, and nothing was submitted since; nothing is answered yet.
    assert_eq!((rig.disk.log().len(), rig.driver.used(0)), (submitted, vec![]));
    let mut stopped = rig.stopped();
    stopped.sort_unstable();
    assert_eq!(stopped, [read.head, write.head]);
    rig.disk.release_all();
    rig.worker().resume();
    while rig.worker().wants_turn() {
        rig.worker().continue_requests();
    }
    let mut used = rig.driver.used(0);
    used.sort_unstable();
    assert_eq!(used, [(read.head, LARGE as u32 + 1), (write.head, 1)]);
    assert_eq!(rig.disk.data()[sectors(0)], rig.driver.data(&read));
    assert_eq!(rig.disk.data()[sectors(1)], content);
    assert_eq!(rig.disk.log().iter().map(|seen| seen.length).sum::<u64>(), 2 * LARGE);
}

#[test]
fn a_reset_gives_up_the_pieces_that_have_not_begun() {
    for whole_device in [false, true] {
        let mut rig = rig();
        rig.disk.hold();
        let sent: Vec<_> = (0..COUNT).map(|number| send(&mut rig, blk::T_IN, number)).collect();
        rig.serve();
        let submitted = rig.disk.log().len();
        if whole_device {
            rig.reset();
        } else {
            assert!(rig.remove_queue(0).is_some());
        }
        let reads = rig.disk.log().iter().filter(|seen| seen.length > 0).count();
        assert_eq!(reads, submitted);
        let statuses = sent.iter().map(|sent| rig.driver.status(sent));
        assert!(statuses.into_iter().all(|status| [blk::S_IOERR, UNTOUCHED].contains(&status)));
    }
}

/// An engine that executes a transfer within `submit` keeps the worker from its commands for a turn and no longer.
#[test]
fn a_turn_ends_although_the_engine_never_waits() {
    let mut rig = rig();
    for number in 0..COUNT {
        send(&mut rig, blk::T_IN, number);
    }
    rig.serve();
    let first: u64 = rig.disk.log().iter().map(|seen| seen.length).sum();
    assert!((BYTES_PER_TURN..COUNT * LARGE).contains(&first), "{first} bytes in a turn");
    assert!(rig.worker().wants_turn());
    rig.worker().continue_requests();
    assert!(!rig.worker().wants_turn());
    assert_eq!(rig.driver.used(0).len() as u64, COUNT);
    assert_eq!(rig.disk.log().iter().map(|seen| seen.length).sum::<u64>(), COUNT * LARGE);
}

//! Neighbors merge, flushes do not overtake, and the answers do not show it.

use super::disk::TestDisk;
use super::driver::Sent;
use super::rig::Rig;
use crate::block::Kind;
use crate::disk::{DiskError, Operation};
use crate::virtio::spec::blk;

const WRITE: Operation = Operation::Write { durable: false };

fn transfers(rig: &Rig) -> Vec<(Operation, u64, u64, usize)> {
    rig.disk
        .log()
        .iter()
        .map(|seen| (seen.operation, seen.offset / 512, seen.length / 512, seen.ranges.len()))
        .collect()
}

fn write(rig: &mut Rig, sector: u64, sectors: usize, fill: u8) -> Sent {
    rig.driver.send_write(0, sector, &vec![fill; sectors * 512])
}

fn assert_all_ok(rig: &mut Rig, sent: &[Sent]) {
    let mut used = rig.driver.used(0);
    used.sort_unstable();
    let mut expected: Vec<_> = sent.iter().map(|sent| (sent.head, 1)).collect();
    expected.sort_unstable();
    assert_eq!(used, expected);
    for sent in sent {
        assert_eq!(rig.driver.status(sent), blk::S_OK);
    }
}

#[test]
fn adjacent_writes_become_one_transfer() {
    let mut rig = Rig::new();
    let sent: Vec<_> = (0..4).map(|n| write(&mut rig, 10 + 2 * n, 2, n as u8)).collect();
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 10, 8, 4)]);
    assert_all_ok(&mut rig, &sent);
    assert_eq!(
        rig.disk.data()[10 * 512..18 * 512],
        [[0; 1024], [1; 1024], [2; 1024], [3; 1024]].concat()
    );
    let stats = *rig.stats().kind(Kind::Write);
    assert_eq!((stats.operations, stats.bytes, stats.merged), (4, 8 * 512, 3));
}

#[test]
fn the_order_of_arrival_does_not_matter() {
    let mut rig = Rig::new();
    let sent: Vec<_> =
        [12, 10, 40, 11, 13].map(|sector| write(&mut rig, sector, 1, sector as u8)).into();
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 10, 4, 4), (WRITE, 40, 1, 1)]);
    assert_all_ok(&mut rig, &sent);
    for sector in [10, 11, 12, 13, 40] {
        assert_eq!(rig.disk.data()[sector * 512..(sector + 1) * 512], [sector as u8; 512]);
    }
}

#[test]
fn requests_stay_apart_where_the_engine_says_so() {
    let mut rig = Rig::with(|setup| setup.disk.merges = false);
    let sent: Vec<_> = (0..3).map(|n| write(&mut rig, 10 + n, 1, n as u8)).collect();
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 10, 1, 1), (WRITE, 11, 1, 1), (WRITE, 12, 1, 1)]);
    assert_all_ok(&mut rig, &sent);
    assert_eq!(rig.stats().kind(Kind::Write).merged, 0);
}

#[test]
fn gaps_and_overlaps_do_not_merge() {
    let mut rig = Rig::new();
    let sent = [
        write(&mut rig, 0, 2, 1),
        write(&mut rig, 3, 1, 2),
        write(&mut rig, 3, 1, 3),
        write(&mut rig, 1, 2, 4),
    ];
    rig.serve();
    // Requests for the same sectors keep the order of arrival.
    assert_eq!(transfers(&rig), [(WRITE, 0, 2, 1), (WRITE, 1, 3, 2), (WRITE, 3, 1, 1)]);
    assert_all_ok(&mut rig, &sent);
}

#[test]
fn at_most_32_requests_merge() {
    let mut rig = Rig::with(|setup| {
        setup.disk = TestDisk::new(128);
        setup.options.queue_size = 256;
        setup.ring_size = 256;
    });
    let sent: Vec<_> = (0..70).map(|sector| write(&mut rig, sector, 1, 1)).collect();
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 0, 32, 32), (WRITE, 32, 32, 32), (WRITE, 64, 6, 6)]);
    assert_all_ok(&mut rig, &sent);
    // For each of three batches one, and one for what its completions might have led to.
    assert_eq!(rig.disk.commits(), 6);
}

#[test]
fn a_merged_transfer_has_at_most_1024_ranges() {
    let mut rig = Rig::with(|setup| setup.disk = TestDisk::new(4096));
    let mut heads = Vec::new();
    for n in 0..5_u64 {
        let header = rig.driver.header(blk::T_OUT, n * 250);
        let data: Vec<_> = (0..250).map(|_| rig.driver.readable(&[n as u8; 512])).collect();
        let status = rig.driver.writable(1);
        let chain: Vec<_> = [header].into_iter().chain(data).chain([status]).collect();
        heads.push(rig.driver.indirect_chain(0, &chain));
    }
    heads.iter().for_each(|head| rig.driver.publish(0, *head));
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 0, 1000, 1000), (WRITE, 1000, 250, 250)]);
    assert_eq!(rig.driver.used(0).len(), 5);
}

#[test]
fn reads_and_writes_do_not_mix() {
    let mut rig = Rig::new();
    write(&mut rig, 0, 1, 1);
    rig.driver.send_read(0, 1, 512);
    write(&mut rig, 2, 1, 1);
    rig.serve();
    let read = Operation::Read;
    assert_eq!(transfers(&rig), [(WRITE, 0, 1, 1), (read, 1, 1, 1), (WRITE, 2, 1, 1)]);
}

#[test]
fn a_flush_submits_what_was_gathered_first() {
    let mut rig = Rig::new();
    write(&mut rig, 8, 1, 1);
    write(&mut rig, 9, 1, 1);
    rig.driver.send_flush(0);
    write(&mut rig, 10, 1, 1);
    rig.serve();
    assert_eq!(transfers(&rig), [(WRITE, 8, 2, 2), (Operation::Flush, 0, 0, 0), (WRITE, 10, 1, 1)]);
}

#[test]
fn only_the_requests_that_fail_alone_fail() {
    let mut rig = Rig::new();
    // Sector 11 cannot be written: neither alone nor as a part of more.
    rig.disk.judge(|seen| {
        let bad = seen.offset <= 11 * 512 && seen.offset + seen.length > 11 * 512;
        if bad { Err(DiskError::Host(libc::EIO)) } else { Ok(()) }
    });
    let sent: Vec<_> = (9..13).map(|sector| write(&mut rig, sector, 1, 0xcc)).collect();
    rig.serve();
    assert_eq!(
        transfers(&rig),
        [
            (WRITE, 9, 4, 4),
            (WRITE, 9, 1, 1),
            (WRITE, 10, 1, 1),
            (WRITE, 11, 1, 1),
            (WRITE, 12, 1, 1)
        ]
    );
    let statuses: Vec<_> = sent.iter().map(|sent| rig.driver.status(sent)).collect();
    assert_eq!(statuses, [blk::S_OK, blk::S_OK, blk::S_IOERR, blk::S_OK]);
    assert_eq!(rig.driver.used(0).len(), 4);
    let stats = *rig.stats().kind(Kind::Write);
    assert_eq!((stats.operations, stats.bytes, stats.merged, stats.errors), (3, 3 * 512, 0, 1));
    assert_eq!(rig.driver.line.count(), 1);
    assert_eq!(rig.events().len(), 1);
}

#[test]
fn merged_transfers_of_a_slow_disk() {
    let mut rig = Rig::new();
    rig.disk.hold();
    let sent = [write(&mut rig, 1, 1, 1), write(&mut rig, 2, 1, 2), write(&mut rig, 20, 1, 3)];
    rig.serve();
    assert_eq!((rig.disk.held(), rig.driver.used(0)), (2, vec![]));
    rig.release(1);
    assert_eq!(rig.driver.used(0), [(sent[0].head, 1), (sent[1].head, 1)]);
    rig.release(1);
    assert_eq!(rig.driver.used(0), [(sent[2].head, 1)]);
}

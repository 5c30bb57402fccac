//! Requests that the disk's limits keep waiting. Time stands still here: the limits are so low that nothing leaks during a
//! test, or are lifted. Or it passes as the test says. Only the last test lets it pass, with a device that has threads and timers.

use crate::clock::Instant;
use std::sync::Arc;
use std::time::Duration;

use super::driver::{Sent, UNTOUCHED};
use super::machine::Machine;
use super::rig::Rig;
use crate::block::throttle::Direction;
use crate::block::{Kind, Limit, QueueSnapshot, Rate, Throttling};
use crate::virtio::device::VirtioDevice;

/// So slow that of two requests the second one waits for longer than any test takes.
fn slow(limit: Limit) -> Throttling {
    // A request of 512 bytes counts as 512 operations, or bytes.
    let counts_bytes = limit.option().starts_with("bps");
    let mut throttling =
        Throttling { operation_size: u64::from(!counts_bytes), ..Throttling::default() };
    throttling.rates[limit as usize] = Rate { average: 1, ..Default::default() };
    throttling
}

fn limited(limit: Limit) -> Rig {
    Rig::with(|setup| setup.options.throttling = slow(limit))
}

fn answered(rig: &mut Rig, sent: &[&Sent]) -> Vec<bool> {
    let used = rig.driver.used(0);
    sent.iter().map(|sent| used.iter().any(|(head, _)| *head == sent.head)).collect()
}

fn lift(rig: &mut Rig) {
    rig.set_throttling(Throttling::default());
    rig.worker().start_waiting(Instant::now());
}

#[test]
fn requests_wait_in_order_and_go_when_the_limit_is_lifted() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent: Vec<_> = (0..6).map(|sector| rig.driver.send_read(0, sector, 512)).collect();
    rig.serve();
    assert_eq!(
        answered(&mut rig, &sent.iter().collect::<Vec<_>>()),
        [true, false, false, false, false, false]
    );
    assert!(rig.next_release(Instant::now()).is_some());
    // Too early: nothing happens.
    rig.worker().start_waiting(Instant::now());
    assert_eq!(rig.driver.used(0), []);
    lift(&mut rig);
    let heads: Vec<_> = rig.driver.used(0).iter().map(|(head, _)| *head).collect();
    assert_eq!(heads, sent[1..].iter().map(|sent| sent.head).collect::<Vec<_>>());
    assert_eq!(rig.next_release(Instant::now()), None);
    assert_eq!(rig.stats().kind(Kind::Read).operations, 6);
    // What waited together travels together.
    assert_eq!(rig.stats().kind(Kind::Read).merged, 4);
}

#[test]
fn the_other_direction_and_what_is_not_limited_pass_by() {
    let mut rig = limited(Limit::BytesWrite);
    let first = rig.driver.send_write(0, 1, &[1; 512]);
    let second = rig.driver.send_write(0, 2, &[2; 512]);
    let read = rig.driver.send_read(0, 3, 512);
    let flush = rig.driver.send_flush(0);
    rig.serve();
    assert_eq!(answered(&mut rig, &[&first, &second, &read, &flush]), [true, false, true, true]);
    lift(&mut rig);
    assert_eq!(answered(&mut rig, &[&second]), [true]);
}

#[test]
fn both_directions_wait_for_a_total_and_take_turns() {
    let mut rig = limited(Limit::OperationsTotal);
    let first = rig.driver.send_write(0, 0, &[1; 512]);
    let waiting = [
        rig.driver.send_read(0, 10, 512),
        rig.driver.send_read(0, 20, 512),
        rig.driver.send_write(0, 30, &[1; 512]),
    ];
    rig.serve();
    assert_eq!(answered(&mut rig, &[&first]), [true]);
    lift(&mut rig);
    let heads: Vec<_> = rig.driver.used(0).iter().map(|(head, _)| *head).collect();
    assert_eq!(heads, [&waiting[0], &waiting[2], &waiting[1]].map(|sent| sent.head));
}

/// Three writes, of which the limit lets one through.
fn three_writes(rig: &mut Rig) -> [Sent; 3] {
    let sent = [1, 2, 3].map(|sector| rig.driver.send_write(0, sector, &[sector as u8 + 100; 512]));
    rig.serve();
    assert_eq!(answered(rig, &sent.iter().collect::<Vec<_>>()), [true, false, false]);
    sent
}

/// A pause takes no time, whatever waits: those requests have not begun.
#[test]
fn requests_wait_on_through_a_pause() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = three_writes(&mut rig);
    rig.worker().pause();
    assert!(rig.worker().stands_still());
    assert_eq!(rig.stopped(), [sent[1].head, sent[2].head]);
    lift(&mut rig);
    assert_eq!(rig.driver.used(0), []);
    assert_eq!(rig.disk.data()[2 * 512..4 * 512], [[2; 512], [3; 512]].concat());
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent[1], &sent[2]]), [true, true]);
    assert_eq!(rig.disk.data()[512..4 * 512], [[101; 512], [102; 512], [103; 512]].concat());
}

/// The limits count through a pause.
#[test]
fn a_pause_is_no_way_around_the_limits() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = three_writes(&mut rig);
    rig.pause();
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent[1], &sent[2]]), [false, false]);
    assert!(rig.next_release(Instant::now()).unwrap() > Duration::ZERO);
}

/// As in a restored machine: the queue has its requests back by their heads only.
fn save_and_restore(rig: &mut Rig) {
    rig.pause();
    let stopped = rig.stopped();
    let queue = rig.remove_queue(0).unwrap();
    rig.worker().add_queue(0, queue);
    assert!(rig.worker().restore(0, &QueueSnapshot { stopped, ..Default::default() }));
}

/// The requests that waited when the machine was saved wait in the restored one, too.
#[test]
fn a_restore_is_no_way_around_the_limits() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = three_writes(&mut rig);
    save_and_restore(&mut rig);
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent[1], &sent[2]]), [false, false]);
    assert!(rig.next_release(Instant::now()).unwrap() > Duration::ZERO);
    lift(&mut rig);
    assert_eq!(
        rig.driver.used(0).iter().map(|(head, _)| *head).collect::<Vec<_>>(),
        [sent[1].head, sent[2].head]
    );
}

/// A guest whose writes fail does not get past its limits by that: what begins again counts again, as in QEMU.
#[test]
fn a_stopped_request_counts_again() {
    let mut rig = limited(Limit::OperationsTotal);
    rig.disk.fail(crate::disk::DiskError::NoSpace);
    let sent = rig.driver.send_write(0, 1, &[1; 512]);
    rig.serve();
    assert_eq!(rig.stopped(), [sent.head]);
    rig.disk.heal();
    rig.pause();
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent]), [false]);
    lift(&mut rig);
    assert_eq!(answered(&mut rig, &[&sent]), [true]);
}

/// In the restored machine nothing is counted yet: the first request starts, is counted, and the others wait for it.
#[test]
fn a_restored_request_is_counted() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = three_writes(&mut rig);
    save_and_restore(&mut rig);
    rig.set_throttling(slow(Limit::OperationsTotal));
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent[1], &sent[2]]), [true, false]);
}

/// The driver gives up what has not begun when it resets the device.
#[test]
fn a_reset_gives_up_what_waits() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = three_writes(&mut rig);
    rig.reset();
    rig.set_throttling(Throttling::default());
    assert_eq!(rig.disk.data()[512..4 * 512], [[101; 512], [2; 512], [3; 512]].concat());
    assert!(sent[1..].iter().all(|sent| rig.driver.status(sent) == UNTOUCHED));
    rig.assert_alive();
}

/// A queue's reset gives up that queue's requests, and no others.
#[test]
fn a_queue_reset_gives_up_its_own() {
    let mut rig = Rig::with(|setup| {
        setup.options.throttling = slow(Limit::OperationsTotal);
        setup.options.num_queues = 2;
        setup.queues = 2;
    });
    let first = rig.driver.send_write(0, 0, &[100; 512]);
    rig.serve();
    assert_eq!(answered(&mut rig, &[&first]), [true]);
    rig.driver.send_write(0, 1, &[101; 512]);
    rig.driver.send_write(1, 2, &[102; 512]);
    rig.serve();
    rig.worker().serve(1);
    rig.remove_queue(1).unwrap();
    assert_eq!(rig.driver.used(0), []);
    lift(&mut rig);
    assert_eq!(rig.driver.used(0).len(), 1);
    assert_eq!(rig.disk.data()[512..3 * 512], [[101; 512], [2; 512]].concat());
}

/// What waited may fail like anything else, and is stopped by the error policy then.
#[test]
fn what_waited_may_fail() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = [rig.driver.send_write(0, 1, &[1; 512]), rig.driver.send_write(0, 9, &[2; 512])];
    rig.serve();
    assert_eq!(answered(&mut rig, &[&sent[0], &sent[1]]), [true, false]);
    rig.disk.fail(crate::disk::DiskError::NoSpace);
    lift(&mut rig);
    assert_eq!(rig.stopped(), [sent[1].head]);
    rig.reset();
    rig.disk.heal();
    rig.assert_alive();
}

/// A driver that always has as many reads and writes waiting as `depths` says.
struct Load {
    rig: Rig,
    depths: [usize; 2],
    waiting: Vec<(usize, Sent)>,
    answered: [u64; 2],
}

impl Load {
    fn new(depths: [usize; 2]) -> Self {
        let rig = Rig::with(|setup| {
            // The driver uses descriptors in turn, and must not come round to those that still wait.
            setup.ring_size = 256;
        });
        Self { rig, depths, waiting: Vec::new(), answered: [0; 2] }
    }

    /// As soon as something is answered the driver sends the next, so that the queues of both directions never run dry.
    fn refill(&mut self) {
        while self.waiting.len() < self.depths[0] + self.depths[1] {
            for direction in 0..2 {
                while self.waiting.iter().filter(|(of, _)| *of == direction).count()
                    < self.depths[direction]
                {
                    let driver = &mut self.rig.driver;
                    let sent = match direction {
                        0 => driver.send_read(0, 0, 512),
                        _ => driver.send_write(0, 32, &[1; 512]),
                    };
                    self.waiting.push((direction, sent));
                    self.rig.serve();
                }
            }
            self.count();
        }
    }

    fn count(&mut self) {
        for (head, _) in self.rig.driver.used(0) {
            let at = self.waiting.iter().position(|(_, sent)| sent.head == head).unwrap();
            self.answered[self.waiting.remove(at).0] += 1;
        }
    }
}

/// Disks that share limits, for a minute of a clock of their own. Gives how many reads and writes of each were answered.
fn minute<const N: usize>(rates: &[(Limit, u64)], depths: [[usize; 2]; N]) -> [[u64; 2]; N] {
    let mut loads = depths.map(Load::new);
    let mut throttling = Throttling::default();
    for (limit, average) in rates {
        throttling.rates[*limit as usize] = Rate { average: *average, ..Default::default() };
    }
    // Requests come at the real time, which must never overtake this clock.
    let start = Instant::now() + Duration::from_secs(1 << 20);
    let [first, others @ ..] = &loads[..] else { panic!("no disks") };
    first.rig.set_throttling_at(throttling, start);
    others.iter().for_each(|other| other.rig.join(&first.rig));
    let mut now = start;
    let mut wake = [start; N];
    while now <= start + Duration::from_secs(60) {
        for (load, wake) in loads.iter_mut().zip(&mut wake).filter(|(_, wake)| **wake <= now) {
            load.refill();
            load.rig.worker().start_waiting(now);
            load.count();
            load.refill();
            // One without requests sleeps on.
            *wake = now + load.rig.next_release(now).unwrap_or(Duration::MAX);
        }
        now = wake.into_iter().min().unwrap().max(now + Duration::from_nanos(1));
    }
    loads.map(|load| load.answered)
}

/// A driver that always has four reads and four writes waiting.
fn a_minute(rates: &[(Limit, u64)]) -> [u64; 2] {
    let [answered] = minute(rates, [[4, 4]]);
    answered
}

/// The rate, and the tenth of a second's worth that may come at once in the beginning.
#[track_caller]
fn holds(actual: u64, rate: u64) {
    let expected = 60 * rate + rate / 10;
    assert!(
        actual.abs_diff(expected) <= 1 + expected / 1000,
        "{actual} in a minute, not {expected}"
    );
}

#[test]
fn each_direction_gets_its_own_rate() {
    let [reads, writes] = a_minute(&[(Limit::OperationsRead, 60), (Limit::OperationsWrite, 30)]);
    holds(reads, 60);
    holds(writes, 30);
    let [reads, writes] = a_minute(&[(Limit::BytesRead, 20 << 9), (Limit::OperationsWrite, 100)]);
    holds(reads, 20);
    holds(writes, 100);
}

#[test]
fn a_total_is_shared_evenly() {
    for rate in [(Limit::OperationsTotal, 60), (Limit::BytesTotal, 60 << 9)] {
        let [reads, writes] = a_minute(&[rate]);
        holds(reads + writes, 60);
        assert!(reads.abs_diff(writes) <= 8, "{reads} reads and {writes} writes");
    }
}

#[test]
fn disks_of_a_group_share_evenly_however_many_requests_each_has() {
    let [reader, writer, both] = minute(&[(Limit::OperationsTotal, 60)], [[1, 0], [0, 16], [4, 4]])
        .map(|[reads, writes]| reads + writes);
    holds(reader + writer + both, 60);
    for one in [reader, writer, both] {
        assert!(one.abs_diff(1202) <= 24, "{reader}, {writer} and {both}");
    }
    // What one does not use, the others have.
    let [idle, busy] = minute(&[(Limit::OperationsTotal, 60)], [[0, 0], [8, 0]]);
    assert_eq!(idle, [0, 0]);
    holds(busy[0], 60);
}

#[test]
fn latencies_are_counted_into_bins() {
    use crate::block::Histogram;
    let mut rig = Rig::new();
    let bins = Histogram::new(vec![u64::MAX]).unwrap();
    Arc::clone(&rig.shared().counters[0]).set_histogram(Kind::Read, Some(bins));
    rig.assert_alive();
    rig.assert_alive();
    let counters = Arc::clone(&rig.shared().counters[0]);
    assert_eq!(counters.histogram(Kind::Read).unwrap().bins, [2, 0]);
    assert_eq!(counters.histogram(Kind::Write), None);
    counters.set_histogram(Kind::Read, None);
    assert_eq!(counters.histogram(Kind::Read), None);
}

/// Sends five reads to each queue of a device with two queues that starts about 32 reads a second.
fn send_reads(machine: &mut Machine) -> Vec<Sent> {
    let send = |number: usize| machine.driver.send_read(number % 2, number as u64, 512);
    let sent = (0..10).map(send).collect();
    (0..2).for_each(|ring| machine.driver.kick(ring));
    sent
}

fn await_answers(machine: &mut Machine, ring: usize, count: usize) {
    let mut answers = 0;
    while answers < count {
        answers += machine.answers(ring).len();
    }
    assert_eq!(answers, count);
}

#[test]
fn a_timer_starts_what_waits_after_a_pause_and_after_resets_too() {
    let mut throttling = Throttling::default();
    throttling.rates[Limit::BytesTotal as usize] = Rate { average: 16 << 10, ..Rate::default() };
    let mut machine = Machine::with(2, |options| options.throttling = throttling);
    machine.start();
    send_reads(&mut machine);
    (0..2).for_each(|ring| await_answers(&mut machine, ring, 5));

    // The timers expire during the pause.
    send_reads(&mut machine);
    let pause = machine.handle.pause();
    assert!(pause.wait(Duration::from_secs(60)));
    let throttle = &machine.handle.throttle;
    while throttle.wait(Direction::Read, Instant::now()) > Duration::ZERO {
        std::thread::yield_now();
    }
    machine.handle.resume();
    (0..2).for_each(|ring| await_answers(&mut machine, ring, 5));

    let sent = send_reads(&mut machine);
    assert_eq!(machine.reset_queue(1).len(), 1);
    await_answers(&mut machine, 0, 5);
    let answered = machine.driver.used(1).len();
    let untouched = sent.iter().filter(|sent| machine.driver.status(sent) == UNTOUCHED).count();
    assert_eq!(answered + untouched, 5);
    machine.driver.reset_ring(1);
    machine.device.start_queue(machine.driver.active(1)).unwrap();

    send_reads(&mut machine);
    machine.reset();
    machine.start();
    send_reads(&mut machine);
    (0..2).for_each(|ring| await_answers(&mut machine, ring, 5));
}

//! Requests that the disk's limits keep waiting. Time stands still here: the limits are so low that nothing leaks during a
//! test, or are lifted.

use super::driver::Sent;
use super::rig::Rig;
use crate::block::{Kind, Limit, Rate, Throttling};

/// So slow that of two requests the second one waits for longer than any test takes.
fn slow(limit: Limit) -> Throttling {
    let mut throttling = Throttling::default();
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
    rig.shared().set_throttling(Throttling::default());
    rig.worker().release();
}

#[test]
fn requests_wait_in_order_and_go_when_the_limit_is_lifted() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent: Vec<_> = (0..6).map(|sector| rig.driver.send_read(0, sector, 512)).collect();
    rig.serve();
    assert_eq!(answered(&mut rig, &sent.iter().collect::<Vec<_>>()), [true, false, false, false, false, false]);
    assert!(rig.worker().next_release().is_some());
    // Too early: nothing happens.
    rig.worker().release();
    assert_eq!(rig.driver.used(0), []);
    lift(&mut rig);
    let heads: Vec<_> = rig.driver.used(0).iter().map(|(head, _)| *head).collect();
    assert_eq!(heads, sent[1..].iter().map(|sent| sent.head).collect::<Vec<_>>());
    assert_eq!(rig.worker().next_release(), None);
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
    let waiting =
        [rig.driver.send_read(0, 10, 512), rig.driver.send_read(0, 20, 512), rig.driver.send_write(0, 30, &[1; 512])];
    rig.serve();
    assert_eq!(answered(&mut rig, &[&first]), [true]);
    lift(&mut rig);
    let heads: Vec<_> = rig.driver.used(0).iter().map(|(head, _)| *head).collect();
    assert_eq!(heads, [&waiting[0], &waiting[2], &waiting[1]].map(|sent| sent.head));
}

#[test]
fn a_paused_vm_keeps_them_and_a_reset_drops_them() {
    let mut rig = limited(Limit::OperationsTotal);
    let sent = [rig.driver.send_read(0, 1, 512), rig.driver.send_read(0, 2, 512)];
    rig.serve();
    rig.worker().pause();
    assert_eq!(answered(&mut rig, &[&sent[0], &sent[1]]), [true, false]);
    let kept = rig.worker().kept();
    assert_eq!(kept.iter().map(|kept| kept.head).collect::<Vec<_>>(), [sent[1].head]);
    lift(&mut rig);
    assert_eq!(rig.driver.used(0), []);
    rig.worker().resume();
    assert_eq!(answered(&mut rig, &[&sent[1]]), [true]);

    let mut rig = limited(Limit::OperationsTotal);
    let _sent = [rig.driver.send_read(0, 1, 512), rig.driver.send_read(0, 2, 512)];
    rig.serve();
    rig.reset();
    rig.shared().set_throttling(Throttling::default());
    rig.assert_alive();
}

#[test]
fn latencies_are_counted_into_bins() {
    use crate::block::Histogram;
    let mut rig = Rig::new();
    let bins = Histogram::new(vec![u64::MAX]).unwrap();
    rig.shared().counters(0).set_histogram(Kind::Read, Some(bins));
    rig.assert_alive();
    rig.assert_alive();
    let counters = rig.shared().counters(0);
    assert_eq!(counters.histogram(Kind::Read).unwrap().bins, [2, 0]);
    assert_eq!(counters.histogram(Kind::Write), None);
    counters.set_histogram(Kind::Read, None);
    assert_eq!(counters.histogram(Kind::Read), None);
}

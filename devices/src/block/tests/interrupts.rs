//! Who wakes whom, and when not (virtio 1.2 §2.7.7, §2.7.10).

use std::sync::{Arc, Mutex};

use super::rig::Rig;
use crate::virtio::spec::mmio::INTERRUPT_USED_BUFFER;
use crate::virtio::spec::ring::AVAIL_F_NO_INTERRUPT;
use crate::virtio::spec::{self, blk};

fn with_event_index() -> Rig {
    Rig::with(|setup| setup.accepted = u64::MAX)
}

#[test]
fn one_interrupt_a_batch() {
    let mut rig = Rig::new();
    for sector in 0..10 {
        rig.driver.send_read(0, sector * 3, 512);
    }
    rig.serve();
    assert_eq!(rig.driver.used(0).len(), 10);
    assert_eq!(rig.driver.line.count(), 1);
    assert_eq!((rig.stats().interrupts, rig.disk.commits()), (1, 2));
    // A kick without a request is no reason for an interrupt.
    rig.serve();
    assert_eq!(rig.driver.line.count(), 1);
}

#[test]
fn one_interrupt_for_completions_that_come_together() {
    let mut rig = Rig::new();
    rig.disk.hold();
    for sector in 0..6 {
        rig.driver.send_read(0, sector * 3, 512);
    }
    rig.serve();
    assert_eq!(rig.driver.line.count(), 0);
    rig.release(4);
    assert_eq!((rig.driver.used(0).len(), rig.driver.line.count()), (4, 1));
    rig.release(2);
    assert_eq!((rig.driver.used(0).len(), rig.driver.line.count()), (2, 2));
}

#[test]
fn a_worker_that_wakes_clears_an_acknowledged_interrupt() {
    let mut rig = Rig::new();
    let kernel = rig.driver.interrupt.acknowledgements().try_clone().unwrap();
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!(rig.driver.interrupt.status(), INTERRUPT_USED_BUFFER);
    kernel.write(1).unwrap();
    // From here on the driver polls: it sees no event without a cause.
    rig.driver.set_available_flags(0, AVAIL_F_NO_INTERRUPT);
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!(rig.driver.interrupt.status(), 0);
}

#[test]
fn no_interrupt_is_honored() {
    let mut rig = Rig::new();
    rig.driver.set_available_flags(0, AVAIL_F_NO_INTERRUPT);
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!((rig.driver.used(0).len(), rig.driver.line.count()), (1, 0));
    rig.driver.set_available_flags(0, 0);
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!((rig.driver.used(0).len(), rig.driver.line.count()), (1, 1));
}

#[test]
fn used_event_says_when() {
    let mut rig = with_event_index();
    // Interrupt when the third answer is there, not before, and once.
    rig.driver.set_used_event(0, 2);
    for expected in [0, 0, 1, 1] {
        rig.driver.send_flush(0);
        rig.serve();
        assert_eq!(rig.driver.line.count(), expected);
    }
    // A batch that jumps over the event counts too.
    rig.driver.set_used_event(0, 6);
    for _ in 0..8 {
        rig.driver.send_flush(0);
    }
    rig.serve();
    assert_eq!(rig.driver.line.count(), 2);
    // With EVENT_IDX the flag means nothing (§2.7.7.1).
    rig.driver.set_available_flags(0, AVAIL_F_NO_INTERRUPT);
    rig.driver.set_used_event(0, 12);
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!(rig.driver.line.count(), 3);
}

#[test]
fn used_event_wraps_around() {
    let mut rig = with_event_index();
    rig.driver.set_used_event(0, 65535);
    let mut interrupts = 0;
    for count in 1..=65540_u32 {
        rig.driver.send_flush(0);
        rig.serve();
        rig.driver.used(0);
        interrupts += u32::from(count == 65536);
        assert_eq!(rig.driver.line.count(), interrupts, "after {count}");
    }
}

#[test]
fn available_event_asks_for_the_next_kick() {
    let mut rig = with_event_index();
    for count in 1..5 {
        rig.driver.send_flush(0);
        rig.serve();
        assert_eq!(rig.driver.available_event(0), count);
    }
}

#[test]
fn a_chain_that_comes_while_the_device_looks_away_is_served() {
    for event_index in [false, true] {
        let mut rig = Rig::with(|setup| {
            setup.accepted = if event_index { u64::MAX } else { !spec::F_EVENT_IDX }
        });
        // The second request is made available, without a kick, while the first is carried out.
        let first = rig.driver.send_flush(0);
        let late = rig.driver.late_flush(0);
        let head = late.head();
        let mut once = Some(late);
        rig.disk.judge(move |_| {
            if let Some(mut late) = once.take() {
                late.publish();
            }
            Ok(())
        });
        rig.serve();
        assert_eq!(rig.driver.used(0), [(first.head, 1), (head, 1)]);
    }
}

#[test]
fn a_driver_that_never_stops_gives_others_their_turn() {
    let mut rig = Rig::with(|setup| setup.ring_size = 4);
    let kick = rig.driver.active(0).kick;
    rig.driver.send_flush(0);
    let mut late = rig.driver.late_flush(0);
    rig.disk.judge(move |_| {
        late.publish();
        Ok(())
    });
    // Every request brings the next. `serve` returns all the same, and comes back by its own kick.
    rig.serve();
    let served = rig.driver.used(0).len();
    assert!((2..100).contains(&served), "{served}");
    assert_eq!(kick.read().unwrap(), 1);
    rig.disk.heal();
    rig.serve();
    assert!(!rig.driver.used(0).is_empty());
    assert!(kick.read().is_err());
}

#[test]
fn no_interrupt_is_held_back_for_longer_than_a_turn() {
    for event_index in [false, true] {
        let mut rig = Rig::with(|setup| {
            setup.accepted = if event_index { u64::MAX } else { !spec::F_EVENT_IDX }
        });
        let mut first = rig.driver.late_flush(0);
        let others = Arc::new(Mutex::new((rig.driver.late_flush(0), 0)));
        let added = Arc::clone(&others);
        rig.disk.judge(move |_| {
            let (late, more) = &mut *added.lock().unwrap();
            if *more > 0 {
                *more -= 1;
                late.publish();
            }
            Ok(())
        });
        let mut answers = 0_u16;
        // Enough turns for the worker to busy-poll and to try one interrupt for many answers, of which there then are more
        // or fewer than it would like.
        for turn in 0..600 {
            others.lock().unwrap().1 = turn % 12;
            rig.driver.set_used_event(0, answers);
            let interrupts = rig.driver.line.count();
            first.publish();
            rig.serve();
            let answered = rig.driver.used(0).len();
            assert_eq!(answered, turn % 12 + 1);
            assert!(
                rig.driver.line.count() > interrupts,
                "turn {turn}: {answered} answers and no interrupt"
            );
            answers = answers.wrapping_add(answered as u16);
        }
    }
}

#[test]
fn a_queue_with_a_history_gets_one_interrupt() {
    // As after a snapshot: the queue does not tell whether the driver heard of the last completions.
    let mut rig = Rig::new();
    rig.driver.send_flush(0);
    rig.serve();
    assert_eq!(rig.driver.line.count(), 1);
    let mut queue = rig.remove_queue(0).unwrap();
    queue.restored = true;
    rig.worker().add_queue(0, queue);
    for _ in 0..3 {
        rig.serve();
        assert_eq!(rig.driver.line.count(), 2);
    }
}

#[test]
fn what_arrives_before_the_start_is_served_without_a_kick() {
    let mut rig = Rig::new();
    rig.reset();
    let sent = rig.driver.send_read(0, 0, 512);
    assert_eq!(rig.outcome(&sent).status, blk::S_OK);
}

//! The device with its threads: start, stop, ring reset, several queues, and what happens when a thread dies.

use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

use super::disk::TestDisk;
use super::driver::{Driver, UNTOUCHED};
use super::machine::Machine;
use super::rig::recorder;
use crate::block::{
    BlockDevice, BlockError, BlockEvent, BlockOptions, ErrorPolicy, IoStatus, Kind,
};
use crate::disk::{DiskError, Operation};
use crate::spawn::DiskThreads;
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::spec::ring::AVAIL_F_NO_INTERRUPT;
use crate::virtio::spec::{self, blk};

/// Longer than anything takes, however loaded the host is.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_write_reaches_the_disk_and_comes_back() {
    let mut machine = Machine::new(1);
    machine.start();
    let write = machine.driver.send_write(0, 3, &[7; 1024]);
    machine.driver.kick(0);
    machine.driver.line.wait(1);
    assert_eq!(machine.driver.used(0), [(write.head, 1)]);
    assert_eq!(machine.driver.status(&write), blk::S_OK);
    let read = machine.driver.send_read(0, 2, 2048);
    machine.driver.kick(0);
    machine.driver.line.wait(2);
    assert_eq!(machine.driver.used(0), [(read.head, 2049)]);
    assert_eq!(machine.driver.data(&read), [[2; 512], [7; 512], [7; 512], [5; 512]].concat());
    machine.reset();
    // The driver is gone: what it wrote is made durable.
    assert_eq!(machine.disk.operations().pop(), Some(Operation::Flush));
}

#[test]
fn a_slow_disk_wakes_the_worker() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.disk.hold();
    let read = machine.driver.send_read(0, 9, 512);
    machine.driver.kick(0);
    machine.disk.wait_held(1);
    machine.disk.release(1);
    machine.driver.line.wait(1);
    assert_eq!(machine.driver.used(0), [(read.head, 513)]);
}

#[test]
fn what_waits_at_the_start_is_served_without_a_kick() {
    let mut machine = Machine::new(1);
    let read = machine.driver.send_read(0, 4, 512);
    machine.start();
    machine.driver.line.wait(1);
    assert_eq!(machine.driver.used(0), [(read.head, 513)]);
}

#[test]
fn threads_have_names_and_end_with_the_device() {
    let machine = Machine::with(3, |options| options.name = "naming".to_owned());
    let cpus = std::thread::available_parallelism().unwrap().get();
    let expected: Vec<_> = (0..cpus.min(3)).map(|number| format!("disk-naming-{number}")).collect();
    // A thread names itself, and so does any that was started only just now.
    while machine.threads() != expected {
        std::thread::yield_now();
    }
    let Machine { device, handle, .. } = machine;
    drop(device);
    // A handle that outlives the device does no harm.
    assert!(handle.pause().wait(LONG));
    handle.resume();
    assert_eq!(handle.queues(), []);
    assert_eq!(handle.stats().kind(Kind::Read).operations, 0);
}

#[test]
fn every_queue_is_served_whatever_the_number_of_threads() {
    for queues in [1, 2, 5] {
        let mut machine = Machine::new(queues);
        assert_eq!(machine.device.queue_sizes(), vec![256; usize::from(queues)]);
        machine.start();
        for ring in (0..queues).rev() {
            machine.assert_serves(ring);
        }
        assert_eq!(machine.handle.stats().kind(Kind::Read).operations, u64::from(queues));
        let stopped: Vec<_> = machine.stop().iter().map(|queue| queue.index).collect();
        assert_eq!(stopped, (0..queues).collect::<Vec<_>>());
    }
}

#[test]
fn stop_answers_what_is_in_flight_before_it_returns() {
    let mut machine = Machine::new(2);
    machine.start();
    machine.disk.hold();
    let sent: Vec<_> = (0..2).map(|ring| machine.driver.send_read(ring, 6, 512)).collect();
    (0..2).for_each(|ring| machine.driver.kick(ring));
    machine.disk.wait_held(2);
    assert_eq!(machine.stop().len(), 2);
    for (ring, sent) in sent.iter().enumerate() {
        assert_eq!(machine.driver.used(ring), [(sent.head, 513)]);
        assert_eq!(machine.driver.data(sent), [6; 512]);
    }
}

#[test]
fn stop_waits_for_a_disk_that_takes_its_time() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.disk.hold();
    let read = machine.driver.send_read(0, 6, 512);
    machine.driver.kick(0);
    machine.disk.wait_held(1);
    let drain = machine.device.reset();
    // The worker answers a question after it has heard of the stop.
    machine.handle.queues();
    assert!(!drain.is_done(), "stopped with a request in flight");
    assert_eq!(machine.driver.data(&read), [UNTOUCHED; 512]);
    machine.disk.release_all();
    assert!(drain.wait(LONG));
    assert_eq!(machine.driver.data(&read), [6; 512]);
    assert_eq!(machine.driver.used(0), [(read.head, 513)]);
}

/// The vCPU that enables a queue holds the device's lock meanwhile, and others wait for that lock.
#[test]
fn a_queue_starts_without_a_wait_for_a_thread_that_the_host_keeps() {
    // The first queue and the last one belong to the same thread.
    let last = std::thread::available_parallelism().unwrap().get() as u16;
    let mut machine = Machine::new(last + 1);
    machine.start();
    assert_eq!(machine.reset_queue(last).len(), 1);
    machine.driver.reset_ring(last.into());
    let (begun, begins) = mpsc::channel();
    let (answer, answers) = mpsc::channel();
    machine.disk.judge(move |_| {
        begun.send(()).unwrap();
        answers.recv().unwrap()
    });
    let read = machine.driver.send_read(0, 6, 512);
    machine.driver.kick(0);
    begins.recv_timeout(LONG).unwrap();
    let other = machine.driver.send_read(last.into(), 7, 512);
    machine.device.start_queue(machine.driver.active(last)).unwrap();
    // Only now does the host answer.
    answer.send(Ok(())).unwrap();
    answer.send(Ok(())).unwrap();
    machine.driver.line.wait(2);
    for (ring, sent) in [(0, read), (last.into(), other)] {
        assert_eq!(machine.driver.used(ring), [(sent.head, 513)]);
    }
    assert_eq!(machine.driver.interrupt.needs_reset(), 0);
    machine.disk.heal();
}

#[test]
fn nothing_is_touched_after_stop() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.assert_serves(0);
    machine.stop();
    let read = machine.driver.send_read(0, 1, 512);
    machine.driver.kick(0);
    // Twice around the worker's loop: a kick that it still listened to would have been heard.
    machine.handle.queues();
    machine.handle.queues();
    assert_eq!(machine.driver.used(0), []);
    assert_eq!(machine.driver.status(&read), UNTOUCHED);
}

#[test]
fn a_device_starts_and_stops_many_times_under_load() {
    let mut machine = Machine::new(2);
    for _ in 0..50 {
        machine.start();
        for ring in 0..2 {
            for sector in 0..5 {
                machine.driver.send_read(ring, sector, 512);
            }
            machine.driver.kick(ring);
        }
        machine.reset();
    }
    machine.start();
    machine.assert_serves(0);
    machine.assert_serves(1);
    assert_eq!(machine.events.lock().unwrap()[..], []);
}

#[test]
fn one_ring_resets_while_the_other_works() {
    let mut machine = Machine::new(2);
    machine.start();
    machine.assert_serves(0);
    machine.disk.hold();
    let read = machine.driver.send_read(0, 2, 512);
    machine.driver.kick(0);
    machine.disk.wait_held(1);
    let queue = machine.reset_queue(0).remove(0);
    assert_eq!((queue.index, machine.driver.used(0)), (0, vec![(read.head, 513)]));
    machine.disk.finish_at_once();
    assert!(machine.reset_queue(0).is_empty());
    machine.assert_serves(1);
    // The ring that is off hears nothing.
    machine.driver.send_read(0, 2, 512);
    machine.driver.kick(0);
    machine.assert_serves(1);
    assert_eq!(machine.driver.used(0), []);
    machine.driver.reset_ring(0);
    machine.device.start_queue(machine.driver.active(0)).unwrap();
    machine.assert_serves(0);
    assert_eq!(machine.stop().len(), 2);
}

#[test]
fn a_queue_that_the_driver_left_out_is_not_needed() {
    let mut machine = Machine::new(3);
    let activation = Activation {
        memory: machine.driver.memory.clone(),
        features: machine.features(),
        queues: vec![machine.driver.active(1)],
        interrupt: machine.driver.interrupt.clone(),
    };
    machine.device.start(activation).unwrap();
    machine.assert_serves(1);
    assert_eq!(machine.stop().len(), 1);
    assert_eq!(machine.stop().len(), 0);
}

#[test]
fn queues_that_were_never_offered_are_refused() {
    let mut machine = Machine::with(1, |options| options.queue_size = 8);
    let activation = Activation {
        memory: machine.driver.memory.clone(),
        features: machine.features(),
        queues: vec![],
        interrupt: machine.driver.interrupt.clone(),
    };
    machine.device.start(activation).unwrap();
    // The driver's ring has 16 descriptors.
    assert!(machine.device.start_queue(machine.driver.active(0)).is_err());
    let mut beyond = machine.driver.active(0);
    beyond.index = 7;
    assert!(machine.device.start_queue(beyond).is_err());
    assert!(machine.reset_queue(7).is_empty());
    assert!(machine.reset_queue(0).is_empty());
    assert_eq!(machine.events.lock().unwrap()[..], []);
}

#[test]
fn a_broken_ring_leaves_the_rest_alone() {
    let mut machine = Machine::new(2);
    machine.start();
    machine.driver.publish(0, 999);
    machine.driver.kick(0);
    machine.driver.line.wait(1);
    assert_eq!(machine.driver.interrupt.needs_reset(), spec::STATUS_DEVICE_NEEDS_RESET);
    machine.assert_serves(1);
    machine.reset();
    machine.start();
    machine.assert_serves(0);
}

#[test]
fn a_panic_on_a_worker_thread_is_reported() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.disk.judge(|_| panic!("the engine exploded"));
    machine.driver.send_flush(0);
    machine.driver.kick(0);
    let expected = BlockEvent::WorkerFailed {
        device: "vda".to_owned(),
        message: "a worker thread panicked: the engine exploded".to_owned(),
    };
    while machine.events.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(machine.events.lock().unwrap()[..], [expected]);
    // No caller hangs on the dead thread.
    assert_eq!(machine.stop().len(), 0);
    assert!(machine.device.start_queue(machine.driver.active(0)).is_err());
}

/// The pause or the reset is in the thread's channel when the thread ends.
#[test]
fn a_thread_that_ends_before_it_gets_to_a_pause_or_a_reset_stands_still() {
    for reset in [false, true] {
        let mut machine = Machine::new(1);
        machine.start();
        let turn = Arc::new(Barrier::new(2));
        let of_thread = Arc::clone(&turn);
        machine.disk.judge(move |_| {
            of_thread.wait();
            of_thread.wait();
            panic!("the engine exploded");
        });
        machine.driver.send_flush(0);
        machine.driver.kick(0);
        turn.wait();
        let drain = if reset { machine.device.reset() } else { machine.handle.pause() };
        turn.wait();
        assert!(drain.wait(LONG));
    }
}

#[test]
fn a_disk_without_an_engine_is_no_device() {
    let disk = Arc::new(TestDisk::new(64));
    disk.refuse_engines();
    let (driver, (sink, _)) = (Driver::new(1, 16), recorder());
    let (options, threads) = (BlockOptions::new("vda"), DiskThreads::default());
    let refused = BlockDevice::new(options, disk, &driver.memory, sink, &threads);
    assert!(matches!(refused, Err(BlockError::Thread { .. })));
}

/// A guest that resets its disk in a loop makes nothing on the host: a confined process could not.
#[test]
fn a_reset_makes_no_engine() {
    let mut machine = Machine::new(2);
    let engines = machine.disk.engines();
    for _ in 0..100 {
        machine.start();
        machine.assert_serves(0);
        machine.reset();
    }
    assert_eq!(machine.disk.engines(), engines);
}

#[test]
fn an_error_stops_and_a_resume_goes_on() {
    let mut machine = Machine::with(1, |options| options.write_errors = ErrorPolicy::Stop);
    machine.start();
    machine.disk.fail(DiskError::NoSpace);
    let write = machine.driver.send_write(0, 5, &[0x55; 512]);
    machine.driver.kick(0);
    while machine.events.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    assert!(machine.handle.pause().wait(LONG));
    assert_eq!(machine.handle.io_status(), IoStatus::NoSpace);
    let queues = machine.handle.queues();
    assert_eq!((queues.len(), queues[0].queue, &queues[0].stopped[..]), (1, 0, &[write.head][..]));
    machine.disk.heal();
    machine.handle.resume();
    machine.driver.line.wait(1);
    assert_eq!(machine.handle.io_status(), IoStatus::Ok);
    assert_eq!(machine.driver.used(0), [(write.head, 1)]);
    assert_eq!(machine.disk.data()[5 * 512..6 * 512], [0x55; 512]);
}

#[test]
fn a_stopped_request_moves_to_another_device() {
    let mut machine = Machine::with(2, |options| options.write_errors = ErrorPolicy::Stop);
    machine.start();
    machine.disk.fail(DiskError::NoSpace);
    let write = machine.driver.send_write(1, 5, &[0x55; 512]);
    machine.driver.kick(1);
    while machine.events.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    assert!(machine.handle.pause().wait(LONG));
    let read = machine.driver.send_read(0, 1, 512);
    machine.disk.heal();
    machine.move_to_another_device();
    let handle = machine.handle.clone();
    // The device was paused before it started: it takes nothing, not even what waits or is kicked.
    machine.driver.kick(0);
    let stopped = || handle.queues().into_iter().flat_map(|queue| queue.stopped).count();
    assert_eq!((stopped(), stopped()), (1, 1));
    assert_eq!((machine.driver.used(0), machine.driver.used(1)), (vec![], vec![]));
    handle.resume();
    machine.driver.line.wait(1);
    assert_eq!(machine.answers(1), [(write.head, 1)]);
    assert_eq!(machine.answers(0), [(read.head, 513)]);
    assert!(handle.pause().wait(LONG));
    handle.resume();
    machine.assert_serves(1);
}

/// Requests that were available and not kicked when the machine was saved: only a look without a notification finds them. The device
/// interrupts, whatever the driver asked for, and also with a used index of 0, as after 65536 completions.
#[test]
fn requests_that_wait_move_to_another_device() {
    for (queues, event_index) in [(1, false), (1, true), (4, false), (4, true)] {
        let mut machine = Machine::new(queues);
        machine.event_index = event_index;
        machine.start();
        assert!(machine.handle.pause().wait(LONG));
        let sent: Vec<_> = (0..queues)
            .map(|ring| {
                machine.driver.set_available_flags(ring.into(), AVAIL_F_NO_INTERRUPT);
                machine.driver.set_used_event(ring.into(), 9);
                machine.driver.send_read(ring.into(), 1, 512)
            })
            .collect();
        machine.move_to_another_device();
        machine.handle.resume();
        machine.driver.line.wait(1);
        for (ring, sent) in sent.iter().enumerate() {
            let answers = machine.answers(ring);
            assert_eq!(answers, [(sent.head, 513)], "ring {ring} of {queues}");
        }
        // No worker has another interrupt to raise once it stands still.
        assert!(machine.handle.pause().wait(LONG));
        machine.handle.resume();
        machine.driver.set_available_flags(0, 0);
        machine.driver.set_used_event(0, 1);
        machine.assert_serves(0);
    }
}

#[test]
fn a_broken_ring_stays_broken_in_another_device() {
    let mut machine = Machine::new(2);
    machine.start();
    machine.driver.set_available_index(0, 1000);
    machine.driver.kick(0);
    machine.driver.line.wait(1);
    assert!(machine.handle.pause().wait(LONG));
    let broken = |machine: &Machine| {
        machine.handle.queues().iter().map(|queue| queue.broken).collect::<Vec<_>>()
    };
    assert_eq!(broken(&machine), [true, false]);
    // What would be sound again is not looked at.
    machine.driver.reset_ring(0);
    machine.driver.send_read(0, 1, 512);
    machine.move_to_another_device();
    machine.handle.resume();
    assert!(machine.handle.pause().wait(LONG));
    machine.handle.resume();
    machine.assert_serves(1);
    assert_eq!(broken(&machine), [true, false]);
    assert_eq!(machine.driver.used(0), []);
    machine.reset();
    machine.start();
    machine.assert_serves(0);
}

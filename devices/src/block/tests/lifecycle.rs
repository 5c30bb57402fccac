//! The device with its threads: start, stop, ring reset, several queues, and what happens when a thread dies.

use std::sync::{Arc, mpsc};

use super::disk::TestDisk;
use super::driver::{Driver, UNTOUCHED};
use super::rig::recorder;
use crate::block::{BlockDevice, BlockEvent, BlockHandle, BlockOptions, ErrorPolicy, IoStatus, Kind};
use crate::disk::{DiskError, Operation};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::spec::{self, blk};

struct Machine {
    disk: Arc<TestDisk>,
    device: BlockDevice,
    handle: BlockHandle,
    driver: Driver,
    events: Arc<std::sync::Mutex<Vec<BlockEvent>>>,
    queues: u16,
}

impl Machine {
    fn new(queues: u16) -> Self {
        Self::with(queues, |_| {})
    }

    fn with(queues: u16, change: impl FnOnce(&mut BlockOptions)) -> Self {
        let disk = Arc::new(TestDisk::new(64));
        let (sink, events) = recorder();
        let mut options = BlockOptions::new("vda");
        options.num_queues = queues;
        change(&mut options);
        let device = BlockDevice::new(options, Arc::clone(&disk) as _, sink).unwrap();
        let handle = device.handle();
        Self { disk, device, handle, driver: Driver::new(queues, 16), events, queues }
    }

    fn features(&self) -> u64 {
        self.device.features() & !spec::F_EVENT_IDX
    }

    fn start(&mut self) {
        let queues = (0..self.queues).map(|index| self.driver.active(index)).collect();
        let (memory, interrupt) = (self.driver.memory.clone(), self.driver.interrupt.clone());
        self.device.start(Activation { memory, features: self.features(), queues, interrupt }).unwrap();
    }

    /// A driver's reset: the device stops, the rings start over.
    fn reset(&mut self) {
        assert_eq!(self.device.stop().len(), usize::from(self.queues));
        self.driver.interrupt.reset();
        (0..self.queues).for_each(|ring| self.driver.reset_ring(ring.into()));
    }

    /// Reads sector 1 through `ring` and waits for the answer.
    fn assert_serves(&mut self, ring: u16) {
        let interrupts = self.driver.line.count();
        let sent = self.driver.send_read(ring.into(), 1, 512);
        self.driver.kick(ring.into());
        self.driver.line.wait(interrupts + 1);
        assert_eq!(self.driver.used(ring.into()), [(sent.head, 513)]);
        assert_eq!(self.driver.data(&sent), [1; 512]);
    }

    fn threads(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .filter(|name| name.starts_with("disk-naming"))
            .collect();
        names.sort();
        names
    }
}

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
    assert_eq!(machine.disk.engines(), 0);
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
    handle.pause();
    handle.resume();
    assert_eq!(handle.kept(), []);
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
        let stopped: Vec<_> = machine.device.stop().iter().map(|queue| queue.index).collect();
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
    assert_eq!(machine.device.stop().len(), 2);
    for (ring, sent) in sent.iter().enumerate() {
        assert_eq!(machine.driver.used(ring), [(sent.head, 513)]);
        assert_eq!(machine.driver.data(sent), [6; 512]);
    }
    assert_eq!(machine.disk.engines(), 0);
}

#[test]
fn stop_waits_for_a_disk_that_takes_its_time() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.disk.hold();
    machine.disk.hold_drain();
    let read = machine.driver.send_read(0, 6, 512);
    machine.driver.kick(0);
    machine.disk.wait_held(1);
    let (done, stopped) = mpsc::channel();
    let Machine { disk, mut device, mut driver, .. } = machine;
    let stopper = std::thread::spawn(move || {
        device.stop();
        done.send(()).unwrap();
    });
    disk.wait_draining();
    assert!(stopped.try_recv().is_err(), "stopped with a request in flight");
    assert_eq!(driver.data(&read), [UNTOUCHED; 512]);
    disk.release_all();
    stopped.recv().unwrap();
    assert_eq!(driver.data(&read), [6; 512]);
    assert_eq!(driver.used(0), [(read.head, 513)]);
    stopper.join().unwrap();
}

#[test]
fn nothing_is_touched_after_stop() {
    let mut machine = Machine::new(1);
    machine.start();
    machine.assert_serves(0);
    machine.device.stop();
    let read = machine.driver.send_read(0, 1, 512);
    machine.driver.kick(0);
    // Twice around the worker's loop: a kick that it still listened to would have been heard.
    machine.handle.kept();
    machine.handle.kept();
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
    let queue = machine.device.stop_queue(0).unwrap();
    assert_eq!((queue.index, machine.driver.used(0)), (0, vec![(read.head, 513)]));
    machine.disk.let_go();
    assert!(machine.device.stop_queue(0).is_none());
    machine.assert_serves(1);
    // The ring that is off hears nothing.
    machine.driver.send_read(0, 2, 512);
    machine.driver.kick(0);
    machine.assert_serves(1);
    assert_eq!(machine.driver.used(0), []);
    machine.driver.reset_ring(0);
    machine.device.start_queue(machine.driver.active(0)).unwrap();
    machine.assert_serves(0);
    assert_eq!(machine.device.stop().len(), 2);
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
    assert_eq!(machine.device.stop().len(), 1);
    assert_eq!(machine.device.stop().len(), 0);
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
    assert!(machine.device.stop_queue(7).is_none());
    assert!(machine.device.stop_queue(0).is_none());
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
    // Nobody hangs on the dead thread.
    assert_eq!(machine.device.stop().len(), 0);
    assert!(machine.device.start_queue(machine.driver.active(0)).is_err());
}

#[test]
fn a_disk_without_an_engine_cannot_start() {
    let mut machine = Machine::new(1);
    machine.disk.refuse_engines();
    let activation = Activation {
        memory: machine.driver.memory.clone(),
        features: machine.features(),
        queues: vec![machine.driver.active(0)],
        interrupt: machine.driver.interrupt.clone(),
    };
    assert!(machine.device.start(activation).is_err());
    assert_eq!(machine.device.stop().len(), 0);
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
    machine.handle.pause();
    assert_eq!(machine.handle.io_status(), IoStatus::NoSpace);
    let kept = machine.handle.kept();
    assert_eq!(kept.iter().map(|kept| (kept.queue, kept.head)).collect::<Vec<_>>(), [(0, write.head)]);
    machine.disk.heal();
    machine.handle.resume();
    machine.driver.line.wait(1);
    assert_eq!(machine.handle.io_status(), IoStatus::Ok);
    assert_eq!(machine.driver.used(0), [(write.head, 1)]);
    assert_eq!(machine.disk.data()[5 * 512..6 * 512], [0x55; 512]);
}

#[test]
fn a_kept_request_moves_to_another_device() {
    let mut machine = Machine::with(2, |options| options.write_errors = ErrorPolicy::Stop);
    machine.start();
    machine.disk.fail(DiskError::NoSpace);
    let write = machine.driver.send_write(1, 5, &[0x55; 512]);
    machine.driver.kick(1);
    while machine.events.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    machine.handle.pause();
    let read = machine.driver.send_read(0, 1, 512);
    let kept = machine.handle.kept();
    let queues = machine.device.stop();
    let (sink, _) = recorder();
    let mut options = BlockOptions::new("vda");
    options.num_queues = 2;
    machine.disk.heal();
    machine.device = BlockDevice::new(options, Arc::clone(&machine.disk) as _, sink).unwrap();
    let handle = machine.device.handle();
    handle.pause();
    let (memory, interrupt) = (machine.driver.memory.clone(), machine.driver.interrupt.clone());
    machine.device.start(Activation { memory, features: machine.features(), queues, interrupt }).unwrap();
    assert!(kept.into_iter().all(|request| handle.keep(request)));
    // The device was paused before it started: it takes nothing, not even what waits or is kicked.
    machine.driver.kick(0);
    assert_eq!((handle.kept().len(), handle.kept().len()), (1, 1));
    assert_eq!((machine.driver.used(0), machine.driver.used(1)), (vec![], vec![]));
    handle.resume();
    machine.driver.line.wait(2);
    assert_eq!(machine.driver.used(1), [(write.head, 1)]);
    assert_eq!(machine.driver.used(0), [(read.head, 513)]);
    machine.assert_serves(1);
}

#[test]
fn the_driver_switches_the_write_cache() {
    let mut machine = Machine::new(1);
    let writeback = |machine: &Machine, features| {
        let mut byte = [9];
        machine.device.read_config(blk::Config::WRITEBACK_OFFSET, &mut byte, features);
        byte[0]
    };
    let features = machine.features();
    machine.start();
    assert_eq!(writeback(&machine, features), 1);
    let mut durable = Vec::new();
    for (step, value) in [None, Some(0), Some(1), Some(0)].into_iter().enumerate() {
        if let Some(value) = value {
            machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[value], features);
            assert_eq!(writeback(&machine, features), value);
        }
        machine.driver.send_write(0, 0, &[1; 512]);
        machine.driver.kick(0);
        machine.driver.line.wait(step as u32 + 1);
        durable.push(machine.disk.operations().pop() == Some(Operation::Write { durable: true }));
    }
    assert_eq!(durable, [false, true, false, true]);
    // The next driver finds what was configured.
    machine.reset();
    assert_eq!(writeback(&machine, features), 1);
    // Without CONFIG_WCE it is read-only; without FLUSH it is 0 (§5.2.5.2).
    machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[0], features & !blk::F_CONFIG_WCE);
    assert_eq!(writeback(&machine, features & !blk::F_CONFIG_WCE), 1);
    assert_eq!(writeback(&machine, features & !blk::F_FLUSH), 0);
}

#[test]
fn the_write_cache_may_be_switched_under_load() {
    let mut machine = Machine::new(1);
    let features = machine.features();
    machine.start();
    machine.disk.hold();
    for (count, value) in [1, 0, 1, 0].into_iter().enumerate() {
        machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[value], features);
        machine.driver.send_write(0, 10 * count as u64, &[1; 512]);
        machine.driver.kick(0);
        machine.disk.wait_held(count + 1);
    }
    let expected = [false, true, false, true].map(|durable| Operation::Write { durable });
    assert_eq!(machine.disk.operations(), expected);
    machine.disk.release(4);
    machine.driver.line.wait(1);
    machine.reset();
}

#[test]
fn only_writeback_is_writable_in_the_configuration_space() {
    let mut machine = Machine::new(1);
    let features = machine.features();
    let read = |machine: &Machine| {
        let mut bytes = [0; 80];
        machine.device.read_config(0, &mut bytes, features);
        bytes
    };
    let before = read(&machine);
    for offset in (0..80).filter(|offset| *offset != blk::Config::WRITEBACK_OFFSET).chain([u64::MAX]) {
        machine.device.write_config(offset, &[0xff], features);
    }
    machine.device.write_config(blk::Config::WRITEBACK_OFFSET, &[0, 0], features);
    assert_eq!(read(&machine), before);
    assert_eq!(before[72..], [0; 8]);
    let mut far = [7; 4];
    machine.device.read_config(u64::MAX, &mut far, features);
    assert_eq!(far, [0; 4]);
}

#[test]
fn a_resize_reaches_the_driver() {
    let mut machine = Machine::new(1);
    let capacity = |machine: &Machine| {
        let mut bytes = [0; 8];
        machine.device.read_config(0, &mut bytes, 0);
        u64::from_le_bytes(bytes)
    };
    // Before the driver is there, there is nobody to tell.
    machine.handle.resize(32 * 512).unwrap();
    assert_eq!((capacity(&machine), machine.driver.line.count()), (32, 0));
    machine.start();
    machine.handle.resize(48 * 512).unwrap();
    assert_eq!((capacity(&machine), machine.driver.line.count()), (48, 1));
    assert_eq!(machine.driver.interrupt.status(), spec::mmio::INTERRUPT_CONFIG_CHANGE);
}

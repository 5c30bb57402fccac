//! A device with its threads, between a driver and a disk that the test plays.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::TestDisk;
use super::driver::Driver;
use super::rig::recorder;
use crate::block::{BlockDevice, BlockEvent, BlockHandle, BlockOptions};
use crate::spawn::DiskThreads;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice};
use crate::virtio::drain::Drain;
use crate::virtio::spec;

fn drained(drain: &Drain, disk: &TestDisk) -> Vec<ActiveQueue> {
    while !drain.wait(Duration::from_millis(1)) {
        disk.finish_all();
    }
    drain.take_queues()
}

/// A device, its driver and its disk.
pub(super) struct Machine {
    pub(super) disk: Arc<TestDisk>,
    pub(super) device: BlockDevice,
    pub(super) handle: BlockHandle,
    pub(super) driver: Driver,
    pub(super) events: Arc<Mutex<Vec<BlockEvent>>>,
    /// EVENT_IDX is negotiated.
    pub(super) event_index: bool,
    options: BlockOptions,
    queues: u16,
}

impl Machine {
    pub(super) fn new(queues: u16) -> Self {
        Self::with(queues, |_| {})
    }

    pub(super) fn with(queues: u16, change: impl FnOnce(&mut BlockOptions)) -> Self {
        let disk = Arc::new(TestDisk::new(64));
        let (sink, events) = recorder();
        let mut options = BlockOptions::new("vda");
        options.num_queues = queues;
        change(&mut options);
        let driver = Driver::new(queues, 16);
        let (threads, shown) = (DiskThreads::default(), Arc::clone(&disk) as _);
        let device =
            BlockDevice::new(options.clone(), shown, &driver.memory, sink, &threads).unwrap();
        let handle = device.handle();
        Self { disk, device, handle, driver, events, event_index: false, options, queues }
    }

    pub(super) fn features(&self) -> u64 {
        self.device.features() & if self.event_index { u64::MAX } else { !spec::F_EVENT_IDX }
    }

    pub(super) fn start(&mut self) {
        let queues = (0..self.queues).map(|index| self.driver.active(index)).collect();
        self.start_with(queues);
    }

    fn start_with(&mut self, queues: Vec<ActiveQueue>) {
        let (memory, interrupt) = (self.driver.memory.clone(), self.driver.interrupt.clone());
        self.device
            .start(Activation { memory, features: self.features(), queues, interrupt })
            .unwrap();
    }

    /// Stops the device, while everything finishes that the disk has.
    pub(super) fn stop(&mut self) -> Vec<ActiveQueue> {
        drained(&self.device.reset(), &self.disk)
    }

    /// As in a restored machine: a new device, paused, goes on where this one, which stands still, was.
    pub(super) fn move_to_another_device(&mut self) {
        let snapshots = self.handle.queues();
        let mut queues = self.stop();
        queues.iter_mut().for_each(|queue| queue.restored = true);
        let (sink, events) = recorder();
        let (disk, threads) = (Arc::clone(&self.disk) as _, DiskThreads::default());
        let memory = &self.driver.memory;
        self.device = BlockDevice::new(self.options.clone(), disk, memory, sink, &threads).unwrap();
        (self.handle, self.events) = (self.device.handle(), events);
        assert!(self.handle.pause().wait(Duration::from_secs(60)));
        self.start_with(queues);
        assert!(snapshots.into_iter().all(|snapshot| self.handle.restore_queue(snapshot)));
    }

    pub(super) fn reset_queue(&mut self, index: u16) -> Vec<ActiveQueue> {
        drained(&self.device.reset_queue(index), &self.disk)
    }

    /// A driver's reset: the device stops, the rings start over.
    pub(super) fn reset(&mut self) {
        assert_eq!(self.stop().len(), usize::from(self.queues));
        self.driver.interrupt.reset();
        (0..self.queues).for_each(|ring| self.driver.reset_ring(ring.into()));
    }

    /// Reads sector 1 through `ring` and waits for the answer.
    pub(super) fn assert_serves(&mut self, ring: u16) {
        let interrupts = self.driver.line.count();
        let sent = self.driver.send_read(ring.into(), 1, 512);
        self.driver.kick(ring.into());
        self.driver.line.wait(interrupts + 1);
        assert_eq!(self.driver.used(ring.into()), [(sent.head, 513)]);
        assert_eq!(self.driver.data(&sent), [1; 512]);
    }

    /// Waits for answers in `ring`, whether there is an interrupt or not.
    pub(super) fn answers(&mut self, ring: usize) -> Vec<(u16, u32)> {
        loop {
            match self.driver.used(ring) {
                none if none.is_empty() => std::thread::yield_now(),
                answers => return answers,
            }
        }
    }

    pub(super) fn threads(&self) -> Vec<String> {
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

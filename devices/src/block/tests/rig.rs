//! A worker without its thread, between a driver and a disk that the test plays: everything happens when the test says.

use crate::clock::Instant;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::TestDisk;
use super::driver::{Buffer, Driver, MEMORY, Sent};
use crate::block::device::share;
use crate::block::shared::DiskShared;
use crate::block::throttle_group::Throttle;
use crate::block::throttle_queue::ThrottleQueue;
use crate::block::worker::{Negotiated, Worker};
use crate::block::{BlockEvent, BlockOptions, BlockStats, EventSink, Throttling};
use crate::disk::EngineSetup;
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::{Drain, Party};
use crate::virtio::spec::{self, blk};

pub(super) struct Setup {
    pub(super) disk: TestDisk,
    pub(super) options: BlockOptions,
    /// Of the features offered, those that the driver accepts.
    pub(super) accepted: u64,
    pub(super) queues: u16,
    /// The size that the driver gives its rings.
    pub(super) ring_size: u16,
    /// Bytes of guest memory.
    pub(super) memory: u64,
}

pub(super) struct Rig {
    pub(super) disk: Arc<TestDisk>,
    pub(super) driver: Driver,
    worker: Worker,
    shared: Arc<DiskShared>,
    throttle: Arc<Throttle>,
    events: Arc<Mutex<Vec<BlockEvent>>>,
    features: u64,
    queues: u16,
}

impl Rig {
    /// 64 sectors, one ring of 64 descriptors, all features but EVENT_IDX.
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(super) fn with(change: impl FnOnce(&mut Setup)) -> Self {
        let mut setup = Setup {
            disk: TestDisk::new(64),
            options: BlockOptions::new("vda"),
            accepted: !spec::F_EVENT_IDX,
            queues: 1,
            ring_size: 64,
            memory: MEMORY,
        };
        change(&mut setup);
        let Setup { disk, options, accepted, queues, ring_size, memory } = setup;
        let disk = Arc::new(disk);
        let (sink, events) = recorder();
        let throttle = Arc::new(Throttle::new(&options.throttling, &options.name, Instant::now()));
        let shared = share(options, Arc::clone(&disk) as _, sink, 1).unwrap();
        let features = shared.config_space.features & accepted;
        let driver = Driver::with_memory(queues, ring_size, memory);
        let (memory, positions) = (driver.memory.clone(), usize::from(queues));
        let engine = EngineSetup::new(memory.clone(), shared.depth(positions));
        let engine = Arc::clone(&shared.disk).engine(engine).unwrap();
        let limiter = Box::new(ThrottleQueue::new(Arc::clone(&throttle)).unwrap());
        let worker = Worker::new(&shared, 0, positions, memory, limiter, engine);
        let mut rig = Self { disk, driver, worker, shared, throttle, events, features, queues };
        rig.start();
        rig
    }

    fn start(&mut self) {
        let interrupt = self.driver.interrupt.clone();
        self.worker.start(Negotiated { features: self.features, interrupt });
        for queue in 0..self.queues {
            self.worker.add_queue(usize::from(queue), self.driver.active(queue));
        }
    }

    /// The driver resets the device and starts over, with fresh rings.
    pub(super) fn reset(&mut self) {
        self.stop();
        self.driver.interrupt.reset();
        (0..self.queues).for_each(|ring| self.driver.reset_ring(ring.into()));
        self.start();
    }

    /// Resets the device, and lets everything finish that the disk has.
    fn stop(&mut self) {
        let drain = Drain::new(1);
        self.worker.reset(Party(drain.clone()));
        self.finish(&drain);
    }

    fn finish(&mut self, drain: &Drain) {
        loop {
            self.worker.advance_resets();
            if drain.is_done() {
                return;
            }
            self.disk.finish_all();
            self.worker.continue_requests();
        }
    }

    pub(super) fn worker(&mut self) -> &mut Worker {
        &mut self.worker
    }

    /// How long from `now` until the worker's limiter lets a request start. `None`: none waits.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        self.worker.limiter().downcast_ref::<ThrottleQueue>().unwrap().next_release(now)
    }

    pub(super) fn serve(&mut self) {
        self.worker().serve(0);
    }

    /// Pauses, and lets everything finish that the disk has.
    pub(super) fn pause(&mut self) {
        self.worker.pause();
        while !self.worker.stands_still() {
            self.disk.finish_all();
            self.worker.continue_requests();
        }
    }

    /// Resets one queue, and lets everything finish that the disk has.
    pub(super) fn remove_queue(&mut self, position: usize) -> Option<ActiveQueue> {
        let drain = Drain::new(1);
        self.worker.reset_queue(position, Party(drain.clone()));
        self.finish(&drain);
        drain.take_queues().pop()
    }

    /// The heads of the requests that were taken and not answered.
    pub(super) fn stopped(&mut self) -> Vec<u16> {
        self.worker().snapshot().into_iter().flat_map(|queue| queue.stopped).collect()
    }

    pub(super) fn set_throttling(&self, throttling: Throttling) {
        self.set_throttling_at(throttling, Instant::now());
    }

    pub(super) fn set_throttling_at(&self, throttling: Throttling, now: Instant) {
        self.throttle.set(throttling, "vda", now);
    }

    /// Makes this disk share the limits of `other`.
    pub(super) fn join(&self, other: &Self) {
        self.throttle.join(&other.throttle);
    }

    /// Lets the oldest `count` transfers that the disk holds finish.
    pub(super) fn release(&mut self, count: usize) {
        self.disk.release(count);
        self.worker().continue_requests();
    }

    pub(super) fn stats(&self) -> BlockStats {
        self.shared.stats()
    }

    pub(super) fn shared(&self) -> &DiskShared {
        &self.shared
    }

    /// The events since the last call.
    pub(super) fn events(&self) -> Vec<BlockEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Puts the buffers on the ring as one chain and serves it. The last one must end in the status byte.
    pub(super) fn run(&mut self, buffers: &[Buffer]) -> Outcome {
        let head = self.driver.chain(0, buffers);
        self.driver.publish(0, head);
        let last = buffers[buffers.len() - 1];
        let status = last.address + u64::from(last.length) - 1;
        self.outcome(&Sent { head, data: 0..0, status })
    }

    /// Sends a request of this type, serves it, and says how it went.
    pub(super) fn request(
        &mut self,
        request_type: u32,
        sector: u64,
        data: Option<Buffer>,
    ) -> Outcome {
        let sent = self.driver.send(0, request_type, sector, data);
        self.outcome(&sent)
    }

    /// Serves the one request that waits. It must be answered at once, with an interrupt.
    pub(super) fn outcome(&mut self, sent: &Sent) -> Outcome {
        let interrupts = self.driver.line.count();
        self.serve();
        let used = self.driver.used(0);
        let [(head, length)] = used[..] else { panic!("not answered exactly once: {used:?}") };
        assert_eq!(head, sent.head);
        assert_eq!(self.driver.line.count(), interrupts + 1);
        assert_eq!(self.driver.interrupt.status(), spec::mmio::INTERRUPT_USED_BUFFER);
        self.driver.interrupt.acknowledge(spec::mmio::INTERRUPT_USED_BUFFER);
        Outcome { status: self.driver.status(sent), length }
    }

    /// The device still does what it should.
    pub(super) fn assert_alive(&mut self) {
        let sent = self.driver.send_read(0, 1, 512);
        assert_eq!(self.outcome(&sent), Outcome::ok(512));
        assert_eq!(self.driver.interrupt.needs_reset(), 0);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A test may end with requests stopped or held.
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

/// An event sink and what it received.
pub(super) fn recorder() -> (EventSink, Arc<Mutex<Vec<BlockEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    (Arc::new(move |event| sink.lock().unwrap().push(event)), events)
}

/// How a request ended: its status byte and used length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) status: u8,
    pub(super) length: u32,
}

impl Outcome {
    /// Success, with `data` bytes before the status.
    pub(super) fn ok(data: u32) -> Self {
        Self { status: blk::S_OK, length: data + 1 }
    }

    pub(super) const IOERR: Self = Self { status: blk::S_IOERR, length: 1 };
    pub(super) const UNSUPP: Self = Self { status: blk::S_UNSUPP, length: 1 };
}

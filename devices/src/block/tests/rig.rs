//! A worker without its thread, between a driver and a disk that the test plays: everything happens when the test says.

use crate::clock::Instant;
use std::sync::{Arc, Mutex};

use super::disk::TestDisk;
use super::driver::{Buffer, Driver, MEMORY, Sent};
use crate::block::device::request_types;
use crate::block::shared::Shared;
use crate::block::throttle_group::Throttle;
use crate::block::worker::{Negotiated, Worker};
use crate::block::{BlockEvent, BlockOptions, BlockStats, EventSink, Throttling};
use crate::disk::EngineSetup;
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::Drain;
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
    /// `None` only while the device is reset.
    worker: Option<Worker>,
    shared: Arc<Shared>,
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
        let commands = request_types(&options, &*disk);
        let sizes = options.check(&disk.limits).unwrap();
        let limiter = Arc::clone(&throttle);
        let geometry = crate::block::geometry::rule(None, &*disk);
        let shared = Shared::new(
            options,
            &sizes,
            Arc::clone(&disk) as _,
            sink,
            1,
            limiter,
            commands,
            geometry,
        );
        let features = shared.config_space.features & accepted;
        let driver = Driver::with_memory(queues, ring_size, memory);
        let worker = Some(start(&shared, &driver, features, queues));
        Self { disk, driver, worker, shared, throttle, events, features, queues }
    }

    /// The driver resets the device and starts over, with fresh rings.
    pub(super) fn reset(&mut self) {
        end(self.worker.take().unwrap(), &self.disk);
        self.driver.interrupt.reset();
        (0..self.queues).for_each(|ring| self.driver.reset_ring(ring.into()));
        self.worker = Some(start(&self.shared, &self.driver, self.features, self.queues));
    }

    pub(super) fn worker(&mut self) -> &mut Worker {
        self.worker.as_mut().unwrap()
    }

    pub(super) fn serve(&mut self) {
        self.worker().serve(0);
    }

    /// Pauses, and lets everything finish that the disk has.
    pub(super) fn pause(&mut self) {
        let worker = self.worker.as_mut().unwrap();
        worker.pause();
        while !worker.stands_still() {
            self.disk.finish_all();
            worker.reap();
        }
    }

    /// Resets one queue, and lets everything finish that the disk has.
    pub(super) fn remove_queue(&mut self, position: usize) -> Option<ActiveQueue> {
        let drain = Drain::new(1);
        let worker = self.worker.as_mut().unwrap();
        worker.remove_queue(position, drain.clone());
        loop {
            worker.advance_resets();
            if drain.is_done() {
                return drain.take_queues().pop();
            }
            self.disk.finish_all();
            worker.reap();
        }
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

    /// Has this disk share the limits of `other`.
    pub(super) fn join(&self, other: &Self) {
        self.throttle.join(&other.throttle);
    }

    /// Lets the oldest `count` transfers that the disk holds finish.
    pub(super) fn release(&mut self, count: usize) {
        self.disk.release(count);
        self.worker().reap();
    }

    pub(super) fn stats(&self) -> BlockStats {
        self.shared.stats()
    }

    pub(super) fn shared(&self) -> &Shared {
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
        if let Some(worker) = self.worker.take()
            && !std::thread::panicking()
        {
            end(worker, &self.disk);
        }
    }
}

fn start(shared: &Arc<Shared>, driver: &Driver, features: u64, queues: u16) -> Worker {
    let negotiated =
        Negotiated { memory: driver.memory.clone(), features, interrupt: driver.interrupt.clone() };
    let setup = EngineSetup::new(driver.memory.clone(), shared.depth(usize::from(queues)));
    let engine = Arc::clone(&shared.disk).engine(setup).unwrap();
    let mut worker = Worker::new(
        Arc::clone(shared),
        Arc::clone(&shared.counters[0]),
        negotiated,
        usize::from(queues),
        false,
        engine,
    );
    (0..queues)
        .for_each(|queue| worker.add_queue(usize::from(queue), driver.active(queue)).unwrap());
    worker
}

/// Stops the worker, while everything finishes that the disk has.
fn end(mut worker: Worker, disk: &TestDisk) {
    let drain = Drain::new(1);
    worker.reset(drain.clone());
    while !worker.advance_resets() {
        disk.finish_all();
        worker.reap();
    }
    worker.finish();
    assert!(drain.is_done());
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

//! What the transport calls ([`BlockDevice`]), and what the VM calls ([`BlockHandle`]).
//!
//! Both only send commands to the worker threads, and read what they share with them. Nothing here waits for the host's disk: a reset and
//! a pause return a [`Drain`], and a question to a worker has a time limit. This file also plugs the limits, the error policies, the
//! other request types and the geometry into the device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::EventOps;
use virtio_queue::QueueT;

use super::config_space::ConfigSpace;
use super::error_policy::ErrorPolicies;
use super::events::EventSink;
use super::geometry;
use super::options::{BlockError, BlockOptions};
use super::request::RequestTypes;
use super::request::identity::Identity;
use super::request::segments::Segments;
use super::scsi::ScsiCommands;
use super::shared::{DiskShared, LogLimits, NO_THRESHOLD};
use super::stats::IoStatus;
use super::throttle_group::Throttle;
use super::throttle_queue::ThrottleQueue;
use super::worker::Negotiated;
use super::worker_thread::{Loop, WorkerThread};
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::Disk;
use crate::lock;
use crate::spawn::DiskThreads;
use crate::virtio::device::{Activation, ActiveQueue, RingIndices, VirtioDevice};
use crate::virtio::drain::{Drain, Party};
use crate::virtio::spec::{self, blk, names};

/// The longest that dropping a device waits for the host. Before that, the machine has stopped its devices with a deadline of
/// its own.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// A virtio-blk device: a [`VirtioDevice`] over a [`Disk`], with its own worker threads, which live as long as the device. Dropping it
/// resets it, waits for what is in flight, and joins the threads.
pub struct BlockDevice {
    handle: BlockHandle,
    queue_sizes: Vec<u16>,
}

impl BlockDevice {
    /// Makes the device, its engines and its threads, named `disk-NAME-0` and so on: one for each queue, at most one for each
    /// host CPU. No thread and no engine is made later, whatever the guest does.
    ///
    /// # Errors
    /// When an option does not work on this disk, or the host gives no thread or no engine.
    pub fn new(
        options: BlockOptions,
        disk: Arc<dyn Disk>,
        memory: &GuestMemory,
        events: EventSink,
        threads: &DiskThreads,
    ) -> Result<Self, BlockError> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let count = usize::from(options.num_queues).clamp(1, cpus);
        let throttle = Arc::new(Throttle::new(&options.throttling, &options.name, Instant::now()));
        let shared = share(options, disk, events, count)?;
        let workers: Result<Arc<[_]>, _> = (0..count)
            .map(|number| {
                // The number of queues that `place` gives to this thread.
                let positions = (usize::from(shared.options.num_queues) - number).div_ceil(count);
                let limiter = || Ok(Box::new(ThrottleQueue::new(Arc::clone(&throttle))?) as _);
                WorkerThread::spawn(&shared, number, positions, memory, threads, limiter)
            })
            .collect();
        let queue_sizes = vec![shared.options.queue_size; usize::from(shared.options.num_queues)];
        let handle =
            BlockHandle { shared, throttle, workers: workers?, negotiated: Arc::default() };
        Ok(Self { handle, queue_sizes })
    }

    /// The VM's handle. It stays valid when the device is gone.
    pub fn handle(&self) -> BlockHandle {
        self.handle.clone()
    }
}

/// Plugs the capabilities of a disk with `workers` threads into what the threads share.
pub(super) fn share(
    options: BlockOptions,
    disk: Arc<dyn Disk>,
    events: EventSink,
    workers: usize,
) -> Result<Arc<DiskShared>, BlockError> {
    let sizes = options.check(&disk.info().block_limits)?;
    let request_types = request_types(&options, &*disk);
    let geometry = Box::new(geometry::rule(options.geometry, &*disk));
    Ok(Arc::new(DiskShared {
        config_space: ConfigSpace::new(&options, &sizes, &*disk, geometry, &request_types),
        writeback: AtomicBool::new(options.write_cache),
        write_threshold: AtomicU64::new(NO_THRESHOLD),
        counters: (0..workers).map(|_| Arc::default()).collect(),
        request_types,
        host_errors: Box::new(ErrorPolicies::new(
            options.name.clone(),
            options.read_errors,
            options.write_errors,
            Arc::clone(&events),
        )),
        log_limits: LogLimits::default(),
        options,
        disk,
        events,
    }))
}

/// The request types that a disk serves beside reads, writes and flushes.
pub(super) fn request_types(options: &BlockOptions, disk: &dyn Disk) -> Vec<Box<dyn RequestTypes>> {
    let identity = Identity::new(options.serial.as_deref(), disk.info().lifetime);
    let scsi = ScsiCommands { enabled: disk.info().scsi };
    vec![Box::new(Segments), Box::new(identity), Box::new(scsi)]
}

/// The thread that serves queue `index`, and the queue's position there.
pub(super) fn place(workers: &[WorkerThread], index: u16) -> (&WorkerThread, usize) {
    let (index, count) = (usize::from(index), workers.len());
    (&workers[index % count], index / count)
}

/// Sends `command` to each of `workers`, with its party in the drain that is returned. A command may take as long as the host does.
fn send_with_party(
    workers: &[WorkerThread],
    command: impl Fn(&mut Loop, Party, &mut EventOps<'_>) + Copy + Send + 'static,
) -> Drain {
    let drain = Drain::new(workers.len());
    for worker in workers {
        let party = Party(drain.clone());
        // A thread that is gone touches nothing, and its party is dropped here.
        let _ = worker.send(move |thread, ops| command(thread, party, ops));
    }
    drain
}

impl VirtioDevice for BlockDevice {
    fn device_id(&self) -> u32 {
        spec::DEVICE_ID_BLOCK
    }

    fn name(&self) -> String {
        format!("disk {}", self.handle.name())
    }

    fn features(&self) -> u64 {
        self.handle.shared.config_space.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8], features: u64) {
        self.handle.shared.read_config(offset, data, features);
    }

    fn write_config(&mut self, offset: u64, data: &[u8], features: u64) {
        // `writeback` is the only field that the driver may write, if CONFIG_WCE was negotiated.
        if offset == blk::Config::WRITEBACK_OFFSET
            && features & blk::F_CONFIG_WCE != 0
            && let [value] = data
        {
            tracing::debug!(disk = self.handle.name(), value, "the driver sets the write cache");
            self.handle.shared.set_writeback(Some(*value != 0));
        }
    }

    fn restore_config(&mut self, config: &[u8]) {
        let writeback = config.get(blk::Config::WRITEBACK_OFFSET as usize);
        self.handle.shared.set_writeback(Some(writeback.is_some_and(|value| *value != 0)));
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { features, queues, interrupt, .. } = activation;
        let names = names::features(features);
        tracing::debug!("disk {}: its driver took {names}", self.handle.name());
        let negotiated = Negotiated { features, interrupt };
        *lock(&self.handle.negotiated) = Some(negotiated.clone());
        for worker in &*self.handle.workers {
            let negotiated = negotiated.clone();
            worker.send(|thread, _| thread.worker.start(negotiated))?;
        }
        queues.into_iter().try_for_each(|queue| self.start_queue(queue))
    }

    fn reset(&mut self) -> Drain {
        let drain = send_with_party(&self.handle.workers, Loop::reset);
        *lock(&self.handle.negotiated) = None;
        // For the next driver the cache is as configured, whatever this driver has set.
        self.handle.shared.set_writeback(None);
        drain
    }

    fn ring_indices(&self) -> Vec<RingIndices> {
        let indices = self.handle.queues().into_iter().map(|queue| RingIndices {
            queue: queue.queue,
            next_available: queue.next_avail,
            next_used: queue.next_used,
        });
        indices.collect()
    }

    fn reset_queue(&mut self, index: u16) -> Drain {
        let (worker, position) = place(&self.handle.workers, index);
        let reset = move |thread: &mut Loop, party, ops: &mut EventOps<'_>| {
            thread.reset_queue(position, party, ops);
        };
        send_with_party(std::slice::from_ref(worker), reset)
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()> {
        // Checked here, because the worker may be waiting for the host and could not answer.
        let max = self.queue_sizes.get(usize::from(queue.index));
        if max.is_none_or(|max| queue.queue.size() > *max) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (worker, position) = place(&self.handle.workers, queue.index);
        worker.send(move |thread, ops| thread.add_queue(position, queue, ops))
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        if self.reset().wait(DROP_TIMEOUT) {
            self.handle.workers.iter().for_each(WorkerThread::join);
        } else {
            // The threads still keep guest memory mapped. They end with the process.
            let disk = self.handle.name();
            tracing::error!("disk {disk}: the host does not answer; check the storage behind it");
        }
    }
}

/// What the VM calls while the transport owns the device. `operator` adds queries and limits, and `worker::state` adds methods
/// that save and restore the queues.
#[derive(Clone)]
pub struct BlockHandle {
    pub(super) shared: Arc<DiskShared>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) workers: Arc<[WorkerThread]>,
    /// With the driver, from DRIVER_OK to the reset.
    negotiated: Arc<Mutex<Option<Negotiated>>>,
}

impl BlockHandle {
    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.shared.options.name
    }

    /// Whether a driver in the guest has started the disk.
    pub fn has_driver(&self) -> bool {
        lock(&self.negotiated).is_some()
    }

    /// Whether an error stopped the VM.
    pub fn io_status(&self) -> IoStatus {
        self.shared.host_errors.io_status()
    }

    /// Pauses the disk: the workers take no more requests. The drain is done when nothing of the disk is with the host any more. From
    /// then on the disk's threads do not touch guest memory until `resume`, with one exception: a reset during the pause answers large
    /// requests whose next piece has not been submitted.
    ///
    /// If the host does not answer, the drain is never done. `resume` finishes it in any case.
    ///
    /// This is no method of [`VirtioDevice`], because the caller would need the transport's lock. A vCPU holds that lock while it starts
    /// or configures the disk, and the main thread must not wait for the vCPU.
    pub fn pause(&self) -> Drain {
        send_with_party(&self.workers, |thread, party, _| thread.pause(party))
    }

    /// Ends a pause, and clears the I/O status. Each worker begins its stopped requests again, in order, and then serves its
    /// queues.
    pub fn resume(&self) {
        self.shared.host_errors.clear();
        for worker in &*self.workers {
            // A thread that is gone has reported that.
            let _ = worker.send(|thread, _| thread.resume());
        }
    }

    /// Tells the driver that the disk's size has changed (virtio 1.2 §5.2.6.2).
    pub fn capacity_changed(&self) {
        if let Some(Negotiated { interrupt, features }) = &*lock(&self.negotiated) {
            interrupt.show_config(|data| self.shared.read_config(0, data, *features));
            interrupt.config_changed();
        }
    }
}

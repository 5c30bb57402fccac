//! The transport's view of the disk, and the VM's.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::config::Facts;
use super::events::{BlockEvent, EventSink};
use super::histogram::Histogram;
use super::options::{BlockError, BlockOptions};
use super::policy::KeptRequest;
use super::stats::{BlockStats, Counters, IoStatus, Kind};
use super::thread::{Command, WorkerThread};
use super::throttle::{Throttle, Throttling};
use super::worker::Agreement;
use crate::disk::Disk;
use crate::irq::Interrupt;
use crate::log_limit::LogLimit;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice};
use crate::virtio::spec::{self, blk};

/// Stands for no write threshold.
const NO_THRESHOLD: u64 = u64::MAX;

/// What all of a disk's threads share.
pub(super) struct Shared {
    pub(super) options: BlockOptions,
    pub(super) facts: Facts,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) events: EventSink,
    /// The `writeback` field: what the driver chose, or the initial value.
    writeback: AtomicBool,
    io_status: AtomicU8,
    /// The operator wants to hear of a change past this offset, in bytes. Nothing ever reaches past `NO_THRESHOLD`.
    write_threshold: AtomicU64,
    counters: Vec<Arc<Counters>>,
    pub(super) throttle: Throttle,
    /// The throttle has something to say.
    limited: AtomicBool,
    pub(super) limits: LogLimits,
}

/// One limit for each message that a guest can provoke, so that none hides another.
#[derive(Default)]
pub(super) struct LogLimits {
    pub(super) bad_request: LogLimit,
    pub(super) no_status: LogLimit,
    pub(super) broken_ring: LogLimit,
    pub(super) host_error: LogLimit,
}

impl Shared {
    /// Checks the options and lays out the device for `workers` threads.
    pub(super) fn new(
        options: BlockOptions,
        disk: Arc<dyn Disk>,
        events: EventSink,
        workers: usize,
    ) -> Result<Arc<Self>, BlockError> {
        let sizes = options.check(&disk.limits())?;
        options.throttling.check().map_err(BlockError::Throttling)?;
        Ok(Arc::new(Self {
            facts: Facts::new(&options, &sizes, &*disk),
            writeback: AtomicBool::new(options.write_cache),
            io_status: AtomicU8::new(IoStatus::Ok as u8),
            write_threshold: AtomicU64::new(NO_THRESHOLD),
            throttle: Throttle::new(options.throttling, Instant::now()),
            limited: AtomicBool::new(!options.throttling.is_off()),
            options,
            disk,
            events,
            counters: (0..workers).map(|_| Arc::default()).collect(),
            limits: LogLimits::default(),
        }))
    }

    /// The counters of worker `number`.
    pub(super) fn counters(&self, number: usize) -> Arc<Counters> {
        Arc::clone(&self.counters[number])
    }

    /// The accounts of all workers.
    pub(super) fn stats(&self) -> BlockStats {
        let mut stats = BlockStats::default();
        self.counters.iter().for_each(|counters| counters.add_to(&mut stats));
        stats
    }

    /// Some limit is set.
    pub(super) fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Other limits from now on. The workers have yet to hear of it.
    pub(super) fn set_throttling(&self, throttling: Throttling) {
        self.throttle.set(throttling, Instant::now());
        self.limited.store(!throttling.is_off(), Ordering::Relaxed);
    }

    /// Whether completed writes may be volatile. Without FLUSH the driver cannot make them durable, so they always are
    /// (virtio 1.2 §5.2.5.2, §5.2.6.2).
    pub(super) fn writeback(&self, features: u64) -> bool {
        features & blk::F_FLUSH != 0 && self.writeback.load(Ordering::Acquire)
    }

    /// The configuration space from `offset` on, with zeroes behind it.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8], features: u64) {
        let config = self.facts.config(self.disk.capacity(), self.writeback(features));
        let bytes = config.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    /// The answer to GET_ID: the serial number, padded with NUL (virtio 1.2 §5.2.6).
    pub(super) fn id(&self) -> [u8; blk::ID_SIZE] {
        let mut id = [0; blk::ID_SIZE];
        let serial = self.options.serial.as_deref().unwrap_or_default().as_bytes();
        id.iter_mut().zip(serial).for_each(|(id, byte)| *id = *byte);
        id
    }

    /// The answer to GET_LIFETIME; what the host does not tell is 0 (virtio 1.2 §5.2.6).
    pub(super) fn lifetime(&self) -> blk::Lifetime {
        self.disk.lifetime().map_or(blk::Lifetime::default(), |lifetime| blk::Lifetime {
            pre_eol_info: lifetime.pre_eol_info,
            estimate_type_a: lifetime.device_lifetime_est_typ_a,
            estimate_type_b: lifetime.device_lifetime_est_typ_b,
        })
    }

    pub(super) fn io_status(&self) -> IoStatus {
        match self.io_status.load(Ordering::Relaxed) {
            status if status == IoStatus::Failed as u8 => IoStatus::Failed,
            status if status == IoStatus::NoSpace as u8 => IoStatus::NoSpace,
            _ => IoStatus::Ok,
        }
    }

    pub(super) fn set_io_status(&self, status: IoStatus) {
        self.io_status.store(status as u8, Ordering::Relaxed);
    }

    pub(super) fn write_threshold(&self) -> Option<u64> {
        Some(self.write_threshold.load(Ordering::Relaxed)).filter(|offset| *offset != NO_THRESHOLD)
    }

    pub(super) fn set_write_threshold(&self, offset: Option<u64>) {
        self.write_threshold.store(offset.unwrap_or(NO_THRESHOLD), Ordering::Relaxed);
    }

    /// A request changes the disk up to `end`. Tells the operator if that is what they wait for, once.
    pub(super) fn changes_up_to(&self, end: u64) {
        let threshold = self.write_threshold.load(Ordering::Relaxed);
        if end <= threshold {
            return;
        }
        let relaxed = Ordering::Relaxed;
        // Of several workers one is the first.
        if self.write_threshold.compare_exchange(threshold, NO_THRESHOLD, relaxed, relaxed).is_ok() {
            let (device, exceeded) = (self.options.name.clone(), end - threshold);
            (self.events)(BlockEvent::WriteThreshold { device, threshold, exceeded });
        }
    }
}

/// A virtio-blk device: a [`VirtioDevice`] over a [`Disk`], with its own worker threads.
///
/// The threads live as long as the device, so that they exist before the process confines itself. Dropping the device
/// stops it (draining what is in flight) and joins them.
pub struct BlockDevice {
    shared: Arc<Shared>,
    workers: Arc<[WorkerThread]>,
    queue_sizes: Vec<u16>,
    running: Arc<Mutex<Option<Running>>>,
}

/// What the running incarnation is told of configuration changes by.
struct Running {
    interrupt: Interrupt,
    features: u64,
}

impl BlockDevice {
    /// Makes the device and its threads, named `disk-NAME-0` and so on: one a queue, at most one a host CPU.
    ///
    /// # Errors
    /// When an option does not work on this disk, or the host gives no thread.
    pub fn new(options: BlockOptions, disk: Arc<dyn Disk>, events: EventSink) -> Result<Self, BlockError> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let count = usize::from(options.num_queues).clamp(1, cpus);
        let shared = Shared::new(options, disk, events, count)?;
        let workers: Result<Arc<[_]>, _> = (0..count)
            .map(|number| {
                // As `place` deals them out.
                let positions = (usize::from(shared.options.num_queues) - number).div_ceil(count);
                WorkerThread::spawn(&shared, shared.counters(number), number, positions)
            })
            .collect();
        let queue_sizes = vec![shared.options.queue_size; usize::from(shared.options.num_queues)];
        Ok(Self { workers: workers?, shared, queue_sizes, running: Arc::default() })
    }

    /// The VM's handle, valid as long as anyone holds it.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle {
            shared: Arc::clone(&self.shared),
            workers: Arc::clone(&self.workers),
            running: Arc::clone(&self.running),
        }
    }
}

/// The thread that serves queue `index`, and the queue's position there.
fn place(workers: &[WorkerThread], index: u16) -> (&WorkerThread, usize) {
    let (index, count) = (usize::from(index), workers.len());
    (&workers[index % count], index / count)
}

impl VirtioDevice for BlockDevice {
    fn device_id(&self) -> u32 {
        spec::DEVICE_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.shared.facts.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8], features: u64) {
        self.shared.read_config(offset, data, features);
    }

    fn write_config(&mut self, offset: u64, data: &[u8], features: u64) {
        // `writeback` is the one field that the driver may write, once it agreed to.
        if offset == blk::Config::WRITEBACK_OFFSET
            && features & blk::F_CONFIG_WCE != 0
            && let [value] = data
        {
            tracing::debug!(disk = self.shared.options.name, value, "the driver sets the write cache");
            self.shared.writeback.store(*value != 0, Ordering::Release);
        }
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        *lock(&self.running) = Some(Running { interrupt: interrupt.clone(), features });
        for worker in &*self.workers {
            let agreement = Agreement { memory: memory.clone(), features, interrupt: interrupt.clone() };
            worker.ask(|reply| Command::Start { agreement, reply }).ok_or_else(gone)??;
        }
        queues.into_iter().try_for_each(|queue| self.start_queue(queue))
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let mut queues: Vec<_> =
            self.workers.iter().filter_map(|worker| worker.ask(|reply| Command::Stop { reply })).flatten().collect();
        queues.sort_by_key(|queue| queue.index);
        *lock(&self.running) = None;
        // The next driver finds the cache as configured, not as the last one left it.
        self.shared.writeback.store(self.shared.options.write_cache, Ordering::Release);
        queues
    }

    fn stop_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        let (worker, position) = place(&self.workers, index);
        worker.ask(|reply| Command::RemoveQueue { position, reply }).flatten()
    }

    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()> {
        let (worker, position) = place(&self.workers, queue.index);
        worker.ask(|reply| Command::AddQueue { position, queue, reply }).ok_or_else(gone)?
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        self.workers.iter().for_each(WorkerThread::join);
    }
}

/// The VM's way to a disk while the transport owns the device: queries, and what an operator may do to it.
#[derive(Clone)]
pub struct BlockHandle {
    shared: Arc<Shared>,
    workers: Arc<[WorkerThread]>,
    running: Arc<Mutex<Option<Running>>>,
}

impl BlockHandle {
    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.shared.options.name
    }

    /// The accounts so far.
    pub fn stats(&self) -> BlockStats {
        self.shared.stats()
    }

    /// The latencies of reads, writes or flushes, where `set_histogram` asked for them.
    pub fn histogram(&self, kind: Kind) -> Option<Histogram> {
        let mut histograms = self.shared.counters.iter().map(|counters| counters.histogram(kind));
        let first = histograms.next()??;
        Some(histograms.flatten().fold(first, |mut sum, histogram| {
            sum.add(&histogram);
            sum
        }))
    }

    /// Counts the latencies of one kind of request into these bins from now on, or into none.
    pub fn set_histogram(&self, kind: Kind, histogram: Option<&Histogram>) {
        self.shared.counters.iter().for_each(|counters| counters.set_histogram(kind, histogram.cloned()));
    }

    /// The limits.
    pub fn throttling(&self) -> Throttling {
        self.shared.throttle.options()
    }

    /// Other limits from now on, also for the requests that wait for the present ones.
    ///
    /// # Errors
    /// What does not go together; nothing has changed then.
    pub fn set_throttling(&self, throttling: Throttling) -> Result<(), String> {
        throttling.check()?;
        self.shared.set_throttling(throttling);
        self.workers.iter().for_each(|worker| worker.send(Command::Release));
        Ok(())
    }

    /// The offset past which a change is reported, in bytes.
    pub fn write_threshold(&self) -> Option<u64> {
        self.shared.write_threshold()
    }

    /// Reports the next change past `offset`, and that alone ([`BlockEvent::WriteThreshold`]); `None`: no more.
    pub fn set_write_threshold(&self, offset: Option<u64>) {
        self.shared.set_write_threshold(offset);
    }

    /// Whether an error stopped the VM.
    pub fn io_status(&self) -> IoStatus {
        self.shared.io_status()
    }

    /// Whether completed writes may be volatile: as configured, or as the driver chose.
    pub fn write_cache(&self) -> bool {
        self.shared.writeback.load(Ordering::Relaxed)
    }

    /// The VM pauses: answers what is in flight and takes nothing more from the rings. On return the disk's threads
    /// leave guest memory alone until `resume`, also after a reset or a restore.
    pub fn pause(&self) {
        self.workers.iter().for_each(|worker| worker.ask(|reply| Command::Pause { reply }).unwrap_or_default());
    }

    /// The VM goes on: clears the I/O status, retries what the error policy kept, in order, and serves the rings again.
    pub fn resume(&self) {
        self.shared.set_io_status(IoStatus::Ok);
        self.workers.iter().for_each(|worker| worker.send(Command::Resume));
    }

    /// The requests that the error policy keeps, for a snapshot of a paused VM. `resume` retries them here.
    pub fn kept(&self) -> Vec<KeptRequest> {
        self.workers.iter().filter_map(|worker| worker.ask(|reply| Command::Kept { reply })).flatten().collect()
    }

    /// Takes over a request from a snapshot: after the transport started the restored device, before `resume`. `false`
    /// when that device has no such queue or descriptor.
    pub fn keep(&self, request: KeptRequest) -> bool {
        let (worker, position) = place(&self.workers, request.queue);
        worker.ask(|reply| Command::Keep { position, head: request.head, reply }).unwrap_or(false)
    }

    /// Makes the disk `bytes` long and tells the driver.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize(&self, bytes: u64) -> io::Result<()> {
        self.shared.disk.resize(bytes)?;
        self.capacity_changed();
        Ok(())
    }

    /// The disk's size changed: tells the driver (virtio 1.2 §5.2.6.2).
    pub fn capacity_changed(&self) {
        if let Some(Running { interrupt, features }) = &*lock(&self.running) {
            interrupt.show_config(|data| self.shared.read_config(0, data, *features));
            interrupt.config_changed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> io::Error {
    io::Error::other("the disk's worker thread is gone")
}

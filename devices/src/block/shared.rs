//! The state that all threads of a disk share: its workers, the vCPU that accesses its registers, and the VM's
//! [`BlockHandle`](super::BlockHandle).
//!
//! Each field is constant, atomic or behind a lock of its own. No lock is held while another is taken, or during a transfer.
//! `device` makes one value for each disk, and puts the capabilities into it: the limiter, and further request types.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use super::config_space::{ConfigSpace, GeometryRule};
use super::events::{BlockEvent, ErrorAction, EventLimit, EventSink};
use super::options::{BlockOptions, BlockSizes};
use super::request::{Refusal, RequestLimits, RequestTypes};
use super::stats::{Counters, IoStatus, Kind};
use crate::disk::{Disk, DiskError};
use crate::log_limit::LogLimit;
use crate::virtio::queue::QueueError;
use crate::virtio::spec::blk;

pub(super) const NO_THRESHOLD: u64 = u64::MAX;

/// See the module.
pub(super) struct Shared {
    pub(super) options: BlockOptions,
    pub(super) config_space: ConfigSpace,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) events: EventSink,
    /// The `writeback` field: what the driver chose, or the initial value.
    pub(super) writeback: AtomicBool,
    io_status: AtomicU8,
    /// QMP's write threshold, a byte offset: the first change past it is reported. `NO_THRESHOLD`: none is set.
    pub(super) write_threshold: AtomicU64,
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) request_types: Vec<Box<dyn RequestTypes>>,
    limits: LogLimits,
    error_events: EventLimit,
}

/// One limit for each message that a guest can provoke, so that none hides another.
#[derive(Default)]
struct LogLimits {
    bad_request: LogLimit,
    no_status: LogLimit,
    broken_ring: LogLimit,
    host_error: LogLimit,
    own_error: LogLimit,
}

impl Shared {
    /// The state of a disk with `workers` threads.
    pub(super) fn new(
        options: BlockOptions,
        sizes: &BlockSizes,
        disk: Arc<dyn Disk>,
        events: EventSink,
        workers: usize,
        request_types: Vec<Box<dyn RequestTypes>>,
        geometry: GeometryRule,
    ) -> Arc<Self> {
        Arc::new(Self {
            config_space: ConfigSpace::new(&options, sizes, &*disk, geometry, &request_types),
            writeback: AtomicBool::new(options.write_cache),
            io_status: AtomicU8::new(IoStatus::Ok as u8),
            write_threshold: AtomicU64::new(NO_THRESHOLD),
            request_types,
            options,
            disk,
            events,
            counters: (0..workers).map(|_| Arc::default()).collect(),
            limits: LogLimits::default(),
            error_events: EventLimit::default(),
        })
    }

    /// How many requests of `positions` queues can be in flight.
    pub(super) fn depth(&self, positions: usize) -> u32 {
        u32::from(self.options.queue_size) * positions as u32
    }

    /// Whether completed writes may be volatile. Without FLUSH the driver cannot make them durable, so they always are
    /// (virtio 1.2 §5.2.5.2, §5.2.6.2).
    pub(super) fn writeback(&self, features: u64) -> bool {
        features & blk::F_FLUSH != 0 && self.writeback.load(Ordering::Acquire)
    }

    /// Sets the `writeback` field, as the driver wrote it. `None`: to the configured value.
    pub(super) fn set_writeback(&self, writeback: Option<bool>) {
        let value = writeback.unwrap_or(self.options.write_cache);
        self.writeback.store(value, Ordering::Release);
    }

    /// What requests are checked against now. The driver and a resize may change that later.
    pub(super) fn request_limits(&self, features: u64) -> RequestLimits {
        waypoint!();
        RequestLimits {
            features,
            capacity: self.disk.capacity(),
            block_size: u64::from(self.config_space.block_size),
            size_max: self.config_space.size_max(features),
            read_only: self.disk.read_only(),
            write_through: !self.writeback(features),
        }
    }

    /// The configuration space from `offset` on, with zeroes behind it.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8], features: u64) {
        let config = self.config_space.config(self.disk.capacity(), self.writeback(features));
        let bytes = config.to_le_bytes();
        let rest =
            usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
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

    /// Reports a host error to the VM and to the log.
    pub(super) fn report_error(&self, operation: Kind, error: DiskError, action: ErrorAction) {
        let nospace = error == DiskError::NoSpace;
        if action == ErrorAction::Stop {
            self.set_io_status(if nospace { IoStatus::NoSpace } else { IoStatus::Failed });
        }
        let disk = &self.options.name;
        if let Some(suppressed) = self.limits.host_error.admit() {
            tracing::warn!(disk, ?operation, %error, ?action, suppressed, "the host failed a request");
        }
        // A stop is always announced: the VM has to act, and there are no more of them than the queues hold.
        if action != ErrorAction::Stop && !self.error_events.admit(Instant::now()) {
            return;
        }
        let (device, reason) = (disk.clone(), error.strerror());
        (self.events)(BlockEvent::IoError { device, operation, action, nospace, reason });
    }

    /// Logs that an eventfd or a timer of ours failed.
    pub(super) fn report_own_error(&self, what: &str, error: &std::io::Error) {
        if let Some(suppressed) = self.limits.own_error.admit() {
            let disk = &self.options.name;
            tracing::error!(disk, %error, suppressed, "cannot {what}");
        }
    }

    /// Logs a failed flush at the end of a worker: no request is there to report it to.
    pub(super) fn report_last_flush(&self, error: DiskError) {
        if let Some(suppressed) = self.limits.host_error.admit() {
            let disk = &self.options.name;
            tracing::error!(disk, %error, suppressed, "the disk's last flush failed");
        }
    }

    pub(super) fn report_refusal(&self, refusal: &Refusal) {
        let disk = &self.options.name;
        match refusal {
            Refusal::Status { kind, code, .. } => {
                if let Some(suppressed) = self.limits.bad_request.admit() {
                    tracing::debug!(disk, ?kind, code, suppressed, "the guest sent a bad request");
                }
            }
            Refusal::Unanswerable => {
                if let Some(suppressed) = self.limits.no_status.admit() {
                    tracing::warn!(
                        disk,
                        suppressed,
                        "the guest sent a request without a writable status byte"
                    );
                }
            }
        }
    }

    pub(super) fn report_broken_queue(&self, queue: u16, error: QueueError) {
        if let Some(suppressed) = self.limits.broken_ring.admit() {
            let disk = &self.options.name;
            tracing::warn!(disk, queue, %error, suppressed, "the guest broke a ring; the disk needs a reset");
        }
    }

    /// A request is about to change the disk up to byte `end`. If that is past the write threshold, sends the event and
    /// removes the threshold.
    pub(super) fn changes_up_to(&self, end: u64) {
        let threshold = self.write_threshold.load(Ordering::Relaxed);
        if end <= threshold {
            return;
        }
        let relaxed = Ordering::Relaxed;
        // If several workers get here at once, one of them sends the event.
        if self.write_threshold.compare_exchange(threshold, NO_THRESHOLD, relaxed, relaxed).is_ok()
        {
            let (device, exceeded) = (self.options.name.clone(), end - threshold);
            (self.events)(BlockEvent::WriteThreshold { device, threshold, exceeded });
        }
    }
}

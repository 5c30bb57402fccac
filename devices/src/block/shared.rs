//! The state that all threads of a disk share: its workers, the vCPU that accesses its registers, and the VM's
//! [`BlockHandle`](super::BlockHandle).
//!
//! Each field is constant, atomic or behind a lock of its own. No lock is held while another is taken, or during a transfer.
//! `device` makes one value for each disk, and puts capabilities into it: further request types, and the error policies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::config_space::ConfigSpace;
use super::events::{BlockEvent, EventSink};
use super::options::BlockOptions;
use super::request::{HostErrors, Refusal, RequestLimits, RequestTypes};
use super::stats::Counters;
use crate::disk::Disk;
use crate::log_limit::LogLimit;
use crate::virtio::queue::QueueError;
use crate::virtio::spec::blk;

pub(super) const NO_THRESHOLD: u64 = u64::MAX;

/// What all threads of one disk share.
pub(super) struct DiskShared {
    pub(super) options: BlockOptions,
    pub(super) config_space: ConfigSpace,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) events: EventSink,
    /// The `writeback` field: what the driver chose, or the initial value.
    pub(super) writeback: AtomicBool,
    /// QMP's write threshold, a byte offset: the first change past it is reported. `NO_THRESHOLD`: none is set.
    pub(super) write_threshold: AtomicU64,
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) request_types: Vec<Box<dyn RequestTypes>>,
    pub(super) host_errors: Box<dyn HostErrors>,
    pub(super) log_limits: LogLimits,
}

/// One limit for each message that a guest can provoke, so that none hides another.
#[derive(Default)]
pub(super) struct LogLimits {
    bad_request: LogLimit,
    no_status: LogLimit,
    broken_ring: LogLimit,
    pub(super) last_flush: LogLimit,
    own_error: LogLimit,
}

impl DiskShared {
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
    pub(super) fn request_limits(&self, features: u64, throttled: bool) -> RequestLimits {
        waypoint!();
        RequestLimits {
            features,
            capacity: self.disk.capacity(),
            block_size: u64::from(self.config_space.block_size),
            size_max: self.config_space.size_max(features),
            read_only: self.disk.info().read_only,
            write_through: !self.writeback(features),
            throttled,
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

    /// Logs that an eventfd or a timer of ours failed.
    pub(super) fn report_own_error(&self, what: &str, error: &std::io::Error) {
        let disk = &self.options.name;
        self.log_limits.own_error.warn(format_args!("disk {disk}: cannot {what}: {error}"));
    }

    pub(super) fn report_refusal(&self, refusal: &Refusal) {
        let disk = &self.options.name;
        match refusal {
            Refusal::Status { kind, code, .. } => {
                if self.log_limits.bad_request.admit().is_some() {
                    tracing::debug!("disk {disk}: a bad request: {kind:?}, status {code}");
                }
            }
            Refusal::Unanswerable => {
                self.log_limits.no_status.warn(format_args!(
                    "disk {disk}: a request of the guest has no writable status byte, so it is not answered"
                ));
            }
        }
    }

    pub(super) fn report_broken_queue(&self, queue: u16, error: QueueError) {
        let disk = &self.options.name;
        self.log_limits.broken_ring.warn(format_args!(
            "disk {disk}, queue {queue}: the guest's driver broke the ring: {error}; the queue is not served until the driver resets the disk"
        ));
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

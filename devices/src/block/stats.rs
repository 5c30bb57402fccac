//! The statistics of a disk: how many requests of each kind there were, and how they ended.
//!
//! Each worker has its own counters, so workers do not contend for them. A query (`operator`) adds them up.

use std::any::Any;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::counter::Counter;
use crate::lock;

/// The kinds of request that the statistics distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes.
    WriteZeroes,
    /// Secure erasures.
    SecureErase,
    /// GET_ID, SCSI commands, and requests of unknown types.
    Other,
}

pub(super) const KINDS: usize = Kind::Other as usize + 1;

/// Whether a host error has stopped the VM, until it is resumed (QMP's `io-status`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No error that stopped the VM.
    #[default]
    Ok,
    /// A host I/O error stopped the VM.
    Failed,
    /// The VM stopped because the host is out of disk space.
    NoSpace,
}

/// Gets the latency of each request, while `Counters::counts_latencies` is set.
pub(super) trait Latencies: Any + Send {
    fn count(&mut self, kind: Kind, nanoseconds: u64);
}

/// One worker's counters: written by that worker alone, read by anyone.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) kinds: [KindCounters; KINDS],
    pub(super) unanswerable: Counter,
    pub(super) broken_rings: Counter,
    pub(super) interrupts: Counter,
    pub(super) highest_write: Counter,
    pub(super) counts_latencies: AtomicBool,
    /// The worker locks it for each request, and only a query contends for it.
    pub(super) latencies: Mutex<Option<Box<dyn Latencies>>>,
}

#[derive(Default)]
pub(super) struct KindCounters {
    pub(super) operations: Counter,
    pub(super) bytes: Counter,
    pub(super) merged: Counter,
    pub(super) errors: Counter,
    pub(super) invalid: Counter,
    pub(super) nanoseconds: Counter,
}

impl Counters {
    /// Counts a request that succeeded: it covered `bytes` of disk up to byte `end`, and took `nanoseconds`.
    pub(super) fn done(&self, kind: Kind, bytes: u64, end: u64, merged: bool, nanoseconds: u64) {
        waypoint!();
        if kind == Kind::Write && bytes > 0 {
            self.highest_write.raise_to(end);
        }
        self.count_latency(kind, nanoseconds);
        let counters = &self.kinds[kind as usize];
        counters.operations.add(1);
        counters.bytes.add(bytes);
        counters.merged.add(u64::from(merged));
        counters.nanoseconds.add(nanoseconds);
    }

    pub(super) fn failed(&self, kind: Kind, nanoseconds: u64) {
        self.count_latency(kind, nanoseconds);
        let counters = &self.kinds[kind as usize];
        counters.errors.add(1);
        counters.nanoseconds.add(nanoseconds);
    }

    fn count_latency(&self, kind: Kind, nanoseconds: u64) {
        if self.counts_latencies.load(Ordering::Relaxed) {
            self.add_to_histogram(kind, nanoseconds);
        }
    }

    #[cold]
    fn add_to_histogram(&self, kind: Kind, nanoseconds: u64) {
        if let Some(latencies) = &mut *lock(&self.latencies) {
            latencies.count(kind, nanoseconds);
        }
    }

    pub(super) fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize].invalid.add(1);
    }
}

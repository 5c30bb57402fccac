//! The accounts of a disk: what was asked of it and how it went, per kind of request.
//!
//! Each worker counts for itself, without contention; a query adds the workers up.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::histogram::Histogram;
use crate::counter::Counter;
use crate::lock;

/// The kinds of request that are told apart.
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
    /// GET_ID, SCSI commands, and whatever the device does not know.
    Other,
}

const KINDS: usize = Kind::Other as usize + 1;

/// Whether the disk is in trouble, until the VM is resumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No error that stopped the VM.
    #[default]
    Ok,
    /// A host I/O error stopped the VM.
    Failed,
    /// A full host stopped the VM.
    NoSpace,
}

/// The account of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStats {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes of disk those covered.
    pub bytes: u64,
    /// Of those requests, how many travelled in another one's transfer.
    pub merged: u64,
    /// Requests that the host failed.
    pub errors: u64,
    /// Requests that were refused before they reached the host.
    pub invalid: u64,
    /// From the ring to the answer, added up over `operations` and `errors`.
    pub time: Duration,
}

/// The accounts of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    kinds: [KindStats; KINDS],
    /// Chains that could not be answered for want of a writable byte.
    pub unanswerable: u64,
    /// Rings that the driver corrupted.
    pub broken_rings: u64,
    /// Interrupts raised for used rings.
    pub interrupts: u64,
    /// First byte of the disk after all that was written.
    pub highest_write: u64,
}

impl BlockStats {
    /// The account of one kind.
    pub fn kind(&self, kind: Kind) -> &KindStats {
        &self.kinds[kind as usize]
    }
}

/// One worker's counters: written by that worker alone, read by anyone.
#[derive(Debug, Default)]
pub(super) struct Counters {
    kinds: [KindCounters; KINDS],
    pub(super) unanswerable: Counter,
    pub(super) broken_rings: Counter,
    pub(super) interrupts: Counter,
    highest_write: Counter,
    has_histograms: AtomicBool,
    /// Of reads, writes and flushes. The worker's alone but for a query now and then.
    histograms: Mutex<[Option<Histogram>; 3]>,
}

#[derive(Debug, Default)]
struct KindCounters {
    operations: Counter,
    bytes: Counter,
    merged: Counter,
    errors: Counter,
    invalid: Counter,
    nanoseconds: Counter,
}

impl Counters {
    /// A request that succeeded: it covered `bytes` of disk up to `end`, and took `time`.
    pub(super) fn done(&self, kind: Kind, bytes: u64, end: u64, merged: bool, time: Duration) {
        waypoint!();
        if kind == Kind::Write {
            self.highest_write.raise_to(end);
        }
        self.count_latency(kind, time);
        let counters = &self.kinds[kind as usize];
        counters.operations.add(1);
        counters.bytes.add(bytes);
        counters.merged.add(u64::from(merged));
        counters.nanoseconds.add(time.as_nanos() as u64);
    }

    pub(super) fn failed(&self, kind: Kind, time: Duration) {
        self.count_latency(kind, time);
        let counters = &self.kinds[kind as usize];
        counters.errors.add(1);
        counters.nanoseconds.add(time.as_nanos() as u64);
    }

    fn count_latency(&self, kind: Kind, time: Duration) {
        if self.has_histograms.load(Ordering::Relaxed)
            && let Some(Some(histogram)) = lock(&self.histograms).get_mut(kind as usize)
        {
            histogram.count(time);
        }
    }

    pub(super) fn histogram(&self, kind: Kind) -> Option<Histogram> {
        lock(&self.histograms).get(kind as usize)?.clone()
    }

    pub(super) fn set_histogram(&self, kind: Kind, histogram: Option<Histogram>) {
        let mut histograms = lock(&self.histograms);
        if let Some(place) = histograms.get_mut(kind as usize) {
            *place = histogram;
        }
        self.has_histograms.store(histograms.iter().any(Option::is_some), Ordering::Relaxed);
    }

    pub(super) fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize].invalid.add(1);
    }

    pub(super) fn add_to(&self, stats: &mut BlockStats) {
        for (sum, counters) in stats.kinds.iter_mut().zip(&self.kinds) {
            sum.operations += counters.operations.get();
            sum.bytes += counters.bytes.get();
            sum.merged += counters.merged.get();
            sum.errors += counters.errors.get();
            sum.invalid += counters.invalid.get();
            sum.time += Duration::from_nanos(counters.nanoseconds.get());
        }
        stats.unanswerable += self.unanswerable.get();
        stats.broken_rings += self.broken_rings.get();
        stats.interrupts += self.interrupts.get();
        stats.highest_write = stats.highest_write.max(self.highest_write.get());
    }
}

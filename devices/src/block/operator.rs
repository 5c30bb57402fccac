//! What an operator reads of a disk and sets while it runs: statistics, latency histograms, throttling limits and the write threshold.
//!
//! A capability: requests are served without it. It hooks in as methods of [`BlockHandle`], which QMP and the metrics page call. They
//! add up what the workers count, and change values that the workers read at each request.

use std::any::Any;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::device::BlockHandle;
use super::histogram::Histogram;
use super::shared::{DiskShared, NO_THRESHOLD};
use super::stats::{Counters, KINDS, Kind, Latencies};
use super::throttle::{Throttling, ThrottlingError};
use crate::clock::Instant;
use crate::lock;

/// The statistics of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStats {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes of disk those covered.
    pub bytes: u64,
    /// Of those requests, how many were merged into another one's transfer.
    pub merged: u64,
    /// Requests that the host failed.
    pub errors: u64,
    /// Requests that were refused before they reached the host.
    pub invalid: u64,
    /// From when the worker takes a request until it completes it: the sum over `operations` and `errors`.
    pub time: Duration,
}

/// The statistics of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    kinds: [KindStats; KINDS],
    /// Chains that could not be answered, because no byte of them is writable.
    pub unanswerable: u64,
    /// Rings that the driver corrupted.
    pub broken_rings: u64,
    /// Interrupts raised for used rings.
    pub interrupts: u64,
    /// First byte of the disk after all that was written.
    pub highest_write: u64,
}

impl BlockStats {
    /// The statistics of one kind.
    pub fn kind(&self, kind: Kind) -> &KindStats {
        &self.kinds[kind as usize]
    }
}

impl BlockHandle {
    /// The statistics so far.
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
        self.shared
            .counters
            .iter()
            .for_each(|counters| counters.set_histogram(kind, histogram.cloned()));
    }

    /// The limits. Their group is named, unless nothing is limited.
    pub fn throttling(&self) -> Throttling {
        self.throttle.limits()
    }

    /// Sets other limits of the disk's group, or of the one that they name, to which the disk moves. They also count for the requests
    /// that the present ones delay. `disks` are all of the machine, `default` the name of a new group that the limits do not name.
    ///
    /// # Errors
    /// What does not go together; nothing has changed then.
    pub fn set_throttling<'a>(
        &self,
        mut limits: Throttling,
        default: &str,
        disks: impl Iterator<Item = &'a Self> + Clone,
    ) -> Result<(), ThrottlingError> {
        // As in QEMU: the disk leaves its group then, whichever is named.
        limits.group.take_if(|_| limits.rates.iter().all(|rate| rate.average == 0));
        limits.check()?;
        let name = limits.group.clone().or_else(|| self.throttle.group());
        let name = name.unwrap_or_else(|| default.to_owned());
        let in_group = |disk: &&Self| disk.throttle.group().as_ref() == Some(&name);
        if !limits.is_off()
            && let Some(member) = disks.clone().find(in_group)
        {
            self.throttle.join(&member.throttle);
        }
        self.throttle.set(limits, &name, Instant::now());
        // This disk, too, which may have left its group.
        self.start_waiting();
        disks.filter(in_group).for_each(Self::start_waiting);
        Ok(())
    }

    fn start_waiting(&self) {
        for worker in &*self.workers {
            let _ = worker.send(|thread, _| thread.worker.start_waiting(Instant::now()));
        }
    }

    /// The offset past which a change is reported, in bytes.
    pub fn write_threshold(&self) -> Option<u64> {
        self.shared.write_threshold()
    }

    /// Reports the next change past `offset`, and that alone ([`BlockEvent::WriteThreshold`](super::events::BlockEvent::WriteThreshold)); `None`: no more.
    pub fn set_write_threshold(&self, offset: Option<u64>) {
        self.shared.set_write_threshold(offset);
    }

    /// Whether completed writes may be volatile: as configured, or as the driver chose.
    pub fn write_cache(&self) -> bool {
        self.shared.writeback.load(Ordering::Relaxed)
    }
}

/// Makes the disks of a new machine that name the same throttle group share the limits of the first one.
pub fn share_limits<'a>(disks: impl Iterator<Item = &'a BlockHandle> + Clone) {
    for (count, disk) in disks.clone().enumerate() {
        let group = disk.throttle.group();
        let mut earlier = disks.clone().take(count);
        if group.is_some()
            && let Some(first) = earlier.find(|earlier| earlier.throttle.group() == group)
        {
            disk.throttle.join(&first.throttle);
        }
    }
}

impl DiskShared {
    pub(super) fn stats(&self) -> BlockStats {
        let mut stats = BlockStats::default();
        self.counters.iter().for_each(|counters| counters.add_to(&mut stats));
        stats
    }

    pub(super) fn write_threshold(&self) -> Option<u64> {
        Some(self.write_threshold.load(Ordering::Relaxed)).filter(|offset| *offset != NO_THRESHOLD)
    }

    pub(super) fn set_write_threshold(&self, offset: Option<u64>) {
        self.write_threshold.store(offset.unwrap_or(NO_THRESHOLD), Ordering::Relaxed);
    }
}

/// Of reads, writes and flushes.
#[derive(Default)]
struct Histograms([Option<Histogram>; 3]);

impl Latencies for Histograms {
    fn count(&mut self, kind: Kind, nanoseconds: u64) {
        if let Some(Some(histogram)) = self.0.get_mut(kind as usize) {
            histogram.count(nanoseconds);
        }
    }
}

impl Counters {
    pub(super) fn histogram(&self, kind: Kind) -> Option<Histogram> {
        let latencies = lock(&self.latencies);
        let Histograms(of_kinds) = (latencies.as_deref()? as &dyn Any).downcast_ref()?;
        of_kinds.get(kind as usize)?.clone()
    }

    pub(super) fn set_histogram(&self, kind: Kind, histogram: Option<Histogram>) {
        let mut latencies = lock(&self.latencies);
        let present = latencies.get_or_insert_with(|| Box::new(Histograms::default()));
        let Some(Histograms(of_kinds)) = (&mut **present as &mut dyn Any).downcast_mut() else {
            return;
        };
        if let Some(place) = of_kinds.get_mut(kind as usize) {
            *place = histogram;
        }
        let any = of_kinds.iter().any(Option::is_some);
        self.counts_latencies.store(any, Ordering::Relaxed);
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

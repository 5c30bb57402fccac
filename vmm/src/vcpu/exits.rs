//! How often the guest left KVM, and why: the measure of what a device costs. `--verbose` prints it at the end.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// One vCPU's exits to user space, by reason. Counted by its thread, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    pub(super) mmio_reads: Counter,
    pub(super) mmio_writes: Counter,
    pub(super) port_reads: Counter,
    pub(super) port_writes: Counter,
    /// Interruptions by a signal, and whatever else does not come from a device.
    pub(super) other: Counter,
}

/// A count with one writer, so that a load and a store do.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn count(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Exits {
    /// Each reason and its count.
    pub(crate) fn by_reason(&self) -> [(&'static str, u64); 5] {
        [
            ("mmio_read", self.mmio_reads.get()),
            ("mmio_write", self.mmio_writes.get()),
            ("port_read", self.port_reads.get()),
            ("port_write", self.port_writes.get()),
            ("other", self.other.get()),
        ]
    }
}

impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [reads, writes, port_reads, port_writes, other] = self.by_reason().map(|(_, count)| count);
        write!(
            f,
            "{reads} MMIO reads, {writes} MMIO writes, {port_reads} port reads, {port_writes} port writes, {other} others"
        )
    }
}

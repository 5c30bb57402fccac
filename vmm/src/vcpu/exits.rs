//! How often the guest left KVM, and why: the measure of what a device costs.

mod report;

use devices::counter::Counter;

/// Why a vCPU exits to user space.
#[derive(Clone, Copy)]
pub(super) enum Reason {
    MmioRead,
    MmioWrite,
    PortRead,
    PortWrite,
    /// Interruptions by a signal, and whatever else does not come from a device.
    Other,
}

const NAMES: [&str; 5] = ["mmio_read", "mmio_write", "port_read", "port_write", "other"];

/// One vCPU's exits to user space, by reason. Counted by its thread, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Exits([Counter; NAMES.len()]);

impl Exits {
    /// Counts an exit: the guest's access to `address`, or without `data` something else.
    pub(super) fn count(&self, reason: Reason, address: u64, data: &[u8]) {
        self.0[reason as usize].add(1);
        let (reason, size) = (NAMES[reason as usize], data.len());
        tracing::trace!(target: "kvm_run_exit", reason, address, size, value = data);
    }
}

//! The wire of an interrupt, as devices see it.
//!
//! Devices hold an `Arc<dyn InterruptLine>` and know nothing of interrupt controllers: the monitor implements the trait over
//! KVM, and tests implement it by counting. What a device reports to its driver beside the wire (virtio's status bits, the
//! UART's identification register) belongs to that device.

/// One wired, edge-triggered interrupt line. Several devices, or several threads of one, may share it.
pub trait InterruptLine: Send + Sync {
    /// Raises the line and lowers it again. On return the interrupt controller has seen the edge: nothing is in flight that a
    /// save of the machine would miss. Called from device threads and vCPU threads alike, so it must not block.
    ///
    /// # Errors
    /// The host's error. The caller can only report it: the interrupt is lost.
    fn pulse(&self) -> std::io::Result<()>;
}

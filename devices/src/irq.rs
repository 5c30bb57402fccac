//! The wire of an interrupt, as devices see it.
//!
//! Devices hold an `Arc<dyn InterruptLine>` and know nothing of interrupt controllers: the monitor implements the trait over
//! KVM, and tests implement it by counting. What a device reports to its driver beside the wire (virtio's status bits, the
//! UART's identification register) belongs to that device.

/// One wired, edge-triggered interrupt line. Several devices, or several threads of one, may share it.
///
/// No interrupt of a shared line is lost if each device sets its status before it pulses, and the driver of each device reads its
/// status whenever the line has had an edge. The edge follows the status, so that a handler runs that begins after the status was
/// set. It does not matter that it may be an edge's of another device, nor that several edges before it count as one: what a
/// handler is for is in the status and the rings, never in the edge. Linux's side: `kernel/irq/chip.c`, `handle_edge_irq` runs the
/// handlers of all devices, and runs them again (IRQS_PENDING) if an edge came meanwhile.
pub trait InterruptLine: Send + Sync {
    /// Raises the line and lowers it again, apart from other threads' pulses: two that overlap would be one edge, which comes before
    /// the second one's end. On return the interrupt controller has seen the edge: nothing is in flight that a
    /// save of the machine would miss. Called from device threads and vCPU threads alike, so it must not block.
    ///
    /// # Errors
    /// The host's error. The caller can only report it: the interrupt is lost.
    fn pulse(&self) -> std::io::Result<()>;
}

//! The wire of an interrupt, as devices see it.
//!
//! Devices hold an `Arc<dyn InterruptLine>` and know no interrupt controllers: the monitor implements the trait over KVM, and tests
//! count. What a device reports to its driver besides (virtio's status bits, the UART's identification register) belongs to that device.

/// One wired, edge-triggered interrupt line. Several devices, or several threads of one, may share it.
///
/// No interrupt of a shared line is lost if each device sets its status before it pulses, and each driver reads the status of its device
/// after every edge. Then a handler runs that begins after the status was set. The edge may be another device's, and several edges may
/// count as one, because what a handler is for is in the status and the rings. In Linux, `handle_edge_irq` (`kernel/irq/chip.c`) runs the
/// handlers of all devices, and runs them again (IRQS_PENDING) if an edge came meanwhile.
pub trait InterruptLine: Send + Sync {
    /// Raises the line and lowers it again. Pulses of several threads do not overlap, since two that overlap would be one edge. On return
    /// the interrupt controller has seen the edge, so a save of the machine misses nothing. Device threads and vCPU threads call it, so
    /// it must not block.
    ///
    /// # Errors
    /// The host's error. The caller can only report it: the interrupt is lost.
    fn pulse(&self) -> std::io::Result<()>;
}

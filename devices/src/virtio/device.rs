//! The contract between the transport and a device.

use std::io;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::irq::Interrupt;

/// A queue that the driver has enabled, handed to the device until `stop` or `stop_queue` takes it back.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// The ring: size and addresses are validated by the transport.
    pub queue: Queue,
    /// Becomes readable when the driver notifies this queue. A duplicate: the transport keeps its own.
    pub kick: EventFd,
}

/// Everything a device needs to run between DRIVER_OK and reset.
pub struct Activation {
    /// Guest RAM; lives as long as any clone of it.
    pub memory: GuestMemory,
    /// The feature bits both sides agreed on.
    pub features: u64,
    /// The enabled queues, in index order.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Interrupt,
}

/// A virtio device behind some transport.
///
/// The transport owns the registers, feature negotiation and the status state machine, and calls from one thread at a
/// time. It promises that there is a `stop` between two `start`s, that `start` sees only features the device offered,
/// that `start_queue` names only a queue that `stop_queue` took, and that queue rings lie inside guest memory when
/// handed over (the driver may still scribble on them at any time). The device promises that `stop` returns only when
/// no thread of it touches guest memory any more.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2 §5).
    fn device_id(&self) -> u32;

    /// The feature bits that the device offers, ring features included. VERSION_1 and RING_RESET are the transport's.
    fn features(&self) -> u64;

    /// QueueSizeMax of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset` (bytes). Bytes past the end read 0.
    /// `features` are the negotiated bits (0 before FEATURES_OK): a field's initial value may depend on them
    /// (virtio-blk's `writeback`, virtio 1.2 §5.2.5.2).
    fn read_config(&self, offset: u64, data: &mut [u8], features: u64);

    /// Writes `data` to the configuration space at `offset` (bytes). Writes to read-only fields are ignored.
    /// `features` are the negotiated bits (0 before FEATURES_OK).
    fn write_config(&mut self, offset: u64, data: &[u8], features: u64);

    /// DRIVER_OK: starts serving the queues. Work the driver queued before counts: look at the rings once unasked.
    ///
    /// # Errors
    /// When the device cannot start; the transport then sets DEVICE_NEEDS_RESET.
    fn start(&mut self, activation: Activation) -> io::Result<()>;

    /// Device reset or removal: takes no new work, waits for what is in flight (each request answered), and gives back
    /// all queues. Called at every reset, also when not started: then there is nothing to stop, but what the driver
    /// wrote to the configuration space is forgotten all the same.
    fn stop(&mut self) -> Vec<ActiveQueue>;

    /// RING_RESET (virtio 1.2 §2.6.1): like `stop` for one queue while the others go on. `None` when it is not active.
    fn stop_queue(&mut self, index: u16) -> Option<ActiveQueue>;

    /// Re-enables one queue after a ring reset, while started.
    ///
    /// # Errors
    /// As `start`.
    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()>;
}

//! The contract between the transport and a device.

use std::io;

pub use super::active_queue::{ActiveQueue, RingPosition};
use super::drain::Drain;
use super::interrupt::Interrupt;
use crate::GuestMemory;

/// Everything that a device needs between DRIVER_OK and reset.
pub struct Activation {
    /// Guest RAM; lives as long as any clone of it.
    pub memory: GuestMemory,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
    /// The enabled queues, in index order.
    pub queues: Vec<ActiveQueue>,
    /// Interrupts the driver.
    pub interrupt: Interrupt,
}

/// A virtio device behind some transport.
///
/// The transport owns the registers, feature negotiation and the status state machine, and calls from one thread at a time.
/// It promises that
/// - the last [`Drain`] is done before it calls `start`, `start_queue` or `reset_queue`,
/// - `start` gets only features that the device offered,
/// - `start_queue` names only a queue that the device does not have,
/// - rings lie inside guest memory when handed over. The driver may still write anything to them at any time.
///
/// The device promises that none of its threads touches guest memory for what was reset once the drain is done, and that no
/// call waits for the host's disk.
///
/// This trait has no pause: the machine's main thread pauses a device, and it must not wait for the transport's lock, which a
/// vCPU holds while the device starts. So a device with threads of its own has a handle beside it, as a disk has its
/// [`BlockHandle`](crate::block::BlockHandle): `pause` returns a [`Drain`], as `reset` does, and `resume` goes on.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2 §5).
    fn device_id(&self) -> u32;

    /// The feature bits that the device offers, ring features included. VERSION_1 and RING_RESET are the transport's.
    fn features(&self) -> u64;

    /// The largest size of each queue, in elements; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset` (bytes). Bytes past the end read 0.
    /// `features` are the negotiated bits (0 before FEATURES_OK): a field's initial value may depend on them
    /// (virtio-blk's `writeback`, virtio 1.2 §5.2.5.2).
    fn read_config(&self, _offset: u64, data: &mut [u8], _features: u64) {
        data.fill(0);
    }

    /// Writes `data` to the configuration space at `offset` (bytes). Writes to read-only fields are ignored.
    /// `features` are the negotiated bits (0 before FEATURES_OK).
    fn write_config(&mut self, _offset: u64, _data: &[u8], _features: u64) {}

    /// Takes the fields that a driver had written from a saved configuration space, before `start`.
    fn restore_config(&mut self, _config: &[u8]) {}

    /// DRIVER_OK: starts serving the queues. A driver may have queued requests before, so the device looks at each ring
    /// once without a notification.
    ///
    /// # Errors
    /// When the device cannot start; the transport then sets DEVICE_NEEDS_RESET.
    fn start(&mut self, activation: Activation) -> io::Result<()>;

    /// Begins a device reset or removal: the device takes no new requests, and the drain is done when the host has answered
    /// those in flight. Called at every reset, also when not started: then only what the driver wrote to the configuration
    /// space is forgotten.
    fn reset(&mut self) -> Drain;

    /// Begins a RING_RESET (virtio 1.2 §2.6.1): as `reset`, for one queue while the others go on. If it is not active, the drain
    /// is done at once.
    fn reset_queue(&mut self, index: u16) -> Drain;

    /// Enables one queue after a ring reset, while started.
    ///
    /// # Errors
    /// As `start`.
    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()>;

    /// The position in each active queue, in index order, of a device that is paused. It starts again from there when
    /// `start` gets queues with these positions.
    fn ring_positions(&self) -> Vec<RingPosition>;
}

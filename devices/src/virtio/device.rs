//! The trait between the transport and a device, with the duties of both sides.

use std::io;

pub use super::active_queue::{ActiveQueue, RingIndices};
use super::drain::Drain;
use super::interrupt::Interrupt;
use crate::GuestMemory;

/// Everything that a device needs between DRIVER_OK and reset.
pub struct Activation {
    /// Guest RAM. It stays mapped as long as any clone of this value exists.
    pub memory: GuestMemory,
    /// The negotiated feature bits.
    pub features: u64,
    /// The enabled queues, in index order.
    pub queues: Vec<ActiveQueue>,
    /// Interrupts the driver.
    pub interrupt: Interrupt,
}

/// A virtio device, as a transport calls it.
///
/// The transport owns the registers, feature negotiation and the status state machine. It promises that
/// - it calls the device from one thread at a time,
/// - the last [`Drain`] is done before it calls `start`, `start_queue` or `reset_queue`,
/// - `start` gets only features that the device offered,
/// - `start_queue` gets only a queue that the device does not have,
/// - rings lie inside guest memory when they are handed over. The driver may still write anything to them at any time.
///
/// The device promises that
/// - when a drain is done, none of its threads touches the guest memory of what was reset,
/// - no call waits for the host's disk.
///
/// This trait has no pause. The machine's main thread pauses a device, and it must not wait for the transport's lock, which a
/// vCPU holds while the device starts. So a device with threads of its own has a handle beside it, for a disk its
/// [`BlockHandle`](crate::block::BlockHandle). Its `pause` returns a [`Drain`], as `reset` does, and its `resume` ends the pause.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2 §5).
    fn device_id(&self) -> u32;

    /// How messages call the device, such as `disk vda`.
    fn name(&self) -> String;

    /// The feature bits that the device offers, ring features included. VERSION_1 and RING_RESET are the transport's.
    fn features(&self) -> u64;

    /// The largest size of each queue, in elements; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset` (bytes). Bytes past the end read 0. A field's initial value may depend on
    /// `features`, the negotiated bits, 0 before FEATURES_OK (virtio-blk's `writeback`, virtio 1.2 §5.2.5.2).
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

    /// Begins a device reset: the device takes no new requests, and the drain is done when the host has answered those in flight. Before
    /// `start`, the device only forgets what the driver wrote to the configuration space.
    fn reset(&mut self) -> Drain;

    /// Begins the reset of one queue (virtio 1.2 §2.6.1), while the others go on. If the queue is not active, the drain is done at
    /// once.
    fn reset_queue(&mut self, index: u16) -> Drain;

    /// Enables one queue after a ring reset, while started.
    ///
    /// # Errors
    /// As `start`.
    fn start_queue(&mut self, queue: ActiveQueue) -> io::Result<()>;

    /// The indices into the rings of each active queue, in the order of the queues. Called while the device is paused. A device whose
    /// `start` gets queues with these indices goes on from there.
    fn ring_indices(&self) -> Vec<RingIndices>;
}

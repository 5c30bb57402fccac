//! A queue as the transport hands it to a device and gets it back, and the indices into its rings, which a save needs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// A queue that the driver has enabled. The device has it until the queue or the device is reset.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// Size, addresses (validated by the transport), and the ring position to start from.
    pub queue: Queue,
    /// Becomes readable when the driver notifies this queue.
    pub kick: Arc<EventFd>,
    /// The queue comes from a snapshot. Whether the driver was interrupted for its last completions is not known, so the device
    /// interrupts once in any case.
    pub restored: bool,
}

/// How far a device has come in a queue's rings: free-running indices (virtio 1.2 §2.7.6, §2.7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingIndices {
    /// The queue's index in the device.
    pub queue: u16,
    /// The entry of the available ring that the device takes next.
    pub next_available: u16,
    /// The element of the used ring that the device fills next.
    pub next_used: u16,
}

//! Facts of the VIRTIO 1.2 specification, each with its section: the only place where these numbers are written down.
//!
//! Feature bits are masks over the 64 feature bits, not bit numbers. All multi-byte values that cross to the guest are
//! little-endian (§1.4).

pub mod blk;
pub mod mmio;
pub mod names;
pub mod ring;

/// Device status (§2.1): the driver found the device.
pub const STATUS_ACKNOWLEDGE: u32 = 1;
/// Device status (§2.1): the driver knows how to drive it.
pub const STATUS_DRIVER: u32 = 2;
/// Device status (§2.1): the driver is set up; the device may serve the queues.
pub const STATUS_DRIVER_OK: u32 = 4;
/// Device status (§2.1): feature negotiation is over. The device refuses by leaving the bit clear (§3.1.1 step 6).
pub const STATUS_FEATURES_OK: u32 = 8;
/// Device status (§2.1): the device is beyond repair until it is reset. Set by the device alone.
pub const STATUS_DEVICE_NEEDS_RESET: u32 = 64;
/// Device status (§2.1): the driver has given up on the device.
pub const STATUS_FAILED: u32 = 128;

/// Ring feature 28 (§2.7.5.3): a descriptor may name a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Ring feature 29 (§2.7.7, §2.7.10): `used_event` and `avail_event` suppress notifications instead of the ring's
/// flags.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature 32 (§6): the device follows this specification rather than its predecessors.
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature 35 (§2.7.9): buffers are used in the order in which they were made available.
pub const F_IN_ORDER: u64 = 1 << 35;
/// Feature 38 (§2.9): QueueNotify carries ring positions beside the queue's index. Never offered: it would defeat the
/// ioeventfd's match on the index.
pub const F_NOTIFICATION_DATA: u64 = 1 << 38;
/// Feature 40 (§2.6.1): queues can be reset one by one.
pub const F_RING_RESET: u64 = 1 << 40;

/// Device ID of the block device (§5.2.1).
pub const DEVICE_ID_BLOCK: u32 = 2;

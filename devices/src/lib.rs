//! The devices of a minivmm machine: the virtio-mmio transport, the virtio-blk device, the disk engines behind it, and
//! the few legacy devices that a Linux guest expects.
//!
//! Nothing here holds a KVM file descriptor. A device is handed guest memory, eventfds and an interrupt trigger, so all
//! of it runs in-process under tests that play the guest's driver.

pub mod block;
pub mod bus;
pub mod disk;
pub mod irq;
pub mod legacy;
pub mod log_limit;
pub mod virtio;

/// Guest RAM as every device sees it. Cloning shares the same mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

#[doc = include_str!("../docs/follow-one-write.md")]
pub mod follow_one_write {}

#[doc = include_str!("../docs/virtio-blk.md")]
pub mod virtio_blk_by_clause {}

//! The devices of a minivmm machine: the virtio-mmio transport, the virtio-blk device, the disk engines behind it, and the few legacy
//! devices that a Linux guest expects.
//!
//! Nothing here holds a KVM file descriptor. A device gets guest memory, eventfds and an interrupt line, so tests that play the guest's
//! driver run all of it.

/// Marks a file that a request passes, for the test that compares `docs/follow-one-write.md` with a real write. A debug build emits a
/// trace event whose metadata name the file; a release build nothing, since it would cost each request instructions.
macro_rules! waypoint {
    () => {
        if cfg!(debug_assertions) {
            tracing::trace!(target: "waypoint", "passed");
        }
    };
}

// The atomics of code whose interleavings `make model` explores: `virtio/model.rs`.
#[cfg(loom)]
use loom::sync;
#[cfg(not(loom))]
use std::sync;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod block;
pub mod bus;
pub mod chapters;
pub mod clock;
pub mod counter;
pub mod disk;
pub mod irq;
pub mod legacy;
pub mod log_limit;
pub mod spawn;
pub mod virtio;

/// Locks plain data, which a panic while the lock was held cannot have left inconsistent.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest RAM as every device sees it. Cloning shares the same mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

/// A range of guest RAM that a request names. Its maker has checked that it lies inside guest memory. The guest may change the bytes at
/// any time, so they are copied and never borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte, guest-physical.
    pub address: vm_memory::GuestAddress,
    /// Length in bytes.
    pub length: u32,
}

//! Asks for a thread's memory before the thread is started.
//!
//! A capability, of hosts that limit memory (`ulimit -v`, `ulimit -d`): `sandbox` starts the threads of a VM by [`checked`]. For a thread without a
//! stack, the C library returns EAGAIN, as if the user had too many tasks. And when a new thread finds no memory for the stack of its
//! signal handlers, the standard library ends the process.

use std::io;
use std::ptr;
use std::sync::Arc;

use devices::spawn::{STACK, Spawn};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes that must be free: a stack, and 1 MiB for what this thread and the ones just started
/// allocate before their bodies run, 64 KiB each at most.
const ROOM: usize = STACK + (1 << 20);

/// Starts threads as `spawn` does, if there is memory for them. The error is ENOMEM if not.
pub(crate) fn checked(spawn: Spawn) -> Spawn {
    Arc::new(move |name, body| {
        try_to_map(ROOM)?;
        spawn(name, body)
    })
}

/// Checks that the process may map so many bytes more.
///
/// # Errors
/// It may not.
#[expect(unsafe_code, reason = "memory is mapped, and unmapped again")]
pub(crate) fn try_to_map(bytes: usize) -> io::Result<()> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an address that nothing uses, and nothing refers to this mapping when it is removed.
    unsafe {
        let mapped = mmap_anonymous(ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)?;
        munmap(mapped, bytes)?;
    }
    Ok(())
}

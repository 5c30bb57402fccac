//! The positioned read and write system calls over raw buffers, for guest memory and bounce buffers alike.
//!
//! libc's wrappers are not used: each of them is a cancellation point, which costs two atomic operations, and a wrapper for
//! a newer call hides whether the kernel has it.

#![expect(unsafe_code, reason = "system calls with raw pointers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_long, iovec};

use super::error::is_refusal;

/// Most iovecs that one system call takes (Linux's UIO_MAXIOV).
pub(super) const IOV_MAX: usize = 1024;

/// The system calls of one direction: for one buffer, for several, and for several with flags.
pub(super) type Direction = [c_long; 3];
pub(super) const READ: Direction = [libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2];
pub(super) const WRITE: Direction = [libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2];

/// Moves bytes between `buffers` and `offset` of `file` with the cheapest system call that can do it, and returns how many.
/// `flags` are those of preadv2(2). If a seccomp filter refuses the call for a single buffer, the call for several is tried, and
/// the other way round. The call for a single buffer moves the first of several only.
///
/// # Safety
/// `buffers` are at most IOV_MAX, and valid for reads and, if the direction is `READ`, for writes.
#[inline(always)]
pub(super) unsafe fn transfer(
    [single, vector, flagged]: Direction,
    file: impl AsFd,
    buffers: &[iovec],
    offset: u64,
    flags: i32,
) -> io::Result<u64> {
    waypoint!();
    let fd = file.as_fd().as_raw_fd();
    let Some(first) = buffers.first() else { return Ok(0) };
    let number = if flags == 0 { vector } else { flagged };
    // SAFETY: as the caller says. A 64-bit kernel takes the whole offset from the low half of its two arguments. The calls without
    // flags do not look at the last argument.
    let call = move |is_single| unsafe {
        if is_single {
            libc::syscall(single, fd, first.iov_base, first.iov_len, offset)
        } else {
            libc::syscall(number, fd, buffers.as_ptr(), buffers.len(), offset, 0_u64, flags)
        }
    };
    let is_single = flags == 0 && buffers.len() == 1;
    match u64::try_from(call(is_single)) {
        Ok(count) => Ok(count),
        Err(_) => call_again(call, is_single, flags == 0),
    }
}

/// After `call` has failed: repeats it while a signal interrupts it, and if a seccomp filter refuses it, makes the other call, if it
/// `has_other`.
#[cold]
fn call_again(
    call: impl Fn(bool) -> c_long,
    mut is_single: bool,
    mut has_other: bool,
) -> io::Result<u64> {
    loop {
        let error = io::Error::last_os_error();
        if is_refusal(&error) && has_other {
            (is_single, has_other) = (!is_single, false);
        } else if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        if let Ok(count) = u64::try_from(call(is_single)) {
            return Ok(count);
        }
    }
}

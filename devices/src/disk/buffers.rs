//! The guest memory of one transfer, as the host's system calls want it: iovecs that shrink from the front as data moves.
//!
//! Everything here works on raw pointers. The guest may change its memory at any moment, so no Rust reference to it is
//! ever formed, and nothing that is read twice is trusted twice.

#![expect(unsafe_code, reason = "iovecs are raw pointers into guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use libc::iovec;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::bounce::Alignment;
use super::{DiskError, GuestRange};
use crate::GuestMemory;

/// Most iovecs that one system call takes (Linux's UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// A list of guest buffers, of which a first part may be done already.
///
/// Invariant: every iovec lies inside guest memory that is mapped readable and writable for as long as the list is
/// not empty (see `resolve`).
#[derive(Default)]
pub(super) struct IoBuffers {
    iovecs: Vec<iovec>,
    /// Index of the first iovec with bytes left.
    first: usize,
    /// Bytes left.
    left: u64,
}

// SAFETY: the pointers name guest memory, which belongs to no thread; the mapping outlives the list (see `resolve`).
unsafe impl Send for IoBuffers {}

impl IoBuffers {
    /// Replaces the content by `ranges`. Ranges that happen to be neighbours in host memory become one iovec.
    ///
    /// # Errors
    /// `OutOfRange` when a range is not inside guest memory; the list is then empty.
    ///
    /// # Safety
    /// The caller keeps `memory` mapped until the list is dropped, cleared or resolved anew.
    pub(super) unsafe fn resolve(&mut self, memory: &GuestMemory, ranges: &[GuestRange]) -> Result<(), DiskError> {
        self.clear();
        for range in ranges {
            for slice in memory.get_slices(range.address, range.length as usize) {
                match slice {
                    Ok(slice) => self.push(&slice),
                    Err(_) => {
                        self.clear();
                        return Err(DiskError::OutOfRange);
                    }
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, slice: &VolatileSlice<'_>) {
        let (base, length) = (slice.ptr_guard_mut().as_ptr(), slice.len());
        self.left += length as u64;
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => last.iov_len += length,
            _ if length == 0 => {}
            _ => self.iovecs.push(iovec { iov_base: base.cast(), iov_len: length }),
        }
    }

    /// Forgets the buffers and keeps the allocation.
    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.left = 0;
    }

    /// Bytes left.
    pub(super) fn len(&self) -> u64 {
        self.left
    }

    /// What to hand to the next system call.
    pub(super) fn pending(&self) -> &[iovec] {
        let rest = &self.iovecs[self.first..];
        &rest[..rest.len().min(IOV_MAX)]
    }

    /// The first `count` bytes are done.
    pub(super) fn advance(&mut self, count: u64) {
        let mut count = count.min(self.left);
        self.left -= count;
        while count > 0 {
            let iovec = &mut self.iovecs[self.first];
            let step = count.min(iovec.iov_len as u64);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step as usize);
            iovec.iov_len -= step as usize;
            count -= step;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Direct I/O takes the buffers as they are. Before Linux 6.18 each buffer's length has to suit, not just their sum.
    pub(super) fn aligned(&self, alignment: Alignment) -> bool {
        let (memory, unit) = (alignment.memory as usize - 1, alignment.offset as usize - 1);
        self.iovecs[self.first..].iter().all(|iovec| iovec.iov_base.addr() & memory == 0 && iovec.iov_len & unit == 0)
    }

    /// One preadv2(2) from `offset` into the buffers, which stay as they are. Returns the bytes read.
    pub(super) fn read_from(&self, file: impl AsFd, offset: u64, flags: i32) -> io::Result<u64> {
        let (fd, pending) = (file.as_fd().as_raw_fd(), self.pending());
        // SAFETY: the iovecs are valid for writes by the invariant, and their count is within IOV_MAX.
        retry(|| unsafe { libc::preadv2(fd, pending.as_ptr(), pending.len() as i32, offset as i64, flags) })
    }

    /// One pwritev2(2) of the buffers to `offset`; they stay as they are. Returns the bytes written.
    pub(super) fn write_to(&self, file: impl AsFd, offset: u64, flags: i32) -> io::Result<u64> {
        let (fd, pending) = (file.as_fd().as_raw_fd(), self.pending());
        // SAFETY: the iovecs are valid for reads by the invariant, and their count is within IOV_MAX.
        retry(|| unsafe { libc::pwritev2(fd, pending.as_ptr(), pending.len() as i32, offset as i64, flags) })
    }

    /// Copies the next `data.len()` bytes of guest memory to `data`; the buffers stay as they are.
    pub(super) fn take(&self, data: &mut [u8]) {
        for (base, at, length) in self.pieces(data.len()) {
            // SAFETY: `base` is valid for `length` bytes by the invariant, and `data[at..]` has room for them. Guest memory
            // and `data` do not overlap.
            unsafe { ptr::copy_nonoverlapping(base, data[at..at + length].as_mut_ptr(), length) };
        }
    }

    /// Copies `data` to the next `data.len()` bytes of guest memory; the buffers stay as they are.
    pub(super) fn fill(&self, data: &[u8]) {
        for (base, at, length) in self.pieces(data.len()) {
            // SAFETY: as in `take`, in the other direction.
            unsafe { ptr::copy_nonoverlapping(data[at..at + length].as_ptr(), base, length) };
        }
    }

    /// The next `count` bytes in pieces: where each is, how many bytes come before it, how long it is.
    fn pieces(&self, count: usize) -> impl Iterator<Item = (*mut u8, usize, usize)> {
        self.iovecs[self.first..]
            .iter()
            .scan(0, move |at, iovec| {
                let (start, length) = (*at, iovec.iov_len.min(count - *at));
                *at += length;
                Some((iovec.iov_base.cast(), start, length))
            })
            .take_while(|(_, _, length)| *length > 0)
    }

    /// Nothing but zeroes is left. A guest that changes the data meanwhile gets what it deserves: one or the other.
    pub(super) fn is_zero(&self) -> bool {
        self.iovecs[self.first..].iter().all(|iovec| {
            let words = iovec.iov_len / 8;
            let base: *const u8 = iovec.iov_base.cast();
            // SAFETY: all reads are inside the iovec, which is valid for reads by the invariant.
            let (word, byte) = (
                |i: usize| unsafe { base.add(i * 8).cast::<u64>().read_unaligned() },
                |i: usize| unsafe { base.add(i).read() },
            );
            (0..words).all(|i| word(i) == 0) && (words * 8..iovec.iov_len).all(|i| byte(i) == 0)
        })
    }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<u64> {
    loop {
        match u64::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

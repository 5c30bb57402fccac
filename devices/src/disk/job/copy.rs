//! Copies between the guest memory of a job and memory of minivmm's: for bounce buffers and for observers.
//!
//! A capability: the threads that wait for the host call these methods of [`Job`] and [`IoBuffers`]. Other jobs move their data without a
//! copy. The copies are memcpy(3) calls that read each byte once. If the guest writes at the same time, a copied byte is the old or the
//! new one.

#![expect(unsafe_code, reason = "iovecs are raw pointers into guest memory")]

use std::ptr;

use libc::iovec;

use super::{IoBuffers, Job};
use crate::disk::positioned_io::IOV_MAX;

impl Job {
    /// Copies the next `data.len()` bytes from guest memory, and advances past them.
    pub(in crate::disk) fn copy_from_guest(&mut self, data: &mut [u8]) {
        self.peek(data);
        self.advance(data.len() as u64);
    }

    /// Copies the next `data.len()` bytes from guest memory.
    pub(in crate::disk) fn peek(&self, data: &mut [u8]) {
        for (guest, at, length) in self.buffers.parts(data.len()) {
            // SAFETY: `guest` is valid for `length` bytes by the invariant, and is no part of `data`.
            unsafe { ptr::copy_nonoverlapping(guest, data[at..at + length].as_mut_ptr(), length) };
        }
    }

    /// Copies `data` into the next `data.len()` bytes of guest memory, and advances past them.
    pub(in crate::disk) fn copy_to_guest(&mut self, data: &[u8]) {
        for (guest, at, length) in self.buffers.parts(data.len()) {
            // SAFETY: as in `peek`, in the other direction.
            unsafe { ptr::copy_nonoverlapping(data[at..at + length].as_ptr(), guest, length) };
        }
        self.advance(data.len() as u64);
    }

    pub(in crate::disk) fn end(&self) -> u64 {
        self.offset + self.length
    }
}

impl IoBuffers {
    /// All of the rest. `None`: one system call cannot take it.
    pub(in crate::disk) fn whole(&self) -> Option<&[iovec]> {
        Some(self.rest()).filter(|rest| rest.len() <= IOV_MAX)
    }

    /// The next `count` bytes, buffer by buffer. Each item is a part's address, how many bytes come before it, and its length.
    fn parts(&self, count: usize) -> impl Iterator<Item = (*mut u8, usize, usize)> {
        self.rest()
            .iter()
            .scan(0, move |at, iovec| {
                let (start, length) = (*at, iovec.iov_len.min(count - *at));
                *at += length;
                Some((iovec.iov_base.cast(), start, length))
            })
            .take_while(|(_, _, length)| *length > 0)
    }
}

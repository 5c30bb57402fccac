//! A transfer while an engine executes it: what is left to do, and where its data is in guest memory.
//!
//! [`IoBuffers`] hold guest memory as iovecs, which is what system calls and io_uring take. They are raw pointers: no Rust
//! reference to guest memory is ever formed, because the guest may write it at any moment. The engine that made the iovecs keeps the
//! memory mapped until the job is finished.

#![expect(unsafe_code, reason = "iovecs are raw pointers into guest memory")]

mod copy;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use libc::iovec;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use super::positioned_io::{IOV_MAX, READ, WRITE, transfer};
use super::{DeviceCommand, DiskError, GuestRange, Operation};
use crate::GuestMemory;

/// What is left of a [`Transfer`](super::Transfer), with host addresses instead of guest ranges. Engines use jobs again, so
/// that their buffer lists keep their allocations.
#[derive(Default)]
pub(super) struct Job {
    pub(super) tag: u32,
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// The guest memory of the rest, for reads and writes.
    pub(super) buffers: IoBuffers,
    /// A command that is executed instead of `operation`, with its data in `buffers`.
    pub(super) command: Option<Arc<dyn DeviceCommand>>,
}

impl Job {
    /// Leaves out the first `count` bytes of a read or write, which are done.
    pub(super) fn advance(&mut self, count: u64) {
        self.buffers.advance(count as usize);
        self.offset += count;
        self.length -= count;
    }
}

/// The host memory of `range`. `None`: it is not contiguous, which is rare.
fn in_one_region<'m>(memory: &'m GuestMemory, range: &GuestRange) -> Option<VolatileSlice<'m>> {
    memory.iter().find_map(|region| {
        let start = region.to_region_addr(range.address)?;
        region.get_slice(start, range.length as usize).ok()
    })
}

/// Guest buffers in the order of the transfer's bytes.
///
/// Invariant: no iovec is empty, and each lies inside guest memory, which stays mapped readable and writable as long as the list
/// has an iovec.
#[derive(Default)]
pub(super) struct IoBuffers {
    iovecs: Vec<iovec>,
    /// Index of the first iovec with bytes left; those before it are done.
    first: usize,
}

// SAFETY: the pointers name guest memory, which belongs to no thread and stays mapped (see the invariant).
unsafe impl Send for IoBuffers {}

impl IoBuffers {
    /// Replaces the list by the host addresses of `ranges`, and returns their length in bytes. Ranges that are neighbors in host
    /// memory become one iovec.
    ///
    /// # Errors
    /// `OutOfRange` when a range is not inside guest memory; the list is then empty.
    ///
    /// # Safety
    /// The caller keeps `memory` mapped until the list is dropped, cleared or resolved anew.
    #[inline(always)]
    pub(super) unsafe fn resolve(
        &mut self,
        memory: &GuestMemory,
        ranges: &[GuestRange],
    ) -> Result<u64, DiskError> {
        self.clear();
        let mut total = 0;
        for range in ranges {
            total += u64::from(range.length);
            match in_one_region(memory, range) {
                Some(slice) => self.push(&slice),
                None => self.push_parts(memory, range)?,
            }
        }
        Ok(total)
    }

    #[cold]
    fn push_parts(&mut self, memory: &GuestMemory, range: &GuestRange) -> Result<(), DiskError> {
        for slice in memory.get_slices(range.address, range.length as usize) {
            let Ok(slice) = slice else {
                self.clear();
                return Err(DiskError::OutOfRange);
            };
            self.push(&slice);
        }
        Ok(())
    }

    fn push(&mut self, slice: &VolatileSlice<'_>) {
        let (base, length) = (slice.ptr_guard_mut().as_ptr(), slice.len());
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => {
                last.iov_len += length
            }
            _ if length == 0 => {}
            _ => self.iovecs.push(iovec { iov_base: base.cast(), iov_len: length }),
        }
    }

    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
    }

    pub(super) fn rest(&self) -> &[iovec] {
        &self.iovecs[self.first..]
    }

    /// The part of the rest that one system call can take.
    pub(super) fn pending(&self) -> &[iovec] {
        let rest = self.rest();
        &rest[..rest.len().min(IOV_MAX)]
    }

    fn advance(&mut self, mut count: usize) {
        while count > 0 && self.first < self.iovecs.len() {
            let iovec = &mut self.iovecs[self.first];
            let step = count.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            count -= step;
            self.first += usize::from(iovec.iov_len == 0);
        }
    }

    /// One read from `offset` into the buffers, which stay as they are. Returns the bytes read.
    #[inline(always)]
    pub(super) fn read_from(&self, file: impl AsFd, offset: u64, flags: i32) -> io::Result<u64> {
        // SAFETY: the iovecs are valid for writes by the invariant.
        unsafe { transfer(READ, file, self.pending(), offset, flags) }
    }

    /// One write of the buffers to `offset`; they stay as they are. Returns the bytes written.
    pub(super) fn write_to(&self, file: impl AsFd, offset: u64, flags: i32) -> io::Result<u64> {
        waypoint!();
        // SAFETY: the iovecs are valid for reads by the invariant.
        unsafe { transfer(WRITE, file, self.pending(), offset, flags) }
    }
}

//! Guest RAM replaced by new RAM: all of it at a reset, or where a file's pages were.
//!
//! A capability: a machine that boots once has memory that is new already. Resets, restores and `kernel_pages` call it.

use std::io;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{NO_CORE_DUMP, advise, host_address};
use crate::GuestMemory;
use crate::error::Error;

/// Gives all guest RAM back to the host, so that it reads as zeroes. No vCPU runs, and no device has anything in flight.
///
/// # Errors
/// The host refuses, and the guest may have lost memory.
pub(crate) fn clear(memory: &GuestMemory) -> Result<(), Error> {
    for region in memory.iter() {
        let (start, length) = (region.start_addr(), region.len());
        if region.flags() & libc::MAP_HUGETLB == 0 {
            // Not MADV_DONTNEED: a file's pages (`kernel_pages`) would come back as the file has them by then.
            renew(memory, start, length)
        } else {
            // Given back to their pool, these pages could be taken by another process before the guest needs them again.
            write_zeroes(memory, start, length)
        }
        .map_err(Error::host("clear guest memory"))?;
    }
    Ok(())
}

/// Maps new pages, which are zero, in place of `length` bytes of RAM at `address`: whole pages of 4 KiB.
///
/// # Errors
/// The host refuses, and the guest may have lost that memory.
#[expect(unsafe_code, reason = "guest memory is mapped anew")]
pub(crate) fn renew(memory: &GuestMemory, address: GuestAddress, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let host = host_address(memory, address, length)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range is inside one mapping of guest memory, which lives as long as `memory` and is unmapped as a whole;
    // there are no Rust references into it, and its content may change any time. The new pages are as private, as
    // writable, and as many.
    unsafe { mmap_anonymous(host, length as usize, protection, flags) }?;
    advise(memory, address, length, NO_CORE_DUMP);
    Ok(())
}

fn write_zeroes(memory: &GuestMemory, start: GuestAddress, length: u64) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    for at in (0..length).step_by(ZEROES.len()) {
        let piece = &ZEROES[..ZEROES.len().min((length - at) as usize)];
        memory.write_slice(piece, GuestAddress(start.0 + at)).map_err(io::Error::other)?;
    }
    Ok(())
}

//! Guest RAM: anonymous private memory of the host, which supplies a page when the guest first touches it, unless RAM is huge pages
//! ([`crate::hugepages`]).
//!
//! After [`allocate`] (in the builder) and [`clear()`] (at a reset) all of RAM reads as zero. [`crate::boot_image`] relies on that: it
//! writes no zeroes, so the pages of a kernel's `.bss` cost nothing.

mod clear;

use std::ffi::c_void;
use std::io;

use arch::machine_layout::MachineLayout;
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

pub(crate) use self::clear::{clear, renew};
use crate::GuestMemory;
use crate::error::{Cause, Error};

const MIB: u64 = 1 << 20;

/// Keeps guest memory out of a core dump of minivmm: it is the guest's data, and may have many gigabytes.
pub(crate) const NO_CORE_DUMP: Advice = Advice::LinuxDontDump;

/// Maps the RAM of `layout`.
///
/// # Errors
/// More than the host has, or the host refuses the mapping.
pub(crate) fn allocate(layout: &MachineLayout) -> Result<GuestMemory, Error> {
    check_size(layout)?;
    map(layout, libc::MAP_NORESERVE)
}

/// Checks that the host has as much memory as the guest is to have.
///
/// # Errors
/// The host has less.
pub(crate) fn check_size(layout: &MachineLayout) -> Result<(), Error> {
    let bytes = layout.spec.memory;
    let info = rustix::system::sysinfo();
    // Both fields are C `unsigned long`s counted in `mem_unit` bytes (sysinfo(2)).
    let host = info.totalram.saturating_mul(u64::from(info.mem_unit));
    if bytes > host {
        return Err(Error::TooMuchMemory { wanted_mib: bytes / MIB, host_mib: host / MIB });
    }
    Ok(())
}

/// Maps the RAM of `layout` with these flags besides those of any private memory (mmap(2)).
///
/// # Errors
/// The host refuses the mapping.
pub(crate) fn map(layout: &MachineLayout, flags: i32) -> Result<GuestMemory, Error> {
    let bytes = layout.spec.memory;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    let region = |&(start, size): &(GuestAddress, usize)| {
        let mapping = MmapRegion::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(refused(bytes))?;
        GuestRegionMmap::new(mapping, start).ok_or_else(|| refused(bytes)("it wraps around"))
    };
    let regions = layout.ram.iter().map(region).collect::<Result<Vec<_>, _>>()?;
    let memory = GuestMemoryMmap::from_regions(regions).map_err(refused(bytes))?;
    for region in memory.iter() {
        advise(&memory, region.start_addr(), region.len(), NO_CORE_DUMP);
    }
    Ok(memory)
}

fn refused<E: Into<Cause>>(bytes: u64) -> impl FnOnce(E) -> Error {
    move |error| Error::Memory { mib: bytes / MIB, source: error.into() }
}

/// Gives the host `advice` about the `length` bytes of RAM at `address`. The advice must not change their content. The host may refuse
/// or ignore it.
#[expect(unsafe_code, reason = "madvise takes a pointer")]
pub(crate) fn advise(memory: &GuestMemory, address: GuestAddress, length: u64, advice: Advice) {
    if let Ok(host) = host_address(memory, address, length) {
        // SAFETY: the range is inside one mapping of guest memory.
        let _ = unsafe { madvise(host, length as usize, advice) };
    }
}

/// The address in this process of the `length` bytes of RAM at `address`.
///
/// # Errors
/// They are not all in one region of RAM.
pub(crate) fn host_address(
    memory: &GuestMemory,
    address: GuestAddress,
    length: u64,
) -> io::Result<*mut c_void> {
    let slice = memory.get_slice(address, length as usize).map_err(io::Error::other)?;
    Ok(slice.ptr_guard_mut().as_ptr().cast())
}

/// The host's own error, if `error` only wraps one.
pub(crate) fn into_io(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        // As from a file of sysfs, which has less than its size says.
        GuestMemoryError::PartialBuffer { .. } => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other),
    }
}

//! Guest RAM: anonymous private memory of the host, whose pages the host supplies when the guest first touches them; or huge
//! pages ([`crate::hugepages`]).
//!
//! The builder calls [`allocate`] and a reset calls [`clear`]. After either all of RAM reads as zero, which is what
//! [`crate::boot_image`] relies on: it writes no zeroes, and so the pages of a kernel's `.bss` cost nothing.

use std::ffi::c_void;
use std::io;

use arch::machine_layout::MachineLayout;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::GuestMemory;
use crate::error::{Cause, Error};

const MIB: u64 = 1 << 20;

/// A core dump of minivmm does not hold guest memory: that is the guest's data, and can be many gigabytes.
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

/// Gives all guest RAM back to the host: what the guest finds there next is zeroes. No vCPU runs, and no device has anything in
/// flight.
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

/// Replaces `length` bytes of RAM at `address`, whole pages of the ordinary size, by new ones, which are zero.
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

/// Gives the host `advice`, which changes no content, on the `length` bytes of RAM at `address`. A host may refuse or ignore it.
#[expect(unsafe_code, reason = "madvise takes a pointer")]
pub(crate) fn advise(memory: &GuestMemory, address: GuestAddress, length: u64, advice: Advice) {
    if let Ok(host) = host_address(memory, address, length) {
        // SAFETY: the range is inside one mapping of guest memory.
        let _ = unsafe { madvise(host, length as usize, advice) };
    }
}

/// Where the `length` bytes of RAM at `address`, all in one region, are in this process.
///
/// # Errors
/// They are not all RAM.
pub(crate) fn host_address(
    memory: &GuestMemory,
    address: GuestAddress,
    length: u64,
) -> io::Result<*mut c_void> {
    let slice = memory.get_slice(address, length as usize).map_err(io::Error::other)?;
    Ok(slice.ptr_guard_mut().as_ptr().cast())
}

/// The host's own error, where guest memory only passes it on.
pub(crate) fn into_io(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

fn write_zeroes(memory: &GuestMemory, start: GuestAddress, length: u64) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    for at in (0..length).step_by(ZEROES.len()) {
        let piece = &ZEROES[..ZEROES.len().min((length - at) as usize)];
        memory.write_slice(piece, GuestAddress(start.0 + at)).map_err(io::Error::other)?;
    }
    Ok(())
}

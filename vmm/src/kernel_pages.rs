//! Maps pages of the kernel's file into guest memory, so that a start costs neither the time nor the memory of a copy.
//!
//! A capability: without it the kernel is copied. It hooks in as the [`FilePages`] of a boot image. At SIGIO, a
//! [`Task`](crate::machine::Task) of the machine's standstill gives the file up.
//!
//! The mapping is private, but shows what other programs write into the file, except in pages that the guest has written. If the file is
//! truncated, its pages disappear from all mappings, and an access to them is an error (mmap(2)). A compiler that writes a new kernel in
//! place would do both to a running guest. So pages are mapped only if one of these protects them:
//!
//! - the seals of a memfd (`F_SEAL_WRITE` and `F_SEAL_SHRINK`), which hold for good;
//! - a read lease (fcntl(2), `F_SETLEASE`). While minivmm has it, a process that opens the file for writing or truncates it waits, and
//!   the host sends SIGIO, which the main loop reads from its signalfd. The main loop stops the guest, [`copy`] replaces the mapped pages
//!   by copies, and [`release`] lets the writer go on.
//!
//! The host takes the lease away after `/proc/sys/fs/lease-break-time` (45 s). If the machine does not stand still for the copy, it ends
//! at `--stop-timeout`: [`lease_outlasts`] says whether that is earlier. If the file is truncated nevertheless, [`copy`] gets an error
//! and no signal, because it reads the pages by write(2).
//!
//! The host gives no lease on another user's file (without CAP_LEASE), on a file that is open for writing, or on a network file system.
//! Then the kernel is copied.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::time::Duration;

use arch::boot::FileRange;
use arch::layout::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, mmap};
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::GuestMemory;
use crate::boot_image::{BootImage, FilePages};
use crate::error::Error;
use crate::memory::{self, NO_CORE_DUMP, host_address, into_io};

/// The [`FilePages`] of a machine.
pub(crate) struct KernelPages {
    /// Whether to map pages. Otherwise the kernel is always copied.
    pub map: bool,
}

impl FilePages for KernelPages {
    fn lease(&self, file: &File) -> bool {
        self.map && lease(file)
    }

    fn map_start(
        &self,
        memory: &GuestMemory,
        file: &File,
        range: &FileRange,
        leased: bool,
    ) -> io::Result<u64> {
        if leased {
            return map(memory, file, range);
        }
        prefer_huge(memory, range);
        Ok(0)
    }
}

/// Takes a read lease on `file`, unless seals make that unnecessary. The caller has blocked SIGIO. `false`: the host gives none.
#[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
pub(crate) fn lease(file: &File) -> bool {
    let seals = SealFlags::WRITE | SealFlags::SHRINK;
    fcntl_get_seals(file).is_ok_and(|present| present.contains(seals))
        // SAFETY: the call touches no memory of this process.
        || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0
}

/// Whether the host waits longer than `limit` before it takes a lease away that it has asked for.
pub(crate) fn lease_outlasts(limit: Duration) -> bool {
    let seconds = std::fs::read_to_string("/proc/sys/fs/lease-break-time");
    // Without /proc: the host's default.
    let seconds = seconds.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(45);
    Duration::from_secs(seconds) > limit
}

/// Gives up the lease. Without one this does nothing.
#[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
pub(crate) fn release(file: &File) {
    // SAFETY: the call touches no memory of this process.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Maps the whole pages of `range` of the leased `file` into guest memory that is not in use yet. Returns how many bytes from the
/// start of the range are mapped. The rest has to be copied.
///
/// # Errors
/// The host refuses the mapping.
#[expect(unsafe_code, reason = "guest memory is mapped anew")]
pub(crate) fn map(memory: &GuestMemory, file: &File, range: &FileRange) -> io::Result<u64> {
    let length = whole_pages(memory, range);
    if length > 0 {
        let host = host_address(memory, range.address, length)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range is inside one mapping of guest memory, which lives as long as `memory` and is unmapped as a
        // whole; there are no Rust references into it. The new pages are as private, as writable, and as many.
        unsafe { mmap(host, length as usize, protection, flags, file, range.offset) }?;
        memory::advise(memory, range.address, length, NO_CORE_DUMP);
    }
    Ok(length)
}

/// Replaces the pages that [`map`] may have mapped for `range` by copies, while nothing uses that memory. To write to the pages would
/// not be enough: when the file is truncated, even written pages disappear.
///
/// # Errors
/// The host has no memory left, or the file was truncated already.
pub(crate) fn copy(memory: &GuestMemory, range: &FileRange) -> io::Result<()> {
    let length = whole_pages(memory, range);
    let mut content = File::from(memfd_create("kernel-pages", MemfdFlags::CLOEXEC)?);
    memory.write_all_volatile_to(range.address, &mut content, length as usize).map_err(into_io)?;
    content.rewind()?;
    memory::renew(memory, range.address, length)?;
    prefer_huge(memory, range);
    memory.read_exact_volatile_from(range.address, &mut content, length as usize).map_err(into_io)
}

/// Asks for transparent huge pages for the memory that `range` will be copied to, since most of the time of a copy is page faults. A
/// host without them refuses, which is harmless.
fn prefer_huge(memory: &GuestMemory, range: &FileRange) {
    memory::advise(memory, range.address, whole_pages(memory, range), Advice::LinuxHugepage);
}

/// How many bytes of `range` can be mapped: its whole pages, if it begins on a page boundary in the file and in memory, and guest memory
/// is private and has pages of 4 KiB. Otherwise 0.
fn whole_pages(memory: &GuestMemory, range: &FileRange) -> u64 {
    let FileRange { offset, address, length } = *range;
    let flags = memory.find_region(address).map_or(0, |region| region.flags());
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let suitable = flags & (private | libc::MAP_HUGETLB) == private;
    if suitable && offset.is_multiple_of(PAGE_SIZE) && address.0.is_multiple_of(PAGE_SIZE) {
        length & !(PAGE_SIZE - 1)
    } else {
        0
    }
}

impl BootImage {
    /// Replaces the mapped pages of the kernel by copies, and releases the lease, so that a waiting writer of the file goes on. Neither
    /// the guest nor a device uses `memory` meanwhile.
    ///
    /// # Errors
    /// The host has no memory left, or the file was truncated before it was copied. The guest has then lost memory.
    pub(crate) fn copy_and_release_kernel_file(&self, memory: &GuestMemory) -> Result<(), Error> {
        for range in &self.plan.kernel {
            copy(memory, range)
                .map_err(Error::host("copy the kernel's pages, whose file is being changed"))?;
        }
        release(&self.kernel.file);
        Ok(())
    }
}

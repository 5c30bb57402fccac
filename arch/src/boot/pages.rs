//! A file's pages as guest memory: mapped privately where that is safe, so that neither time nor memory goes into a copy.
//!
//! A private mapping shows what others write into the file for as long as the guest has not written to the page itself,
//! and turns into bus errors where the file is cut off (mmap(2)). A kernel that somebody compiles anew in its place must
//! not do that to a guest that runs. So pages are mapped only while the file's content is *held*:
//! - by the seals of a memfd (memfd_create(2), `F_SEAL_WRITE` and `F_SEAL_SHRINK`), for good;
//! - by a read lease (fcntl(2), `F_SETLEASE`): whoever opens the file for writing, or truncates it, waits until the lease
//!   is given up, for which the host asks by SIGIO. [`own`] then makes copies after all, and [`release`] lets the writer
//!   go on.
//!
//! The host gives no lease on another user's file (without CAP_LEASE), on one that is open for writing, and on network
//! file systems: what cannot be held is copied.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Error, PAGE_SIZE};
use crate::GuestMemory;

/// Transparent huge pages on x86-64.
const HUGE_PAGE_SIZE: usize = 2 << 20;

/// Whether nobody can change `file` from now on without asking us first. SIGIO has to be blocked: it asks.
#[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
pub(super) fn hold(file: &File) -> bool {
    let seals = SealFlags::WRITE | SealFlags::SHRINK;
    fcntl_get_seals(file).is_ok_and(|present| present.contains(seals))
        // SAFETY: the call touches no memory of ours.
        || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0
}

/// Gives up the lease, if there is one.
#[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
pub(super) fn release(file: &File) {
    // SAFETY: the call touches no memory of ours. Without a lease it fails, and nothing is lost.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Puts `length` bytes at `offset` of `file` to `address`, which up to there is RAM in one piece: by mapping whole pages if
/// the file's content is `held` and both ends agree on where pages begin, by copying the rest. Nobody uses that memory yet.
pub(super) fn place(
    memory: &GuestMemory,
    mut file: &File,
    held: bool,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), Error> {
    let file_size = file.metadata().map_err(Error::Read)?.len();
    let inside = offset.checked_add(length).is_some_and(|end| end <= file_size);
    let pages = mappable(memory, offset, address, length);
    let source = (held && inside).then_some((file, offset));
    map(memory, address, pages, source).map_err(Error::MapKernel)?;
    let done = if source.is_some() { pages } else { 0 };
    file.seek(SeekFrom::Start(offset + done)).map_err(Error::Read)?;
    memory
        .read_exact_volatile_from(GuestAddress(address + done), &mut file, (length - done) as usize)
        .map_err(|source| Error::CopyKernel { source: source.into() })
}

/// How many of `length` bytes at `address` are pages of their own that pages of a file can take the place of: where they
/// begin together, and guest memory is private and has pages of the ordinary size.
fn mappable(memory: &GuestMemory, offset: u64, address: u64, length: u64) -> u64 {
    let flags = memory.find_region(GuestAddress(address)).map_or(0, |region| region.flags());
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let suitable = flags & (private | libc::MAP_HUGETLB) == private;
    if suitable && offset.is_multiple_of(PAGE_SIZE) && address.is_multiple_of(PAGE_SIZE) {
        length & !(PAGE_SIZE - 1)
    } else {
        0
    }
}

/// Lets the `length` bytes of RAM at `address`, whole pages, be those of a file from an offset on; or new ones, which may be
/// huge: most of the work of a copy is page faults.
#[expect(unsafe_code, reason = "guest memory is mapped anew")]
fn map(memory: &GuestMemory, address: u64, length: u64, source: Option<(&File, u64)>) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let slice = memory.get_slice(GuestAddress(address), length as usize).map_err(io::Error::other)?;
    let host = slice.ptr_guard_mut().as_ptr();
    let (kind, fd, offset) = match source {
        Some((file, offset)) => (0, file.as_raw_fd(), offset),
        None => (libc::MAP_ANONYMOUS, -1, 0),
    };
    // SAFETY: the range is inside one mapping of guest memory, which lives as long as `memory` and is unmapped as a whole;
    // there are no Rust references into it. The new pages are as private, as writable, and as long.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | kind;
        if libc::mmap(host.cast(), length as usize, access, flags, fd, offset as libc::off_t) == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if source.is_none() {
            let (start, end) = (host.addr().next_multiple_of(HUGE_PAGE_SIZE), host.addr() + length as usize);
            // A wish: a host without huge pages refuses.
            libc::madvise(
                host.with_addr(start).cast(),
                end.saturating_sub(start) & !(HUGE_PAGE_SIZE - 1),
                libc::MADV_HUGEPAGE,
            );
        }
    }
    Ok(())
}

/// Replaces what [`place`] may have mapped by copies, for which it is given the same places. Nobody uses that memory
/// meanwhile. Writing to the pages would not do: cutting off a file takes even written pages of its mappings away.
pub(super) fn own(memory: &GuestMemory, offset: u64, address: u64, length: u64) -> io::Result<()> {
    let mut content = vec![0; HUGE_PAGE_SIZE];
    let pages = mappable(memory, offset, address, length);
    for at in (0..pages).step_by(HUGE_PAGE_SIZE) {
        let (at, content) = (address + at, &mut content[..(pages - at).min(HUGE_PAGE_SIZE as u64) as usize]);
        memory.read_slice(content, GuestAddress(at)).map_err(io::Error::other)?;
        map(memory, at, content.len() as u64, None)?;
        memory.write_slice(content, GuestAddress(at)).map_err(io::Error::other)?;
    }
    Ok(())
}

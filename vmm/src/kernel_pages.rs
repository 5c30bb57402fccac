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
//! - a read [`Lease`] (fcntl(2), `F_SETLEASE`). While minivmm has it, a process that opens the file for writing or truncates it waits, and
//!   the host sends SIGIO, which the main loop reads from its signalfd. The main loop stops the guest, [`copy`] replaces the mapped pages
//!   by copies, and the end of the [`Lease`] lets the writer go on.
//!
//! By then the process is confined, its user may have changed, and the host may be short of anything. So all that the copy needs, except
//! for the memory of the copies, is there when the lease is taken: an open file whose end is the end of the lease (`F_UNLCK` needs the
//! file's owner or CAP_LEASE), a pipe, and a buffer. Where one of them is missing, nothing is mapped. The copy makes no system call that the
//! start has not made, so that no filter refuses one only then.
//!
//! The host takes the lease away after `/proc/sys/fs/lease-break-time` (45 s). If the machine does not stand still for the copy, it ends
//! at `--stop-timeout`: [`lease_outlasts`] says whether that is earlier. If the file is truncated nevertheless, [`copy`] gets an error
//! and no signal, because it reads the pages by write(2).
//!
//! The host gives no lease on another user's file (without CAP_LEASE), on a file that is open for writing, or on a network file system.
//! Then the kernel is copied.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use arch::boot::FileRange;
use arch::layout::PAGE_SIZE;
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::mm::{Advice, MapFlags, ProtFlags, mmap};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, getpid, kill_process};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, WriteVolatile};

use crate::boot_image::{BootImage, FilePages};
use crate::error::Error;
use crate::memory::{self, NO_CORE_DUMP, host_address, into_io};
use crate::{GuestMemory, host_cpu, lock};

/// How many bytes are copied at once: a transparent huge page.
const CHUNK: usize = 2 << 20;

/// What [`copy`] reads the pages through.
static PIPE: OnceLock<io::Result<(File, File)>> = OnceLock::new();
/// Its pages cost nothing before the first copy.
static BUFFER: Mutex<[u8; CHUNK]> = Mutex::new([0; CHUNK]);
/// All leases of this process.
static LEASES: Mutex<Vec<Weak<Lease>>> = Mutex::new(Vec::new());

/// The [`FilePages`] of a machine. `None`: the kernel is copied.
pub(crate) struct KernelPages(pub(crate) Option<Arc<Lease>>);

impl KernelPages {
    /// Takes a lease on the `kernel`, if it is to be mapped. A restored machine `boots` only at a reset, when it is confined and cannot take a
    /// lease. It takes none before, because a writer of the kernel would then make it copy its RAM for nothing.
    pub(crate) fn of(kernel: &File, boots: bool, stop_timeout: Duration) -> Self {
        // If the host is a guest itself and its CPU has hardware virtualization, each mapped page costs an exit through two hypervisors.
        let map = boots && !host_cpu::is_nested() && lease_outlasts(stop_timeout);
        Self(map.then(|| Lease::take(kernel)).flatten())
    }
}

impl FilePages for KernelPages {
    fn map_start(&self, memory: &GuestMemory, file: &File, range: &FileRange) -> io::Result<u64> {
        if self.0.is_some() {
            return map(memory, file, range);
        }
        prefer_huge(memory, range.address, whole_pages(memory, range));
        Ok(0)
    }

    fn copy_and_release(&mut self, memory: &GuestMemory, ranges: &[FileRange]) -> io::Result<()> {
        // It ends after the copy, even if that fails.
        let Some(_lease) = self.0.take() else { return Ok(()) };
        ranges.iter().try_for_each(|range| copy(memory, range))
    }
}

/// A read lease on a file, or a copy of the descriptor of a file whose seals make that unnecessary. The lease belongs to an open file
/// description (open(2)) of its own, and ends when that is closed. Pages are mapped from another one, because a mapping would keep it open.
pub(crate) struct Lease(pub(crate) File);

impl Lease {
    /// Takes a lease on `file`, and gets ready for [`copy`]. The caller has blocked SIGIO. `None`: the host gives no lease, or lacks what
    /// [`copy`] needs.
    #[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
    pub(crate) fn take(file: &File) -> Option<Arc<Self>> {
        pipe().ok()?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK;
        if fcntl_get_seals(file).is_ok_and(|present| present.contains(seals)) {
            return Some(Arc::new(Self(file.try_clone().ok()?)));
        }
        // O_NONBLOCK: open(2) does not wait for another process's lease.
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let own = options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        // SAFETY: the call touches no memory of this process.
        let given = unsafe { libc::fcntl(own.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0;
        let lease = Some(Arc::new(Self(own))).filter(|lease| given && lease.renew_owner())?;
        lock(&LEASES).push(Arc::downgrade(&lease));
        Some(lease)
    }

    /// Has the host send SIGIO to the process as it is now. `false`: it refuses, or another process has asked for the lease before.
    #[expect(unsafe_code, reason = "fcntl has no safe wrapper for leases")]
    fn renew_owner(&self) -> bool {
        let (lease, process) = (self.0.as_raw_fd(), getpid().as_raw_pid());
        // SAFETY: neither call touches memory of this process.
        unsafe {
            libc::fcntl(lease, libc::F_SETOWN, process) == 0
                && libc::fcntl(lease, libc::F_GETLEASE) == libc::F_RDLCK
        }
    }
}

/// Called when the main thread has become another user. The host sends SIGIO only if the user who took the lease may send a signal to the
/// main thread: only root of the host's own user namespace may always. If SIGIO may have been lost, this process sends it to itself.
pub(crate) fn user_has_changed() {
    let leases: Vec<_> = lock(&LEASES).iter().filter_map(Weak::upgrade).collect();
    if !leases.iter().all(|lease| lease.renew_owner()) {
        // A process may always send a signal to itself.
        let _ = kill_process(getpid(), Signal::IO);
    }
}

/// Whether the host waits longer than `limit` before it takes a lease away that it has asked for.
pub(crate) fn lease_outlasts(limit: Duration) -> bool {
    let seconds = std::fs::read_to_string("/proc/sys/fs/lease-break-time");
    // Without /proc: the host's default.
    let seconds = seconds.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(45);
    Duration::from_secs(seconds) > limit
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
    let mut buffer = lock(&BUFFER);
    let end = range.address.0 + whole_pages(memory, range);
    let mut address = range.address;
    while address.0 < end {
        let left = end - address.0;
        // Up to a boundary of huge pages.
        let boundary = CHUNK - host_address(memory, address, left)? as usize % CHUNK;
        let content = &mut buffer[..boundary.min(left as usize)];
        let length = content.len() as u64;
        read(memory, address, content)?;
        memory::renew(memory, address, length)?;
        prefer_huge(memory, address, length);
        memory.write_slice(content, address).map_err(into_io)?;
        address.0 += length;
    }
    Ok(())
}

/// Reads guest memory through the pipe: if the file was truncated, write(2) fails. An access to the memory would be a signal.
fn read(memory: &GuestMemory, address: GuestAddress, content: &mut [u8]) -> io::Result<()> {
    let (mut reader, mut writer) = pipe()?;
    let pages = memory.get_slice(address, content.len()).map_err(into_io)?;
    let mut done = 0;
    while done < content.len() {
        // As much as the pipe takes, which has no limit on the size of files.
        let written = pages.offset(done).and_then(|rest| writer.write_volatile(&rest));
        let read = done..done + written.map_err(|error| into_io(error.into()))?;
        reader.read_exact(&mut content[read.clone()])?;
        done = read.end;
    }
    Ok(())
}

fn pipe() -> io::Result<(&'static File, &'static File)> {
    let make = || Ok(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?);
    let pipe = PIPE.get_or_init(|| make().map(|(reader, writer)| (reader.into(), writer.into())));
    let (reader, writer) = pipe.as_ref().map_err(|error| io::Error::from(error.kind()))?;
    Ok((reader, writer))
}

/// Asks for transparent huge pages for memory to which a file will be copied, since most of the time of a copy is page faults. A host
/// without them refuses, which is harmless.
fn prefer_huge(memory: &GuestMemory, address: GuestAddress, length: u64) {
    memory::advise(memory, address, length, Advice::LinuxHugepage);
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
    /// Replaces the mapped pages of the kernel by copies, and ends the lease, so that a waiting writer of the file goes on. Neither
    /// the guest nor a device uses `memory` meanwhile.
    ///
    /// # Errors
    /// The host has no memory left, or the file was truncated before it was copied. The guest has then lost memory.
    pub(crate) fn copy_and_release_kernel_file(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<(), Error> {
        self.pages
            .copy_and_release(memory, &self.plan.kernel)
            .map_err(Error::host("copy the kernel's pages, whose file is being changed"))
    }
}

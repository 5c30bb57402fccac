//! A background save: writes guest memory as it was at the standstill, while the guest goes on.
//!
//! A child process has the memory as it was at the fork. All guest memory is mapped privately, so before the guest, a disk's thread or
//! io_uring changes a page in this process, the host's kernel copies that page.
//!
//! The child closes every descriptor except for the file and a pipe (close_range(2), Linux 5.9). It writes RAM to its place in the file,
//! reports each block through the pipe, and ends. It allocates nothing and takes no lock, because another thread may have held one at the
//! fork. It has the seccomp filter of the thread that forked (`sandbox::Kind::Save`), which does not allow it to open anything. This
//! process writes headers and notes, and gives the file its name.
//!
//! If this process ends, the kernel kills the child. If the pipe has no reader, the child ends after the block that it is writing. If the
//! save is canceled or fails, this process kills the child. A child in a write that the host does not complete ends later: the save does
//! not wait, and its file gets no name.
//!
//! The disks go on, too. So [`check`] refuses a machine whose guest would write to its disks meanwhile.

#![expect(unsafe_code, reason = "fork, and what the child does without the standard library")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::spawn::Spawn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, pidfd_send_signal, waitpid};
use vm_memory::GuestMemoryBackend;

use super::checksum::BLOCK;
use super::pages::{Block, RamSave, Written};
use super::save::{self, Destination, Progress, UnwrittenSave, WriteInBackground};
use super::saved::{Purpose, SavedConfig};
use super::{SnapshotError, saved};
use crate::GuestMemory;
use crate::error::Error;
use crate::events::EventSender;
use crate::job_thread::{JobThread, PendingResult};
use crate::lock;
use crate::machine::{Machine, RunState};

/// The thread `save`, which may start a child process.
pub(crate) struct SaveThread(JobThread);

impl SaveThread {
    /// Starts the thread, which wakes `main_loop` when a save is over.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn start(spawn: &Spawn, main_loop: Arc<EventSender>) -> Result<Self, Error> {
        JobThread::spawn(spawn, "save", main_loop).map(Self)
    }
}

/// A background save under way.
pub(crate) struct BackgroundSave {
    result: PendingResult,
    /// The channel closes when nothing is left to do.
    is_over: Receiver<()>,
}

impl BackgroundSave {
    /// The result, if the file is complete or the save has failed.
    pub(crate) fn poll(&self) -> Option<Result<(), Error>> {
        self.result.poll()
    }

    /// Waits until a canceled save has removed its file. Otherwise this process could end before that.
    pub(crate) fn wait(&self) {
        let _ = self.is_over.recv_timeout(END_TIMEOUT);
    }
}

/// How long the end of the process waits for a canceled save. The child is killed, and ends at once unless the file's disk does not
/// answer.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the end of a save waits until the child has ended.
const CHILD_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// How often a save checks whether it was canceled, while it waits for the child's next message.
const CANCEL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Saves `machine` as of the next standstill, after which it goes on. Returns the number of the `Done` event, which comes then.
///
/// # Errors
/// The target cannot be made, the machine is busy, or it cannot be saved in the background. Nothing has changed then.
pub(crate) fn begin_in_background(
    machine: &mut Machine,
    config: SavedConfig,
    destination: Destination,
    progress: &Progress,
    purpose: Purpose,
    background: &SaveThread,
) -> Result<(u64, BackgroundSave), Error> {
    check(machine)?;
    let (send_save, save) = channel::<(UnwrittenSave, _)>();
    let (over, is_over) = channel();
    let result = background.0.run(move || {
        let _over: Sender<()> = over;
        let (save, guest_may_go_on) = save.recv().map_err(|_| Error::Ending)?;
        let mut guest_may_go_on: Option<Sender<_>> = Some(guest_may_go_on);
        let forked = || drop(guest_may_go_on.take().map(|sender| sender.send(Ok(()))));
        match (save.write(|ram| write(ram, forked)), guest_may_go_on) {
            (Err(error), Some(guest_may_go_on)) => {
                let _ = guest_may_go_on.send(Err(error));
                Err(Error::Ending)
            }
            (result, _) => result,
        }
    });
    let hand_over: WriteInBackground = Box::new(move |save| {
        let (send, guest_may_go_on) = channel();
        let _ = send_save.send((save, send));
        guest_may_go_on.recv().unwrap_or(Err(Error::ThreadPanicked))
    });
    let id = save::begin_with(machine, config, destination, progress, purpose, Some(hand_over))?;
    machine.background_save = Some(Arc::clone(&progress.cancel));
    Ok((id, BackgroundSave { result, is_over }))
}

/// Refuses a machine that cannot be saved in the background.
///
/// A guest that goes on also writes to its disks, and a restore would have disks from later than its memory. So the guest must have no
/// writable disk, or be stopped until the user has copied the images. Huge pages are refused, because the host would need free ones for
/// the copies.
fn check(machine: &Machine) -> Result<(), Error> {
    let hardware = &machine.hardware;
    check_pages(&hardware.memory).map_err(Error::save)?;
    let mut written = hardware.disks.iter().filter(|disk| !disk.image.info().read_only);
    match written.next() {
        Some(disk) if machine.state() == RunState::Running => {
            Err(saved::unsaveable(&disk.config.id, DISK_GOES_ON))
        }
        _ => Ok(()),
    }
}

/// Refuses memory of huge pages. To copy one, the host needs a free page in its pool. If there is none, it kills the process that writes to the page.
fn check_pages(memory: &GuestMemory) -> Result<(), SnapshotError> {
    let is_huge = memory.iter().any(|region| region.flags() & libc::MAP_HUGETLB != 0);
    if is_huge { Err(SnapshotError::HugePages) } else { Ok(()) }
}

const DISK_GOES_ON: &str = "the guest would go on writing to it; send `stop` before the save, copy the image when the save is active, then send `cont`";

/// The child's message about a block: bytes and checksum, or `FAILED` and an errno.
type Message = [u64; 2];
const FAILED: u64 = u64::MAX;

/// Writes RAM as it is now. Calls `forked` when the child has RAM as it is now: from then on the guest may change RAM.
fn write(ram: &RamSave<'_>, forked: impl FnOnce()) -> io::Result<Vec<u64>> {
    let mut buffer = vec![0; BLOCK as usize];
    let blocks: Vec<Block> = ram.blocks().collect();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (mut reader, writer) = (File::from(reader), File::from(writer));
    Child::reap_former();
    // SAFETY: the child calls nothing that allocates or takes a lock, and never returns.
    let child = match unsafe { fork() }? {
        Some(child) => child,
        None => write_as_child(ram.memory, &blocks, &mut buffer, ram.file, &writer),
    };
    drop((writer, buffer));
    forked();
    let result = follow(ram, &blocks, &mut reader);
    // A child that still writes finds that the pipe has no reader, and ends.
    drop(reader);
    child.end(result.is_err());
    result
}

struct Child {
    id: Pid,
    /// A pidfd. `None`: the kernel is older than Linux 5.2.
    descriptor: Option<OwnedFd>,
}

/// Children that were not reaped yet (waitpid(2)).
static FORMER: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

impl Child {
    /// Waits until the child has ended, for [`CHILD_TIMEOUT`] at most. If it `is_needless`, kills it first.
    fn end(self, is_needless: bool) {
        if let Some(descriptor) = &self.descriptor {
            if is_needless {
                // It fails if the child has ended already.
                let _ = pidfd_send_signal(descriptor, Signal::KILL);
            }
            let _ = poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&CHILD_TIMEOUT));
        }
        lock(&FORMER).push(self.id);
        Self::reap_former();
    }

    /// Reaps former children that have ended.
    fn reap_former() {
        lock(&FORMER)
            .retain(|child| matches!(waitpid(Some(*child), WaitOptions::NOHANG), Ok(None)));
    }
}

/// Reads the child's messages until all blocks are written. Returns the checksums.
fn follow(ram: &RamSave<'_>, blocks: &[Block], reader: &mut File) -> io::Result<Vec<u64>> {
    let mut checksums = Vec::with_capacity(blocks.len());
    for block in blocks {
        wait_until_readable(reader, ram)?;
        let mut message = [[0; 8]; 2];
        reader.read_exact(message.as_flattened_mut()).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::other("the process that writes it was killed; save again")
            }
            _ => error,
        })?;
        let [bytes, checksum] = message.map(u64::from_ne_bytes);
        if bytes == FAILED {
            return Err(match checksum as i32 {
                libc::ENOSYS => io::Error::other(
                    "the host's kernel has no close_range(2), as Linux 5.9 has; save without --background (QMP: background-snapshot)",
                ),
                code => io::Error::from_raw_os_error(code),
            });
        }
        ram.count(block, &Written { bytes, checksum })?;
        checksums.push(checksum);
    }
    Ok(checksums)
}

/// Waits until the child has sent a message, or has closed the pipe.
///
/// # Errors
/// The save is canceled meanwhile.
fn wait_until_readable(reader: &File, ram: &RamSave<'_>) -> io::Result<()> {
    while let Ok(0) | Err(rustix::io::Errno::INTR) =
        poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&CANCEL_INTERVAL))
    {
        ram.check_cancel()?;
    }
    Ok(())
}

/// fork(2) as a direct system call, because libc's function runs handlers, and the seccomp filter of the calling thread allows only these
/// arguments. The kernel also makes a descriptor of the child (CLONE_PIDFD). `None`: this is the child.
///
/// # Safety
/// The child may make system calls and read and write memory. It must not allocate, take a lock or return to code that does.
unsafe fn fork() -> io::Result<Option<Child>> {
    let flags = libc::SIGCHLD | libc::CLONE_PIDFD;
    let mut descriptor: RawFd = -1;
    // SAFETY: the child has no stack of its own, so it goes on here, on a copy of this one. The kernel writes one descriptor.
    let id = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut descriptor, 0, 0) };
    match id {
        -1 => {
            let error = io::Error::last_os_error();
            let why = format!(
                "the host makes no child process: {error}; save without --background (QMP: background-snapshot)"
            );
            Err(io::Error::new(error.kind(), why))
        }
        id => Ok(Pid::from_raw(id as i32).map(|id| {
            // SAFETY: the kernel has just made it for this process.
            let descriptor = (descriptor >= 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor) });
            Child { id, descriptor }
        })),
    }
}

/// Ends the process, even after a panic, which must not reach code of the parent.
struct Exit;

impl Drop for Exit {
    fn drop(&mut self) {
        // SAFETY: the call does not return.
        unsafe { libc::_exit(0) }
    }
}

fn write_as_child(
    memory: &GuestMemory,
    blocks: &[Block],
    buffer: &mut [u8],
    file: &File,
    mut pipe: &File,
) -> ! {
    let _exit = Exit;
    let prepared = close_all_but(file.as_raw_fd(), pipe.as_raw_fd());
    let mut write = |block: &Block| {
        let written = prepared.and_then(|()| {
            let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
            block.write(memory, file, buffer).map_err(errno)
        });
        let message: Message = match &written {
            Ok(Written { bytes, checksum }) => [*bytes, *checksum],
            Err(errno) => [FAILED, *errno as u64],
        };
        let told = pipe.write_all(message.map(u64::to_ne_bytes).as_flattened());
        told.is_ok() && written.is_ok()
    };
    let _ = blocks.iter().all(&mut write);
    // SAFETY: the call does not return.
    unsafe { libc::_exit(0) }
}

/// Closes all descriptors of the calling process but these two, and has the kernel kill it when its parent ends.
fn close_all_but(one: RawFd, other: RawFd) -> Result<(), i32> {
    let (low, high) = (one.min(other) as u32, one.max(other) as u32);
    let ranges =
        [(0, low.checked_sub(1)), (low + 1, high.checked_sub(1)), (high + 1, Some(u32::MAX))];
    // SAFETY: the process uses no other descriptor, and neither call takes a pointer.
    let done = unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) == 0
            && ranges.iter().all(|(first, last)| match last {
                Some(last) if first <= last => {
                    libc::syscall(libc::SYS_close_range, *first, *last, 0) == 0
                }
                _ => true,
            })
    };
    match done {
        true => Ok(()),
        false => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
    }
}

#[cfg(test)]
mod tests {
    use arch::machine_layout::{MachineLayout, MachineSpec};

    use super::*;
    use crate::memory;

    /// Without a reservation the mapping needs no pages of the pool.
    #[test]
    fn huge_pages_are_refused() {
        let memory = 32 << 20;
        let spec = MachineSpec { memory, cpus: 1, serial: [true, false], acpi: true, disks: 0 };
        let map = |flags| memory::map(&MachineLayout::new(spec), libc::MAP_NORESERVE | flags);
        assert!(check_pages(&map(0).unwrap()).is_ok());
        let Ok(huge) = map(libc::MAP_HUGETLB) else {
            return eprintln!("skipped: the host has no huge pages");
        };
        let refused = check_pages(&huge).unwrap_err().to_string();
        assert!(refused.contains("save it without --background"), "{refused}");
    }
}

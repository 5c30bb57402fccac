//! io_uring (`aio=io_uring`): the kernel executes reads, direct writes and flushes while the worker does something else.
//!
//! A capability: without it the pool's threads do the same. It hooks in as an [`Executor`], which `open` gives to an engine.
//!
//! A ring belongs to one worker and one image. All jobs that are submitted before one `commit` cost one io_uring_enter(2). To collect
//! completions costs at most one more, and none if the ring's shared memory shows none. The ring is restricted to transfers of the
//! image's file, because a seccomp filter does not see what goes through it.
//!
//! A ring whose submissions the kernel refuses is *broken*: it gives back the jobs that the kernel has not taken, and the engine uses
//! threads from then on. A confined process cannot make a new ring.

#![expect(unsafe_code, reason = "submission queue entries carry raw pointers")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::executor::{Executor, Outcome};
use crate::disk::job::Job;
use crate::disk::observer::FileChange;
use crate::disk::opened::OpenedDisk;
use crate::disk::raw::RawImage;
use crate::disk::{DiskError, Operation};

/// The image, by its index among the ring's registered files.
const IMAGE: types::Fixed = types::Fixed(0);

/// A ring for one image.
struct Uring {
    uring: IoUring,
    /// Jobs in the ring, by tag. The kernel has pointers into guest memory, and into the iovec lists of these jobs.
    jobs: Vec<Option<InRing>>,
    in_flight: usize,
    /// Tags of jobs that the kernel has not taken yet, in order.
    queued: Vec<u32>,
    /// The ring takes submissions, but only from the thread that enabled it.
    enabled: bool,
    /// The kernel has refused submissions for good.
    broken: bool,
    /// The disk, whose image is raw.
    disk: Arc<OpenedDisk>,
}

/// A job in the ring, and the observer's number for the change that it makes.
struct InRing {
    job: Box<Job>,
    change: Option<usize>,
}

/// Whether this host allows io_uring. Tries it once for the process, and warns the user once.
pub(in crate::disk) fn available() -> bool {
    static PROBE: OnceLock<bool> = OnceLock::new();
    // Restrictions came with Linux 5.10; all operations used here are older.
    *PROBE.get_or_init(|| match build(1).and_then(|uring| restrict(&uring)) {
        Ok(()) => true,
        // The next file cannot be opened, either, and the line about that is enough.
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => false,
        Err(error) => {
            tracing::warn!(
                "this host does not allow io_uring: {error} (kernel.io_uring_disabled, or a seccomp filter); disks use threads"
            );
            false
        }
    })
}

/// Whether an error says nothing about the file: io_uring does not support the request, or a security module or a shortage of
/// kernel memory refused it. Then a thread of the pool makes the transfer, and the result of its system call counts.
fn is_own_error(errno: i32) -> bool {
    #[rustfmt::skip]
    let own = matches!(
        errno,
        libc::EAGAIN | libc::EINTR | libc::ECANCELED | libc::ENOSYS | libc::EPERM | libc::EACCES
            | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOMEM
    );
    own
}

/// Translates the result of a completion queue entry: a number of bytes, or a negative errno.
fn outcome(disk: &OpenedDisk, operation: Operation, result: i32) -> Outcome {
    let result = match u64::try_from(result) {
        Ok(count) => Ok(count),
        Err(_) if is_own_error(-result) => return None,
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    };
    let result = match operation {
        Operation::Flush => disk.raw()?.file().check_flushed(result.map(drop)).map(|()| 0),
        _ => result,
    };
    Some(result.map_err(DiskError::from))
}

/// A ring that is not enabled yet, with the setup flags that make completions cheap, if the kernel knows them.
fn build(depth: u32) -> io::Result<IoUring> {
    // Linux 6.1: completion work runs when the worker asks for it, rather than by interrupting it.
    let modern = IoUring::builder()
        .setup_r_disabled()
        .setup_clamp()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(depth);
    modern.or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => IoUring::builder().setup_r_disabled().setup_clamp().build(depth),
        _ => Err(error),
    })
}

/// Restricts the ring to transfers of registered files, because seccomp cannot see what goes through it.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let operations = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
    ];
    let [read, readv, write, writev, fsync] = operations.map(Restriction::sqe_op);
    let fixed_file = Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits());
    uring.submitter().register_restrictions(&mut [read, readv, write, writev, fsync, fixed_file])
}

/// A ring for the image of `disk`, of at most `depth` jobs. It writes to `event` when jobs finish. `None`: no job would come here,
/// because the image is not raw or its file is in memory, or the host refuses a ring, which is logged.
///
/// # Errors
/// Without file descriptors. Nothing else would work then, either.
pub(in crate::disk) fn make(
    disk: &Arc<OpenedDisk>,
    depth: usize,
    event: &EventFd,
) -> io::Result<Option<Box<dyn Executor>>> {
    let Some(image) = disk.raw().filter(|image| !image.in_memory) else { return Ok(None) };
    match set_up(image, depth, event) {
        Ok(uring) => Ok(Some(Box::new(Uring {
            uring,
            jobs: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            queued: Vec::with_capacity(depth),
            enabled: false,
            broken: false,
            disk: Arc::clone(disk),
        }))),
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => Err(error),
        Err(error) => {
            let path = &disk.path;
            disk.shortages.warn(format_args!(
                "disk image {path:?}: the host gives no io_uring: {error}; threads are used"
            ));
            Ok(None)
        }
    }
}

fn set_up(image: &RawImage, depth: usize, event: &EventFd) -> io::Result<IoUring> {
    let mut uring = build(u32::try_from(depth).unwrap_or(u32::MAX))?;
    uring.submitter().register_files(&[image.file().file.as_raw_fd()])?;
    uring.submitter().register_eventfd(event.as_raw_fd())?;
    restrict(&uring)?;
    uring.completion().disable_eventfd();
    Ok(uring)
}

impl Executor for Uring {
    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        let free = self.jobs.get(job.tag as usize).is_some_and(Option::is_none);
        let Some(entry) = entry(&job).filter(|_| free && !self.broken) else { return Err(job) };
        // If another write has locked some of the job's units, a thread of the pool waits for them.
        let Ok(change) = begin(&self.disk, &job) else { return Err(job) };
        // SAFETY: the entry's pointers stay valid until the completion: guest memory by the invariant of `IoBuffers`, the
        // iovec list because `jobs` keeps the job, untouched, until `reap` has seen its completion.
        match unsafe { self.uring.submission().push(&entry.user_data(u64::from(job.tag))) } {
            Ok(()) => {
                self.queued.push(job.tag);
                self.in_flight += 1;
                let tag = job.tag as usize;
                self.jobs[tag] = Some(InRing { job, change });
                Ok(())
            }
            Err(_full) => {
                let taken = InRing { job, change };
                end(&self.disk, &taken, false);
                Err(taken.job)
            }
        }
    }

    fn commit(&mut self) {
        if !self.enabled && !self.queued.is_empty() {
            // From now on only this thread may submit.
            self.enabled = self.uring.submitter().register_enable_rings().is_ok();
        }
        while !self.queued.is_empty() && !self.broken {
            match self.uring.submitter().submit() {
                Ok(count @ 1..) => drop(self.queued.drain(..count.min(self.queued.len()))),
                Ok(0) => self.broken = true,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel is short of something. The next `reap` after one of its jobs has finished tries again.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_flight > self.queued.len() => {
                        return;
                    }
                    _ => {
                        let path = &self.disk.path;
                        self.disk.shortages.warn(format_args!(
                            "disk image {path:?}: io_uring refuses transfers: {error}; threads are used from now on"
                        ));
                        self.broken = true;
                    }
                },
            }
        }
    }

    fn reap(&mut self, completed: &mut VecDeque<(Box<Job>, Outcome)>) {
        if self.in_flight == 0 {
            return;
        }
        self.uring.completion().disable_eventfd();
        loop {
            if self.uring.submission().taskrun() && self.enter(0).is_err() {
                // This is not the thread that enabled the ring. `wait` will report the error.
                return;
            }
            for entry in self.uring.completion() {
                let tag = entry.user_data() as usize;
                if let Some(done) = self.jobs.get_mut(tag).and_then(Option::take) {
                    self.in_flight -= 1;
                    end(&self.disk, &done, entry.result() >= 0);
                    let outcome = outcome(&self.disk, done.job.operation, entry.result());
                    completed.push_back((done.job, outcome));
                }
            }
            self.commit();
            if self.broken {
                for tag in self.queued.drain(..) {
                    self.in_flight -= 1;
                    let Some(refused) = self.jobs[tag as usize].take() else { continue };
                    end(&self.disk, &refused, false);
                    completed.push_back((refused.job, None));
                }
            }
            if self.in_flight == 0 {
                return;
            }
            self.uring.completion().enable_eventfd();
            // After this barrier, a completion either writes to the eventfd or is seen by the check below.
            fence(Ordering::SeqCst);
            if self.uring.completion().is_empty() && !self.uring.submission().taskrun() {
                return;
            }
            self.uring.completion().disable_eventfd();
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.in_flight > self.queued.len() && self.uring.completion().is_empty() {
            self.enter(1)
        } else {
            Ok(())
        }
    }
}

/// Called for each job before it is put into the ring: locks its units for direct I/O, and reports to the observer what will be
/// changed. Returns the observer's number for the change. `Err`: another write has locked some of the units.
fn begin(disk: &OpenedDisk, job: &Job) -> Result<Option<usize>, ()> {
    let image = disk.raw().ok_or(())?;
    if !image.direct.as_ref().is_none_or(|direct| direct.try_lock_units(job)) {
        return Err(());
    }
    Ok(match job.operation {
        Operation::Write { durable } => image.file().begin(FileChange::Write { job, durable }),
        Operation::Flush => image.file().begin(FileChange::Sync),
        _ => None,
    })
}

/// Called for each job that leaves the ring: unlocks the job's units, and reports the end of its change to the observer.
fn end(disk: &OpenedDisk, InRing { job, change }: &InRing, succeeded: bool) {
    let Some(image) = disk.raw() else { return };
    if let Some(direct) = &image.direct {
        direct.unlock_units(job);
    }
    image.file().end(*change, succeeded);
}

impl Uring {
    /// Lets the kernel post completions, and waits for `wait_for` of them.
    fn enter(&self, wait_for: u32) -> io::Result<()> {
        const GET_EVENTS: u32 = 1;
        loop {
            // SAFETY: no argument is a pointer.
            match unsafe {
                self.uring.submitter().enter::<libc::sigset_t>(0, wait_for, GET_EVENTS, None)
            } {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                result => return result.map(drop),
            }
        }
    }
}

/// The submission queue entry for a job, if io_uring has one.
fn entry(job: &Job) -> Option<squeue::Entry> {
    let buffers = job.buffers.pending();
    let entry = match (job.operation, buffers) {
        // A single buffer saves the kernel copying a list.
        (Operation::Read, [one]) => {
            opcode::Read::new(IMAGE, one.iov_base.cast(), length(one)).offset(job.offset).build()
        }
        (Operation::Read, _) => opcode::Readv::new(IMAGE, buffers.as_ptr(), buffers.len() as u32)
            .offset(job.offset)
            .build(),
        (Operation::Write { durable }, [one]) => {
            opcode::Write::new(IMAGE, one.iov_base.cast(), length(one))
                .offset(job.offset)
                .rw_flags(write_flags(durable))
                .build()
        }
        (Operation::Write { durable }, _) => {
            opcode::Writev::new(IMAGE, buffers.as_ptr(), buffers.len() as u32)
                .offset(job.offset)
                .rw_flags(write_flags(durable))
                .build()
        }
        (Operation::Flush, _) => {
            opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build()
        }
        _ => return None,
    };
    Some(entry)
}

/// The buffer's length, at most 1 GiB. The field has 32 bits, and the kernel moves at most 2 GiB at once. The engine submits the
/// rest later, as after any short transfer.
fn length(buffer: &libc::iovec) -> u32 {
    buffer.iov_len.min(1 << 30) as u32
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

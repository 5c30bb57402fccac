//! io_uring: reads, direct writes and flushes that the kernel carries on with while the worker does something else.
//!
//! One ring belongs to one worker. A batch of jobs costs one io_uring_enter(2), and so does collecting completions, but
//! only when there are some: the ring's shared memory tells.

#![expect(unsafe_code, reason = "submission queue entries carry raw pointers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::Operation;
use super::image::Job;

/// The image, by its index among the ring's registered files.
const IMAGE: types::Fixed = types::Fixed(0);

/// A ring for one image, used by one thread from the first `commit` on.
pub(super) struct Ring {
    uring: IoUring,
    /// Jobs in the ring, by tag. The kernel's pointers lead into guest memory and into the jobs' iovec lists.
    jobs: Vec<Option<Job>>,
    /// How many those are.
    in_flight: usize,
    /// Tags of jobs that the kernel has not taken yet, in order.
    queued: Vec<u32>,
    /// The ring takes submissions, from the thread that enabled it.
    enabled: bool,
    /// The kernel refused a submission for no good reason.
    broken: bool,
}

/// Whether this host lends io_uring. Asked, and complained about, once.
pub(super) fn available() -> bool {
    static PROBE: OnceLock<bool> = OnceLock::new();
    // Restrictions came with Linux 5.10; all operations used here are older.
    *PROBE.get_or_init(|| match build(1).and_then(|uring| restrict(&uring)) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "this host has no io_uring for us (kernel.io_uring_disabled?): disks use threads");
            false
        }
    })
}

/// A ring that is not enabled yet, with what makes completions cheap on this kernel.
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

/// Leaves the ring nothing but transfers of registered files: seccomp cannot see what goes through it.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let operations =
        [opcode::Read::CODE, opcode::Readv::CODE, opcode::Write::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    let [read, readv, write, writev, fsync] = operations.map(Restriction::sqe_op);
    let fixed_file = Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits());
    uring.submitter().register_restrictions(&mut [read, readv, write, writev, fsync, fixed_file])
}

impl Ring {
    /// A ring for `image` with at most `depth` jobs, which writes to `event` when one completes after `rest`.
    pub(super) fn new(image: impl AsFd, depth: usize, event: &EventFd) -> io::Result<Self> {
        let mut uring = build(u32::try_from(depth).unwrap_or(u32::MAX))?;
        uring.submitter().register_files(&[image.as_fd().as_raw_fd()])?;
        uring.submitter().register_eventfd(event.as_raw_fd())?;
        restrict(&uring)?;
        uring.completion().disable_eventfd();
        Ok(Self {
            uring,
            jobs: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            queued: Vec::with_capacity(depth),
            enabled: false,
            broken: false,
        })
    }

    /// Jobs handed in and not taken back yet.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues a job for `commit`: a read, write or flush. Gives it back when the ring cannot take it.
    pub(super) fn submit(&mut self, job: Job) -> Result<(), Job> {
        let free = self.jobs.get(job.tag as usize).is_some_and(Option::is_none);
        let Some(entry) = entry(&job).filter(|_| free && !self.broken) else { return Err(job) };
        // SAFETY: the entry's pointers stay valid until the completion: guest memory by the invariant of `IoBuffers`, the
        // iovec list because `jobs` keeps the job, untouched, until `reap` has seen its completion.
        match unsafe { self.uring.submission().push(&entry.user_data(u64::from(job.tag))) } {
            Ok(()) => {
                self.queued.push(job.tag);
                self.in_flight += 1;
                let tag = job.tag as usize;
                self.jobs[tag] = Some(job);
                Ok(())
            }
            Err(_full) => Err(job),
        }
    }

    /// Hands the queued jobs to the kernel.
    pub(super) fn commit(&mut self) {
        if !self.enabled && !self.queued.is_empty() {
            // From here on the ring is this thread's.
            self.enabled = self.uring.submitter().register_enable_rings().is_ok();
        }
        while !self.queued.is_empty() && !self.broken {
            match self.uring.submitter().submit() {
                Ok(count @ 1..) => drop(self.queued.drain(..count.min(self.queued.len()))),
                Ok(0) => self.broken = true,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel is short of something: try again when a job in its hands completes.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_flight > self.queued.len() => return,
                    _ => {
                        tracing::error!(%error, "io_uring takes no more; the disk goes on with threads");
                        self.broken = true;
                    }
                },
            }
        }
    }

    /// Appends completed jobs and their results (bytes or a negative errno) to `completed`. Jobs that the kernel would not
    /// take come back with `-EAGAIN`. From then on, until the next call, `event` tells about more.
    pub(super) fn reap(&mut self, completed: &mut Vec<(Job, i32)>) {
        if self.in_flight == 0 {
            return;
        }
        self.uring.completion().disable_eventfd();
        loop {
            if self.uring.submission().taskrun() && self.enter(0).is_err() {
                // Not the thread that may; `wait` will report it.
                return;
            }
            for entry in self.uring.completion() {
                if let Some(job) = self.jobs.get_mut(entry.user_data() as usize).and_then(Option::take) {
                    self.in_flight -= 1;
                    completed.push((job, entry.result()));
                }
            }
            self.commit();
            if self.broken {
                for tag in self.queued.drain(..) {
                    self.in_flight -= 1;
                    completed.extend(self.jobs[tag as usize].take().map(|job| (job, -libc::EAGAIN)));
                }
            }
            if self.in_flight == 0 {
                return;
            }
            self.uring.completion().enable_eventfd();
            // Either the kernel sees the event enabled, or the next look sees what it posted before.
            fence(Ordering::SeqCst);
            if self.uring.completion().is_empty() && !self.uring.submission().taskrun() {
                return;
            }
            self.uring.completion().disable_eventfd();
        }
    }

    /// Waits until `reap` has something, if anything is in flight.
    ///
    /// # Errors
    /// When called by another thread than the one that committed.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        if self.in_flight > self.queued.len() && self.uring.completion().is_empty() { self.enter(1) } else { Ok(()) }
    }

    /// Lets the kernel post completions, and waits for `wait_for` of them.
    fn enter(&self, wait_for: u32) -> io::Result<()> {
        /// IORING_ENTER_GETEVENTS
        const GET_EVENTS: u32 = 1;
        loop {
            // SAFETY: no argument is a pointer.
            match unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, wait_for, GET_EVENTS, None) } {
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
        // The kernel reads a single buffer's address with less ado than a list.
        (Operation::Read, [one]) => {
            opcode::Read::new(IMAGE, one.iov_base.cast(), length(one)).offset(job.offset).build()
        }
        (Operation::Read, _) => {
            opcode::Readv::new(IMAGE, buffers.as_ptr(), buffers.len() as u32).offset(job.offset).build()
        }
        (Operation::Write { durable }, [one]) => opcode::Write::new(IMAGE, one.iov_base.cast(), length(one))
            .offset(job.offset)
            .rw_flags(write_flags(durable))
            .build(),
        (Operation::Write { durable }, _) => opcode::Writev::new(IMAGE, buffers.as_ptr(), buffers.len() as u32)
            .offset(job.offset)
            .rw_flags(write_flags(durable))
            .build(),
        (Operation::Flush, _) => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
        _ => return None,
    };
    Some(entry)
}

/// What fits into an entry; the kernel moves at most 2 GiB at once anyway, and the rest follows as after any short transfer.
fn length(buffer: &libc::iovec) -> u32 {
    buffer.iov_len.min(1 << 30) as u32
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

//! The engine of one queue worker: every transfer takes the cheapest way that serves it.

#![expect(unsafe_code, reason = "guest ranges become raw iovecs, which must not outlive the guest's memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bounce::Bounce;
use super::image::{Image, Job};
use super::inline::Inline;
use super::pool::Pool;
use super::ring::{self, Ring};
use super::{
    Aio, Completion, DetectZeroes, Disk, DiskError, Engine, GuestRange, Lifetime, Limits, OpenOptions, Operation,
    SECTOR, ScsiCommand, Transfer,
};
use crate::GuestMemory;

/// An image, and how its user wants it served.
pub(super) struct ImageDisk {
    pub(super) image: Box<dyn Image>,
    read_only: bool,
    detect_zeroes: DetectZeroes,
    /// Raw transfers go through io_uring.
    ring: bool,
    /// Nobody wants durability (`cache=unsafe`, `snapshot=on`).
    ignore_flush: bool,
    /// The guest may send SCSI commands.
    scsi: bool,
    /// Keep others from the image, and from what it builds on, as long as they are open.
    _locks: Vec<File>,
}

impl ImageDisk {
    pub(super) fn new(image: Box<dyn Image>, options: &OpenOptions, locks: Vec<File>) -> Self {
        let ring = options.aio == Aio::IoUring && image.raw_file().is_some() && ring::available();
        Self {
            image,
            read_only: options.read_only,
            detect_zeroes: options.detect_zeroes,
            ring,
            ignore_flush: options.cache.ignores_flush() || options.snapshot,
            scsi: options.scsi,
            _locks: locks,
        }
    }

    /// Does what is left of `job`, on the calling thread, which may have to wait. `bounce` is that thread's.
    pub(super) fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        match (job.scsi.take(), self.image.raw_file()) {
            (None, _) => self.image.execute(job, bounce),
            (Some(command), Some(file)) if self.scsi => command.execute(file, &job.buffers),
            (Some(_), _) => Err(DiskError::Unsupported),
        }
    }
}

impl Disk for ImageDisk {
    fn capacity(&self) -> u64 {
        self.image.capacity()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        self.image.limits()
    }

    fn lifetime(&self) -> Option<Lifetime> {
        self.image.lifetime()
    }

    fn scsi(&self) -> bool {
        self.scsi
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        self.image.refresh_capacity()
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only"));
        }
        self.image.resize(bytes)
    }

    fn engine(self: Arc<Self>, memory: GuestMemory, depth: u32) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(QueueEngine::new(self, memory, depth)?))
    }
}

struct QueueEngine {
    disk: Arc<ImageDisk>,
    /// Jobs that nobody uses now. Their buffer lists keep their allocations, so that a busy queue allocates nothing.
    spare: Vec<Job>,
    /// What finished within `submit`.
    finished: Vec<Completion>,
    /// What `ring` has just given back.
    reaped: Vec<(Job, i32)>,
    inline: Inline,
    ring: Option<Ring>,
    pool: Pool,
    event: EventFd,
    /// Every job's buffers point into it: it stays until `drop` has drained them.
    memory: GuestMemory,
}

impl QueueEngine {
    fn new(disk: Arc<ImageDisk>, memory: GuestMemory, depth: u32) -> io::Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let depth = depth.max(1) as usize;
        let ring = disk.image.raw_file().filter(|_| disk.ring).and_then(|file| {
            Ring::new(file, depth, &event)
                .inspect_err(|error| tracing::warn!(%error, "no io_uring for a disk's queue: it uses threads"))
                .ok()
        });
        Ok(Self {
            inline: Inline::new(ring.is_some()),
            ring,
            pool: Pool::new(Arc::clone(&disk), depth, event.try_clone()?),
            spare: (0..depth).map(|_| Job::empty()).collect(),
            finished: Vec::with_capacity(depth),
            reaped: Vec::with_capacity(depth),
            disk,
            event,
            memory,
        })
    }

    /// Checks a transfer and turns it into a job.
    fn prepare(&self, job: &mut Job, transfer: &Transfer<'_>) -> Result<(), DiskError> {
        let Transfer { tag, operation, offset, length, ranges } = *transfer;
        (job.tag, job.operation, job.offset, job.length) = (tag, operation, offset, length);
        if operation == Operation::Flush {
            return Ok(());
        }
        if operation != Operation::Read && self.disk.read_only {
            return Err(DiskError::Host(libc::EROFS));
        }
        // The disk may have shrunk since the caller looked.
        if offset.checked_add(length).is_none_or(|end| end > self.disk.capacity()) {
            return Err(DiskError::OutOfRange);
        }
        if !(offset | length).is_multiple_of(SECTOR) {
            return Err(DiskError::Host(libc::EINVAL));
        }
        if matches!(operation, Operation::Read | Operation::Write { .. }) {
            // SAFETY: `self.memory` stays mapped as long as `self`, and `drop` waits for every job.
            unsafe { job.buffers.resolve(&self.memory, ranges) }?;
            if job.buffers.len() != length {
                return Err(DiskError::Host(libc::EINVAL));
            }
        }
        let wanted = |durable| durable && !self.disk.ignore_flush;
        job.operation = match operation {
            Operation::Write { durable } if self.disk.detect_zeroes != DetectZeroes::Off && job.buffers.is_zero() => {
                let unmap = self.disk.detect_zeroes == DetectZeroes::Unmap;
                Operation::WriteZeroes { unmap, durable: wanted(durable) }
            }
            Operation::Write { durable } => Operation::Write { durable: wanted(durable) },
            Operation::WriteZeroes { unmap, durable } => Operation::WriteZeroes { unmap, durable: wanted(durable) },
            operation => operation,
        };
        Ok(())
    }

    /// Sends what is left of a job the way that serves it.
    fn start(&mut self, mut job: Job) {
        match job.operation {
            Operation::Flush if self.disk.ignore_flush => return self.finish(job, Ok(())),
            _ if job.operation != Operation::Flush && job.length == 0 => return self.finish(job, Ok(())),
            _ => {}
        }
        if let Some(file) = self.disk.image.raw_file() {
            if let Some(result) = self.inline.attempt(file, &mut job) {
                return self.finish(job, result);
            }
            if let Some(ring) = &mut self.ring
                && file.admits(&job)
            {
                match ring.submit(job) {
                    Ok(()) => return,
                    Err(refused) => {
                        file.release(&refused);
                        job = refused;
                    }
                }
            }
        }
        self.pool.submit(job);
    }

    /// Takes a job back from the ring: done, failed, or to be continued.
    fn settle(&mut self, mut job: Job, result: i32) {
        if let Some(file) = self.disk.image.raw_file() {
            file.release(&job);
        }
        match (job.operation, result) {
            // The kernel could not do it just now; a thread can wait.
            (_, errno) if [-libc::EAGAIN, -libc::EINTR].contains(&errno) => self.pool.submit(job),
            (Operation::Flush, 0) => self.finish(job, Ok(())),
            (Operation::Read, 0) => self.finish(job, Err(DiskError::OutOfRange)),
            (_, 0) => self.finish(job, Err(DiskError::Host(libc::EIO))),
            (operation, errno @ ..0) => {
                if let (Operation::Flush, Some(file)) = (operation, self.disk.image.raw_file()) {
                    file.flush_failed();
                }
                self.finish(job, Err(io::Error::from_raw_os_error(-errno).into()));
            }
            (_, count) => {
                job.advance(count as u64);
                self.start(job);
            }
        }
    }

    fn finish(&mut self, job: Job, result: Result<(), DiskError>) {
        finish(&mut self.spare, &mut self.finished, job, result);
    }
}

/// Lays a finished job aside and reports it.
fn finish(spare: &mut Vec<Job>, done: &mut Vec<Completion>, mut job: Job, result: Result<(), DiskError>) {
    job.buffers.clear();
    done.push(Completion { tag: job.tag, result });
    spare.push(job);
}

impl Engine for QueueEngine {
    fn submit(&mut self, transfer: Transfer<'_>) {
        let mut job = self.spare.pop().unwrap_or_else(Job::empty);
        match self.prepare(&mut job, &transfer) {
            Ok(()) => self.start(job),
            Err(error) => self.finish(job, Err(error)),
        }
    }

    fn submit_scsi(&mut self, tag: u32, command: Arc<ScsiCommand>, data: &[GuestRange]) {
        let mut job = self.spare.pop().unwrap_or_else(Job::empty);
        job.tag = tag;
        // SAFETY: as in `prepare`.
        match unsafe { job.buffers.resolve(&self.memory, data) } {
            Ok(()) => {
                job.scsi = Some(command);
                self.pool.submit(job);
            }
            Err(error) => self.finish(job, Err(error)),
        }
    }

    fn commit(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.commit();
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.pool.reap(|job, result| finish(&mut self.spare, done, job, result));
        loop {
            if let Some(ring) = &mut self.ring {
                ring.reap(&mut self.reaped);
            }
            if self.reaped.is_empty() {
                break;
            }
            let mut reaped = std::mem::take(&mut self.reaped);
            for (job, result) in reaped.drain(..) {
                self.settle(job, result);
            }
            self.reaped = reaped;
            // What was continued.
            self.commit();
        }
        done.append(&mut self.finished);
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.event.as_raw_fd())
    }

    fn drain(&mut self, done: &mut Vec<Completion>) {
        self.commit();
        self.reap(done);
        while let Some(ring) = self.ring.as_mut().filter(|ring| ring.in_flight() > 0) {
            if let Err(error) = ring.wait() {
                tracing::error!(%error, "a disk engine was moved to another thread with transfers in flight");
                // They still write to guest memory: it must never be unmapped.
                std::mem::forget(self.memory.clone());
                break;
            }
            self.reap(done);
        }
        while self.pool.in_flight() > 0 {
            self.pool.wait();
            self.reap(done);
        }
    }
}

impl Drop for QueueEngine {
    fn drop(&mut self) {
        self.drain(&mut Vec::new());
    }
}

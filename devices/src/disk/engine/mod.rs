//! The engine of one worker: it executes each transfer on the cheapest route that can serve it.
//!
//! The engine checks a transfer and turns its guest ranges into host addresses: the transfer becomes a [`Job`]. [`route()`] then
//! decides who moves the data: the worker itself (`inline`), io_uring, or a thread of the pool, which may wait. The last two are each
//! an [`Executor`] that is plugged in. Each route gives an [`Outcome`]. If only a part of the job is done, the engine starts the rest
//! again, on the route that suits the rest. Errors that come from a route and not from the file (a full ring, a seccomp filter) send
//! the job to the pool, and the result of the pool's system call counts.

#![expect(
    unsafe_code,
    reason = "guest ranges become raw iovecs, which must not outlive the guest's memory"
)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::executor::{Executor, Outcome};
use self::route::{Route, RouteOptions, route};
use super::job::Job;
use super::opened::OpenedDisk;
use super::raw::DataPlace;
use super::{
    Completion, DeviceCommand, DiskError, Engine, GuestRange, Operation, SECTOR, Transfer,
};
use crate::GuestMemory;

pub(super) mod executor;
mod inline;
mod route;
pub(super) mod threads;
pub(super) mod uring;

pub(super) struct WorkerEngine {
    disk: Arc<OpenedDisk>,
    options: RouteOptions,
    /// Jobs that are not in use. They keep the allocations of their buffer lists, so that a busy queue allocates nothing.
    #[expect(clippy::vec_box, reason = "a job changes hands several times: its pointer is moved")]
    spare: Vec<Box<Job>>,
    /// Completions for the next `reap`.
    finished: Vec<Completion>,
    /// Scratch: jobs that the ring and the pool have just given back.
    reaped: VecDeque<(Box<Job>, Outcome)>,
    ring: Option<Box<dyn Executor>>,
    pool: Box<dyn Executor>,
    /// How many jobs the ring and the pool have.
    in_flight: usize,
    /// Ring and pool write to it when jobs finish.
    event: EventFd,
    /// The buffers of all jobs point into it. `drop` waits for the jobs before it drops the memory.
    memory: GuestMemory,
}

impl WorkerEngine {
    /// An engine for at most `depth` transfers at a time. `ring` and `pool` write to `event`.
    pub(super) fn new(
        disk: Arc<OpenedDisk>,
        memory: GuestMemory,
        depth: usize,
        event: EventFd,
        ring: Option<Box<dyn Executor>>,
        pool: Box<dyn Executor>,
    ) -> Self {
        let (ring_exists, flushes) = (ring.is_some(), !disk.ignore_flush);
        Self {
            disk,
            options: RouteOptions { ring: ring_exists, reads_inline: true, backoff: 0, flushes },
            spare: Vec::with_capacity(depth),
            finished: Vec::with_capacity(depth),
            reaped: VecDeque::with_capacity(depth),
            ring,
            pool,
            in_flight: 0,
            event,
            memory,
        }
    }

    /// Checks a transfer and fills `job` from it.
    fn prepare(&self, job: &mut Job, transfer: &Transfer<'_>) -> Result<(), DiskError> {
        let Transfer { tag, operation, offset, length, ranges } = *transfer;
        (job.tag, job.operation, job.offset, job.length) = (tag, operation, offset, length);
        if operation == Operation::Flush {
            // It moves nothing, whatever the caller says.
            job.length = 0;
            return Ok(());
        }
        if operation != Operation::Read && self.disk.info.read_only {
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
            if unsafe { job.buffers.resolve(&self.memory, ranges) }? != length {
                return Err(DiskError::Host(libc::EINVAL));
            }
        }
        if let Operation::Write { durable } | Operation::WriteZeroes { durable, .. } =
            &mut job.operation
        {
            *durable &= !self.disk.ignore_flush;
        }
        Ok(())
    }

    /// Executes a job, and then what is left of it, each time on the route that suits it.
    #[inline(always)]
    fn start(&mut self, mut job: Box<Job>) {
        loop {
            let raw = self.disk.raw();
            let place = raw.map_or(DataPlace::Translated, |raw| raw.data_place(&job));
            let route = route(job.operation, job.length, place, self.options);
            match (route, raw, &mut self.ring) {
                (Route::Done, ..) => return self.finish(job, Ok(())),
                (Route::Inline, Some(raw), _) => {
                    let outcome = inline::attempt(raw, place, &job, &mut self.options);
                    let Some(rest) = self.handle_outcome(job, outcome) else { return };
                    job = rest;
                    continue;
                }
                (Route::Ring, _, Some(ring)) => match ring.submit(job) {
                    Ok(()) => return self.in_flight += 1,
                    Err(refused) => job = refused,
                },
                _ if job.operation == (Operation::Write { durable: false }) => {
                    self.options.backoff = self.options.backoff.saturating_sub(1);
                }
                _ => {}
            }
            return self.submit_to_pool(job);
        }
    }

    /// Hands a job to a thread that may wait for the host.
    fn submit_to_pool(&mut self, job: Box<Job>) {
        match self.pool.submit(job) {
            Ok(()) => self.in_flight += 1,
            Err(job) => self.finish(job, Err(DiskError::Unsupported)),
        }
    }

    /// What a route did with a job: finishes the job, or hands it to the pool. Returns the job if only a part of it is done.
    #[inline(always)]
    fn handle_outcome(&mut self, mut job: Box<Job>, outcome: Outcome) -> Option<Box<Job>> {
        match outcome {
            None => self.submit_to_pool(job),
            Some(Ok(count)) if count == job.length => self.finish(job, Ok(())),
            // The file ends before: another program has truncated it.
            Some(Ok(0)) => self.finish(job, Err(DiskError::Host(libc::EIO))),
            Some(Ok(count)) => {
                job.advance(count);
                return Some(job);
            }
            Some(Err(error)) => self.finish(job, Err(error)),
        }
        None
    }

    /// Queues the completion of a job for `reap`, and keeps the job for another transfer.
    #[inline(always)]
    fn finish(&mut self, mut job: Box<Job>, result: Result<(), DiskError>) {
        job.buffers.clear();
        self.finished.push(Completion { tag: job.tag, result });
        self.spare.push(job);
    }
}

impl Engine for WorkerEngine {
    fn submit(&mut self, transfer: Transfer<'_>) {
        waypoint!();
        let mut job = self.spare.pop().unwrap_or_default();
        match self.prepare(&mut job, &transfer) {
            Ok(()) => self.start(job),
            Err(error) => self.finish(job, Err(error)),
        }
    }

    fn submit_scsi(&mut self, tag: u32, command: Arc<dyn DeviceCommand>, data: &[GuestRange]) {
        let mut job = self.spare.pop().unwrap_or_default();
        job.tag = tag;
        // SAFETY: as in `prepare`.
        match unsafe { job.buffers.resolve(&self.memory, data) } {
            Ok(_) => {
                job.command = Some(command);
                self.submit_to_pool(job);
            }
            Err(error) => self.finish(job, Err(error)),
        }
    }

    fn finished(&self) -> usize {
        self.finished.len()
    }

    fn commit(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.commit();
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        while self.in_flight > 0 {
            self.pool.reap(&mut self.reaped);
            if let Some(ring) = &mut self.ring {
                ring.reap(&mut self.reaped);
            }
            if self.reaped.is_empty() {
                break;
            }
            while let Some((job, outcome)) = self.reaped.pop_front() {
                self.in_flight -= 1;
                if let Some(rest) = self.handle_outcome(job, outcome) {
                    self.start(rest);
                }
            }
            // Jobs of which a part was left are in the ring again.
            self.commit();
        }
        done.append(&mut self.finished);
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.event.as_raw_fd())
    }

    fn wait_for_all(&mut self, done: &mut Vec<Completion>) {
        self.commit();
        self.reap(done);
        loop {
            let busy = self.ring.iter_mut().chain([&mut self.pool]).find(|of| of.in_flight() > 0);
            let Some(busy) = busy else { return };
            if let Err(error) = busy.wait() {
                tracing::error!(%error, "bug in minivmm, please report it: a disk engine was moved to another thread with transfers in flight");
                // The kernel may still write to guest memory, which must therefore never be unmapped.
                std::mem::forget(self.memory.clone());
                return;
            }
            self.reap(done);
        }
    }
}

impl Drop for WorkerEngine {
    fn drop(&mut self) {
        self.wait_for_all(&mut Vec::new());
    }
}

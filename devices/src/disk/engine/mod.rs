//! The engine of one queue worker: it sends each transfer the cheapest way that serves it.
//!
//! A transfer is checked, its guest ranges become host addresses, and [`route`] decides who moves the data: the worker
//! itself (`inline`), the kernel (`ring`), or a thread that may wait (`pool`). The last two are plugged in. A transfer that comes
//! back short continues from where it stopped, on the route that suits the rest. Errors that belong to a route and not to the
//! file (a full ring, a seccomp filter) send the transfer to the pool, whose system call then gives the file's own answer.

#![expect(
    unsafe_code,
    reason = "guest ranges become raw iovecs, which must not outlive the guest's memory"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::inline::Inline;
use self::pool::{MakePool, Pool};
use self::ring::{Carried, Ring};
use super::job::Job;
use super::opened::OpenedDisk;
use super::raw::Medium;
use super::{
    Completion, DeviceCommand, DiskError, Engine, EngineSetup, GuestRange, MIN_THREADS, Operation,
    SECTOR, Transfer,
};
use crate::GuestMemory;

mod inline;
mod pool;
pub(super) mod ring;
pub(super) mod threads;
pub(super) mod uring;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Done,
    Inline,
    /// io_uring. A ring that is broken refuses the job, which goes to the pool then.
    Ring,
    /// A thread that waits for the host. This route serves everything.
    Pool,
}

/// What an engine has besides its pool, and what it has learned about the host.
#[derive(Clone, Copy, Debug)]
struct Ways {
    ring: bool,
    /// The file system can read without waiting (RWF_NOWAIT).
    reads_inline: bool,
    /// The host has held up no buffered write lately.
    writes_inline: bool,
    /// Flushes do something (unlike with `cache=unsafe` and `snapshot=on`).
    flushes: bool,
}

/// Decides how `length` bytes of `operation` are served. The tables in disk-engines.md show the same, and a test compares
/// them with this function.
fn route(operation: Operation, length: u64, medium: Medium, ways: Ways) -> Route {
    use Operation::{Flush, Read, Write};
    match (operation, medium) {
        (Flush, _) if !ways.flushes => Route::Done,
        _ if length == 0 && operation != Flush => Route::Done,
        (Read | Write { .. } | Flush, Medium::Memory) => Route::Inline,
        (Read | Write { .. }, Medium::Direct { aligned: true })
        | (Flush, Medium::Direct { .. } | Medium::PageCache)
        | (Read, Medium::PageCache)
            if ways.ring =>
        {
            Route::Ring
        }
        (Read, Medium::PageCache) if ways.reads_inline => Route::Inline,
        // io_uring would give buffered writes to kernel threads, one at a time for each file.
        (Write { durable: false }, Medium::PageCache) if ways.writes_inline => Route::Inline,
        _ => Route::Pool,
    }
}

pub(super) struct QueueEngine {
    disk: Arc<OpenedDisk>,
    /// Jobs not in use. Their buffer lists keep their allocations, so that a busy queue allocates nothing.
    #[expect(clippy::vec_box, reason = "a job changes hands several times: its pointer is moved")]
    spare: Vec<Box<Job>>,
    finished: Vec<Completion>,
    reaped: VecDeque<(Box<Job>, Carried)>,
    pooled: VecDeque<(Box<Job>, Result<(), DiskError>)>,
    inline: Inline,
    ring: Option<Box<dyn Ring>>,
    pool: Box<dyn Pool>,
    /// Jobs that the pool has.
    waiting: usize,
    event: EventFd,
    /// Every job's buffers point into it: it stays until `drop` has drained them.
    memory: GuestMemory,
}

impl QueueEngine {
    pub(super) fn new(
        disk: Arc<OpenedDisk>,
        setup: EngineSetup,
        make_pool: MakePool,
    ) -> io::Result<Self> {
        let EngineSetup { memory, depth, threads, spawn } = setup;
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let depth = depth.max(1) as usize;
        let image = disk.raw();
        // A file in memory is served inline: it needs no ring.
        let waiting = image.filter(|image| !image.is_in_memory());
        let ring = disk.make_ring.zip(waiting);
        let ring = ring.map(|(make, image)| make(image, depth, &event, &disk.shortages));
        let ring = match ring.transpose() {
            // Nothing else would work, either.
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => return Err(error),
            Err(error) => {
                if let Some(suppressed) = disk.shortages.admit() {
                    tracing::warn!(%error, suppressed, "no io_uring for a disk's queue: it uses threads");
                }
                None
            }
            Ok(ring) => ring,
        };
        // The pool then has little to do, and each thread that is made here keeps the guest waiting.
        let is_rarely_used = ring.is_some() || image.is_some() && waiting.is_none();
        let threads = if is_rarely_used { threads.min(MIN_THREADS) } else { threads };
        Ok(Self {
            inline: Inline::default(),
            ring,
            pool: make_pool(Arc::clone(&disk), depth, threads, event.try_clone()?, &spawn),
            waiting: 0,
            spare: Vec::with_capacity(depth),
            finished: Vec::with_capacity(depth),
            reaped: VecDeque::with_capacity(depth),
            pooled: VecDeque::with_capacity(depth),
            disk,
            event,
            memory,
        })
    }

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

    fn start(&mut self, mut job: Box<Job>) {
        let ways = Ways {
            ring: self.ring.is_some(),
            reads_inline: self.inline.reads(),
            writes_inline: self.inline.writes(),
            flushes: !self.disk.ignore_flush,
        };
        let raw = self.disk.raw();
        let medium = raw.map_or(Medium::Translated, |raw| raw.medium(&job));
        match (route(job.operation, job.length, medium, ways), raw, &mut self.ring) {
            (Route::Done, ..) => return self.finish(job, Ok(())),
            (Route::Inline, Some(raw), _) => {
                if let Some(result) = self.inline.attempt(raw, medium, &mut job) {
                    return self.finish(job, result);
                }
            }
            (Route::Ring, _, Some(ring)) => match ring.submit(job) {
                Ok(()) => return,
                Err(refused) => job = refused,
            },
            _ => self.inline.passed(&job),
        }
        self.wait_for(job);
    }

    /// Leaves a job to the threads that wait for the host.
    fn wait_for(&mut self, job: Box<Job>) {
        self.waiting += 1;
        self.pool.submit(job);
    }

    /// Takes a job back from the ring: done, failed, or to be continued.
    fn take_back(&mut self, mut job: Box<Job>, carried: Carried) {
        let Some(raw) = self.disk.raw() else { unreachable!("only raw images have a ring") };
        let result = match (job.operation, carried) {
            (_, None) => return self.wait_for(job),
            (Operation::Flush, Some(result)) => raw.file().check_flushed(result.map(drop)),
            (_, Some(Ok(0))) => Err(io::ErrorKind::UnexpectedEof.into()),
            (_, Some(Ok(count))) => {
                job.advance(count);
                return self.start(job);
            }
            (_, Some(Err(error))) => Err(error),
        };
        self.finish(job, result.map_err(DiskError::from));
    }

    /// Reports a finished job and keeps it for another transfer.
    fn finish(&mut self, mut job: Box<Job>, result: Result<(), DiskError>) {
        job.buffers.clear();
        self.finished.push(Completion { tag: job.tag, result });
        self.spare.push(job);
    }
}

impl Engine for QueueEngine {
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
                self.wait_for(job);
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
        if self.waiting > 0 {
            self.pool.reap(&mut self.pooled);
            while let Some((job, result)) = self.pooled.pop_front() {
                self.waiting -= 1;
                self.finish(job, result);
            }
        }
        while let Some(ring) = &mut self.ring {
            ring.reap(&mut self.reaped);
            if self.reaped.is_empty() {
                break;
            }
            while let Some((job, carried)) = self.reaped.pop_front() {
                self.take_back(job, carried);
            }
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
        while self.waiting > 0 {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CHAPTER: &str = include_str!("../../../docs/disk-engines.md");

    /// The cells of the table below `heading`, without its header and separator.
    fn table(heading: &str) -> impl Iterator<Item = Vec<&'static str>> {
        let rows = CHAPTER.split(heading).nth(1).unwrap().lines();
        let rows = rows
            .skip_while(|line| !line.starts_with('|'))
            .take_while(|line| line.starts_with('|'))
            .skip(2);
        rows.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
    }

    fn operations(row: &str) -> Vec<(Operation, bool)> {
        let zeroes = |unmap, durable| (Operation::WriteZeroes { unmap, durable }, false);
        match row {
            "read" => vec![(Operation::Read, false)],
            "write" => vec![(Operation::Write { durable: false }, false)],
            "durable write" => vec![(Operation::Write { durable: true }, false)],
            "flush" => vec![(Operation::Flush, false)],
            "flush with `cache=unsafe` or `snapshot=on`" => vec![(Operation::Flush, true)],
            "discard, write zeroes, secure erase" => vec![
                (Operation::Discard, false),
                (Operation::SecureErase, false),
                zeroes(true, true),
                zeroes(false, false),
            ],
            other => panic!("a row that this test does not know: {other}"),
        }
    }

    #[test]
    fn the_decision_tables_show_what_route_decides() {
        let media = [
            Medium::Memory,
            Medium::PageCache,
            Medium::Direct { aligned: true },
            Medium::Direct { aligned: false },
            Medium::Translated,
        ];
        let learned = [(true, true), (true, false), (false, true), (false, false)];
        for (heading, ring) in [("### With io_uring", true), ("### Without io_uring", false)] {
            let mut rows = 0;
            for row in table(heading) {
                rows += 1;
                for (medium, cell) in media.into_iter().zip(&row[1..]) {
                    let shown: BTreeSet<&str> = cell
                        .split(|c: char| !c.is_alphanumeric() && c != '_')
                        .filter(|word| ["done", "inline", "io_uring", "pool"].contains(word))
                        .collect();
                    let mut decided = BTreeSet::new();
                    for (operation, ignored) in operations(row[0]) {
                        for (reads_inline, writes_inline) in learned {
                            let ways =
                                Ways { ring, reads_inline, writes_inline, flushes: !ignored };
                            decided.insert(match route(operation, 512, medium, ways) {
                                Route::Done => "done",
                                Route::Inline => "inline",
                                Route::Ring => "io_uring",
                                Route::Pool => "pool",
                            });
                            let empty = route(operation, 0, medium, ways);
                            assert!(operation == Operation::Flush || empty == Route::Done);
                        }
                    }
                    assert_eq!(decided, shown, "{heading}, {}, {medium:?}", row[0]);
                }
            }
            assert_eq!(rows, 6, "{heading}");
        }
    }
}

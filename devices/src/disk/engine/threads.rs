//! Threads that wait for the host. With `aio=threads` or qcow2 they execute every job that may have to wait, and beside io_uring what
//! io_uring cannot, such as discards and device commands.
//!
//! A capability: jobs that the worker executes itself (`inline`) do not come here. It hooks in as an [`Executor`], which `open` gives to
//! each engine.
//!
//! Each engine has a pool of its own. All threads are started with the pool, because a confined process cannot start any later. When the
//! pool is dropped, they finish the queued jobs and end. If the host refuses threads (RLIMIT_NPROC, a pids cgroup), the pool has fewer.
//! If it has none, the worker executes the jobs.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::executor::{Executor, Outcome};
use crate::disk::bounce::Bounce;
use crate::disk::job::Job;
use crate::disk::opened::OpenedDisk;
use crate::disk::{DiskError, EngineSetup, MAX_THREADS, MIN_THREADS};
use crate::{GuestMemory, lock, spawn};

/// The result of a job. The outer error is a panic in the job, which `reap` resumes on the worker's thread.
type Caught = Result<Result<(), DiskError>, Box<dyn Any + Send>>;

/// The threads of one engine, and their jobs. The worker that owns the engine adds and reaps jobs. It shares only the queue of
/// jobs with the threads, which touch guest memory while the worker does other things.
struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

struct Shared {
    disk: Arc<OpenedDisk>,
    state: Mutex<State>,
    /// A job was queued, or `State::stop` was set.
    queued: Condvar,
    finished: Condvar,
    /// Written to when `State::finished` stops being empty.
    event: EventFd,
}

struct State {
    queue: VecDeque<Box<Job>>,
    finished: Vec<(Box<Job>, Caught)>,
    stop: bool,
}

impl EngineSetup {
    /// For a worker that is the only one of its disk, with threads that are not confined.
    pub fn new(memory: GuestMemory, depth: u32) -> Self {
        Self { memory, depth, threads: MAX_THREADS, spawn: spawn::plain() }
    }
}

/// Makes a pool for at most `depth` jobs at a time, with at most the threads that `setup` says. It writes to `event` when jobs finish. If
/// the engine `has_ring` or the file is in memory, it gets few threads, since they would be rarely used and delay the guest's start.
///
/// # Errors
/// When the host has no descriptor left.
pub(in crate::disk) fn make(
    disk: &Arc<OpenedDisk>,
    depth: usize,
    setup: &EngineSetup,
    has_ring: bool,
    event: &EventFd,
) -> io::Result<Box<dyn Executor>> {
    let is_rarely_used = has_ring || disk.raw().is_some_and(|image| image.in_memory);
    let most = if is_rarely_used { setup.threads.min(MIN_THREADS) } else { setup.threads };
    let state = State {
        queue: VecDeque::with_capacity(depth),
        finished: Vec::with_capacity(depth),
        stop: false,
    };
    let shared = Arc::new(Shared {
        disk: Arc::clone(disk),
        state: Mutex::new(state),
        queued: Condvar::new(),
        finished: Condvar::new(),
        event: event.try_clone()?,
    });
    let wanted = most.clamp(1, depth);
    let mut threads = Vec::with_capacity(wanted);
    for number in 0..wanted {
        let of_thread = Arc::clone(&shared);
        let body = Box::new(move || work(&of_thread, true));
        match (setup.spawn)(format!("disk-io-{number}"), body) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                let path = &shared.disk.path;
                shared.disk.shortages.warn(format_args!(
                    "disk image {path:?}: only {number} of {wanted} I/O threads can be started: {error}{}",
                    match error.kind() {
                        io::ErrorKind::WouldBlock =>
                            "; raise the limit on tasks (`ulimit -u`, or the cgroup's pids.max)",
                        _ => "",
                    }
                ));
                break;
            }
        }
    }
    Ok(Box::new(Threads { shared, threads, in_flight: 0 }))
}

impl Executor for Threads {
    /// Queues a job for the threads, or executes it here if there are none.
    fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        self.in_flight += 1;
        lock(&self.shared.state).queue.push_back(job);
        if self.threads.is_empty() {
            work(&self.shared, false);
        } else {
            self.shared.queued.notify_one();
        }
        Ok(())
    }

    fn commit(&mut self) {}

    fn reap(&mut self, done: &mut VecDeque<(Box<Job>, Outcome)>) {
        if self.in_flight == 0 {
            return;
        }
        let mut state = lock(&self.shared.state);
        self.in_flight -= state.finished.len();
        done.extend(state.finished.drain(..).map(|(job, outcome)| {
            let result = outcome.unwrap_or_else(|panic| match thread::panicking() {
                // The worker panics already, and drops its engine. A second panic would abort the process.
                true => Err(DiskError::Host(libc::EIO)),
                false => resume_unwind(panic),
            });
            // All of it is done: of a read or write nothing is left.
            let moved = job.length;
            (job, Some(result.map(|()| moved)))
        }));
    }

    fn wait(&mut self) -> io::Result<()> {
        let state = lock(&self.shared.state);
        let waiting = |state: &mut State| self.in_flight > 0 && state.finished.is_empty();
        drop(
            self.shared.finished.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner),
        );
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.queued.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in a job was caught, and `reap` resumes it.
            let _ = thread.join();
        }
    }
}

/// Executes queued jobs. `wait`: if there are none, waits for more until the pool is dropped. Otherwise returns.
fn work(shared: &Shared, wait: bool) {
    let mut bounce = Bounce::default();
    let mut state = lock(&shared.state);
    loop {
        let Some(mut job) = state.queue.pop_front() else {
            if state.stop || !wait {
                return;
            }
            state = shared.queued.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let (operation, offset, size) = (job.operation, job.offset, job.length);
        tracing::trace!(target: "disk_io_begin", ?operation, offset, size);
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.disk.execute(&mut job, &mut bounce)));
        tracing::trace!(target: "disk_io_end", size);
        state = lock(&shared.state);
        state.finished.push((job, outcome));
        if state.finished.len() == 1 {
            shared.finished.notify_one();
            if let Err(error) = shared.event.write(1) {
                let path = &shared.disk.path;
                tracing::error!("disk image {path:?}: cannot signal a finished transfer: {error}");
            }
        }
    }
}

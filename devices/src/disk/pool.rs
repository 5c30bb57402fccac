//! Blocking calls on threads of our own: all of `aio=threads` and of formats that block, and whatever io_uring does not do,
//! SCSI commands among it.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::DiskError;
use super::bounce::Bounce;
use super::engine::ImageDisk;
use super::image::Job;

/// Most threads of one engine. Enough to keep a fast device busy, few enough to go unnoticed.
const MAX_THREADS: usize = 16;

/// How a job ended; the outer error is a panic, to be continued by the engine's owner.
type Outcome = Result<Result<(), DiskError>, Box<dyn Any + Send>>;

/// One engine's threads. They start when there is first work for them; dropping the pool finishes the work and joins them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    max_threads: usize,
    /// Jobs handed in and not taken back yet.
    in_flight: usize,
}

struct Shared {
    disk: Arc<ImageDisk>,
    state: Mutex<State>,
    /// Something was queued, or there will be nothing more.
    queued: Condvar,
    /// Something was finished.
    finished: Condvar,
    /// Written to when `State::finished` stops being empty.
    event: EventFd,
}

struct State {
    queue: VecDeque<Job>,
    finished: Vec<(Job, Outcome)>,
    /// Threads that wait for `queued`.
    idle: usize,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// A pool for at most `depth` jobs at once, which writes to `event` when some are finished.
    pub(super) fn new(disk: Arc<ImageDisk>, depth: usize, event: EventFd) -> Self {
        let state =
            State { queue: VecDeque::with_capacity(depth), finished: Vec::with_capacity(depth), idle: 0, stop: false };
        let shared = Arc::new(Shared {
            disk,
            state: Mutex::new(state),
            queued: Condvar::new(),
            finished: Condvar::new(),
            event,
        });
        Self { shared, threads: Vec::new(), max_threads: depth.clamp(1, MAX_THREADS), in_flight: 0 }
    }

    /// Jobs handed in and not taken back yet.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands a job to some thread.
    pub(super) fn submit(&mut self, job: Job) {
        self.in_flight += 1;
        let mut state = self.shared.lock();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() {
            self.shared.queued.notify_one();
        } else if self.threads.len() < self.max_threads {
            drop(state);
            self.start_thread();
        }
    }

    fn start_thread(&mut self) {
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new().name(format!("disk-io-{}", self.threads.len())).spawn(move || work(&shared)) {
            Ok(thread) => self.threads.push(thread),
            // The host lends no thread: those there are will do it, or else this one.
            Err(error) if self.threads.is_empty() => {
                tracing::warn!(%error, "cannot start a disk thread; the disk is served without");
                self.shared.lock().stop = true;
                work(&self.shared);
                self.shared.lock().stop = false;
            }
            Err(_) => {}
        }
    }

    /// Hands all finished jobs to `done`.
    pub(super) fn reap(&mut self, mut done: impl FnMut(Job, Result<(), DiskError>)) {
        if self.in_flight == 0 {
            return;
        }
        let mut state = self.shared.lock();
        self.in_flight -= state.finished.len();
        for (job, outcome) in state.finished.drain(..) {
            let result = outcome.unwrap_or_else(|panic| match thread::panicking() {
                // One is enough: this is the engine's clean-up after another.
                true => Err(DiskError::Host(libc::EIO)),
                false => resume_unwind(panic),
            });
            done(job, result);
        }
    }

    /// Waits until `reap` has something, if anything is in flight.
    pub(super) fn wait(&self) {
        let state = self.shared.lock();
        let waiting = |state: &mut State| self.in_flight > 0 && state.finished.is_empty();
        drop(self.shared.finished.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.queued.notify_all();
        for thread in self.threads.drain(..) {
            // A thread only panics outside a job, which would be a bug without a job to report it to.
            let _ = thread.join();
        }
    }
}

/// A thread's life: jobs until the queue is empty and the pool stops.
fn work(shared: &Shared) {
    let mut bounce = Bounce::default();
    let mut state = shared.lock();
    loop {
        let Some(mut job) = state.queue.pop_front() else {
            if state.stop {
                return;
            }
            state.idle += 1;
            state = shared.queued.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            continue;
        };
        drop(state);
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.disk.execute(&mut job, &mut bounce)));
        state = shared.lock();
        state.finished.push((job, outcome));
        if state.finished.len() == 1 {
            shared.finished.notify_one();
            if let Err(error) = shared.event.write(1) {
                tracing::error!(%error, "cannot signal a finished disk transfer");
            }
        }
    }
}

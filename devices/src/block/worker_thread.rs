//! A worker's thread: an event loop over commands, the kicks of its queues, the engine's completions, and a timer.
//!
//! The thread and its engine are made with the device, because a confined process could not make them later. The thread then
//! sleeps. `start` makes a [`Worker`] with the engine; a reset ends the worker and keeps the engine for the next one.
//!
//! The device sends commands and waits for none of them, since the thread may be waiting for the host. A reset or a pause comes
//! with a drain instead: after each event the thread checks whether it is complete, and then finishes the drain.
//!
//! If the event loop fails or the worker panics, [`run`] sends an event to the VM, which stops.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::events::BlockEvent;
use super::options::BlockError;
use super::queue::QueueState;
use super::shared::Shared;
use super::stats::Counters;
use super::worker::{Negotiated, Worker};
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::{Engine, EngineSetup, MAX_THREADS, MIN_THREADS};
use crate::lock;
use crate::spawn::DiskThreads;
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::{Drain, Party};

/// A command of the device, carried out on the worker thread: it calls a method of [`Loop`].
type Command = Box<dyn FnOnce(&mut Loop, &mut EventOps<'_>) + Send>;

/// A handle to a worker thread, for the device: a channel of commands, and the eventfd that wakes the thread for them. The
/// thread lives as long as the device. It has a [`Worker`] only between DRIVER_OK and a reset.
pub(super) struct WorkerThread {
    commands: Mutex<Sender<Command>>,
    control: Arc<EventFd>,
    join: Mutex<Option<JoinHandle<()>>>,
}

impl WorkerThread {
    /// Starts thread `number` of the disk, with its engine. The thread will serve up to `positions` queues.
    pub(super) fn spawn(
        shared: &Arc<Shared>,
        number: usize,
        positions: usize,
        memory: GuestMemory,
        threads: &DiskThreads,
    ) -> Result<Self, BlockError> {
        let thread = format!("disk-{}-{number}", shared.options.name);
        let failed = |source| BlockError::Thread { thread: thread.clone(), source };
        let control = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?);
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        );
        let timer = timer.map_err(|error| failed(error.into()))?;
        // At most these can be ready at once: control, completions, the timer, and one kick for each queue.
        let manager =
            EventManager::new_with_capacity(positions + 3).map_err(|error| match error {
                event_manager::Error::Epoll(error) => failed(error.into()),
                error => failed(io::Error::other(error.to_string())),
            })?;
        let setup = EngineSetup {
            memory,
            depth: shared.depth(positions),
            threads: (MAX_THREADS / shared.counters.len()).max(MIN_THREADS),
            spawn: Arc::clone(&threads.io),
        };
        let engine = Arc::clone(&shared.disk).engine(setup).map_err(failed)?;
        let (sender, receiver) = mpsc::channel();
        let body = {
            let (shared, control) = (Arc::clone(shared), Arc::clone(&control));
            let counters = Arc::clone(&shared.counters[number]);
            move || {
                let state = Loop {
                    shared,
                    counters,
                    positions,
                    control,
                    timer,
                    commands: receiver,
                    engine: Some(engine),
                    worker: None,
                    paused: false,
                    pausing: None,
                    exit: false,
                    watch_error: None,
                };
                run(state, manager)
            }
        };
        let join = (threads.worker)(thread.clone(), Box::new(body)).map_err(failed)?;
        Ok(Self { commands: Mutex::new(sender), control, join: Mutex::new(Some(join)) })
    }

    /// Sends a command, and does not wait for it. `false`: the thread is gone, and has reported that to the VM.
    pub(super) fn send(
        &self,
        command: impl FnOnce(&mut Loop, &mut EventOps<'_>) + Send + 'static,
    ) -> bool {
        let sent = lock(&self.commands).send(Box::new(command));
        if sent.is_ok()
            && let Err(error) = self.control.write(1)
        {
            tracing::error!(%error, "cannot wake a disk's worker thread");
        }
        sent.is_ok()
    }

    /// Sends a question, and waits for the answer, at most [`REPLY_TIMEOUT`]. `None`: the thread is gone, or is waiting for the
    /// host. A question must need no host I/O. A command that does gets a drain instead.
    pub(super) fn request<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Loop, &mut EventOps<'_>) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        // The caller may have given up.
        self.send(move |thread, ops| drop(reply.send(question(thread, ops))));
        answer.recv_timeout(REPLY_TIMEOUT).ok()
    }

    /// Ends the thread, and waits until it is gone.
    pub(super) fn join(&self) {
        self.send(|thread, _| thread.exit = true);
        let join = lock(&self.join).take();
        if let Some(join) = join {
            // The thread has caught and reported panics itself.
            let _ = join.join();
        }
    }
}

/// The thread's body. If it ends for another reason than `WorkerThread::join`, the VM gets an event.
fn run(state: Loop, manager: EventManager<Loop>) {
    let shared = Arc::clone(&state.shared);
    let result = catch_unwind(AssertUnwindSafe(|| state.run(manager)));
    let message = match result {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("the event loop failed: {error}"),
        Err(panic) => format!("a worker thread panicked: {}", panic_message(&*panic)),
    };
    (shared.events)(BlockEvent::WorkerFailed { device: shared.options.name.clone(), message });
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)")
}

/// The longest that a question waits for its answer: the thread may be waiting for host I/O that it has begun before.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// The numbers by which the event loop tells its descriptors apart.
const CONTROL: u32 = 0;
const COMPLETION: u32 = 1;
/// The timer of requests that wait for the limiter.
const TIMER: u32 = 2;
/// The kick of the queue at position `n` is `KICK + n`.
const KICK: u32 = 3;

/// The state of a worker thread. Its methods are called by commands of the device, and by the event loop.
pub(super) struct Loop {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    positions: usize,
    control: Arc<EventFd>,
    /// Expires when `Worker::release` has something to do.
    timer: OwnedFd,
    commands: Receiver<Command>,
    /// `None` while the worker has it.
    engine: Option<Box<dyn Engine>>,
    pub(super) worker: Option<Worker>,
    paused: bool,
    /// This thread's part in the drain of a pause that is not complete. Dropping it finishes the part.
    pausing: Option<Party>,
    exit: bool,
    /// Why `init` could not watch the descriptors. `run` returns it.
    watch_error: Option<event_manager::Error>,
}

impl Loop {
    fn run(self, mut manager: EventManager<Self>) -> Result<(), event_manager::Error> {
        let id = manager.add_subscriber(self);
        while !manager.subscriber_mut(id)?.exit {
            manager.run()?;
        }
        manager.subscriber_mut(id)?.watch_error.take().map_or(Ok(()), Err)
    }

    /// DRIVER_OK: makes the worker. Its queues follow one by one, by `add_queue`. The transport starts a device only when the
    /// last reset is done, so the engine is here and not with an earlier worker.
    pub(super) fn start(&mut self, negotiated: Negotiated) {
        let (shared, counters) = (Arc::clone(&self.shared), Arc::clone(&self.counters));
        let (positions, paused) = (self.positions, self.paused);
        let with = |engine| Worker::new(shared, counters, negotiated, positions, paused, engine);
        self.worker = self.engine.take().map(with).or(self.worker.take());
    }

    /// Adds the queue at this position, and serves it. If that fails, the driver gets DEVICE_NEEDS_RESET.
    pub(super) fn add_queue(
        &mut self,
        position: usize,
        queue: ActiveQueue,
        ops: &mut EventOps<'_>,
    ) {
        let Some(worker) = &mut self.worker else { return };
        let kick = queue.kick.as_raw_fd();
        let added = worker.add_queue(position, queue);
        match added
            .and_then(|()| ops.add(edges(kick, KICK + position as u32)).map_err(io::Error::other))
        {
            // No kick comes for chains that the driver made available before.
            Ok(()) => worker.serve(position),
            Err(error) => worker.cannot_start_queue(&error),
        }
    }

    /// Begins the reset of one queue. `drain` is finished when the queue has been handed back.
    pub(super) fn remove_queue(&mut self, position: usize, drain: Drain, ops: &mut EventOps<'_>) {
        self.unwatch(position, ops);
        match &mut self.worker {
            Some(worker) => worker.remove_queue(position, drain),
            None => drain.finish([]),
        }
    }

    fn unwatch(&self, position: usize, ops: &mut EventOps<'_>) {
        if let Some(queue) = self.worker.as_ref().and_then(|worker| worker.queue(position))
            && queue.state != QueueState::Leaving
        {
            remove(ops, queue.kick.as_raw_fd());
        }
    }

    /// Begins the reset of the device. `drain` is finished when the worker has ended and all its queues are handed back.
    pub(super) fn reset(&mut self, drain: Drain, ops: &mut EventOps<'_>) {
        // Before the eventfds are closed: the loop would refuse a new descriptor with the number of one that it still has.
        (0..self.positions).for_each(|position| self.unwatch(position, ops));
        match &mut self.worker {
            Some(worker) => worker.reset(drain),
            None => drain.finish([]),
        }
    }

    /// Begins a pause: takes no more requests until `resume`, and drops `party` when nothing is with the host.
    pub(super) fn pause(&mut self, party: Party) {
        (self.paused, self.pausing) = (true, Some(party));
        self.with_worker(Worker::pause);
    }

    /// Ends a pause: begins the stopped requests again, and serves the queues.
    pub(super) fn resume(&mut self) {
        (self.paused, self.pausing) = (false, None);
        self.with_worker(Worker::resume);
    }

    /// Begins the waiting requests that may start now: the limits changed, or the timer expired.
    pub(super) fn release(&mut self) {
        self.with_worker(|worker| worker.release(Instant::now()));
    }

    fn with_worker(&mut self, act: impl FnOnce(&mut Worker)) {
        if let Some(worker) = &mut self.worker {
            act(worker);
        }
    }

    /// Called after each event: finishes resets and pauses that have become complete, and continues a turn that was cut short.
    fn after_event(&mut self) {
        if let Some(worker) = self.worker.take_if(|worker| worker.advance_resets()) {
            self.engine = Some(worker.finish());
        }
        if self.worker.as_ref().is_none_or(Worker::stands_still) {
            self.pausing = None;
        }
        if self.worker.as_ref().is_some_and(Worker::wants_turn)
            && let Err(error) = self.control.write(1)
        {
            self.shared.report_own_error("continue a worker's turn", &error);
        }
    }

    /// Sets the timer for the requests that wait for the limiter. It is watched edge-triggered, so it is never read.
    fn schedule(&self) {
        let Some(wait) =
            self.worker.as_ref().and_then(|worker| worker.next_release(Instant::now()))
        else {
            return;
        };
        // A timer set to zero never expires.
        let wait = wait.max(Duration::from_micros(1));
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }),
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            self.shared.report_own_error("set the timer of its limits", &error.into());
        }
    }
}

impl MutEventSubscriber for Loop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let completions = self.engine.as_ref().and_then(|engine| engine.completion_fd());
        let fds = [(Some(self.timer.as_raw_fd()), TIMER), (completions, COMPLETION)];
        let mut others = fds.into_iter().filter_map(|(fd, data)| Some(edges(fd?, data)));
        let control = Events::with_data(&*self.control, CONTROL, EventSet::IN);
        let watched = ops.add(control).and_then(|()| others.try_for_each(|fd| ops.add(fd)));
        (self.exit, self.watch_error) = (watched.is_err(), watched.err());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTROL => {
                // Clears the eventfd.
                let _ = self.control.read();
                while let Ok(command) = self.commands.try_recv() {
                    command(self, ops);
                }
                self.with_worker(Worker::reap);
            }
            COMPLETION => self.with_worker(Worker::reap),
            TIMER => self.release(),
            kick => {
                waypoint!();
                tracing::trace!(target: "virtio_queue_notify", queue = kick - KICK);
                self.with_worker(|worker| worker.serve((kick - KICK) as usize));
            }
        }
        self.after_event();
        self.schedule();
    }
}

/// Watches a descriptor edge-triggered. Each write to an eventfd is an edge, so it need not be read.
fn edges(fd: RawFd, data: u32) -> Events {
    Events::with_data_raw(fd, data, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

fn remove(ops: &mut EventOps<'_>, fd: RawFd) {
    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
        tracing::error!(%error, "cannot stop watching a descriptor");
    }
}

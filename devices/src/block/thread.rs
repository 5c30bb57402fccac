//! A worker's thread: an event loop over control commands, the kicks of its queues, and the engine's completions.
//!
//! The thread is made with the device and waits. `Start` brings a [`Worker`] to life on it, `Stop` ends that worker.
//! What goes wrong on the thread is decided here, in one place: the VM is told, and stops.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Shared;
use super::events::BlockEvent;
use super::options::BlockError;
use super::policy::KeptRequest;
use super::stats::Counters;
use super::worker::{Agreement, Worker};
use crate::virtio::device::ActiveQueue;

/// What the device asks of a worker thread. Each question has its own answer channel: rarely used, never mixed up.
pub(super) enum Command {
    /// Begin to serve; the queues come after, one by one.
    Start { agreement: Agreement, reply: SyncSender<io::Result<()>> },
    /// Take over the queue at this position.
    AddQueue { position: usize, queue: ActiveQueue, reply: SyncSender<io::Result<()>> },
    /// Drain, and give one queue back.
    RemoveQueue { position: usize, reply: SyncSender<Option<ActiveQueue>> },
    /// Drain, end, and give all queues back.
    Stop { reply: SyncSender<Vec<ActiveQueue>> },
    /// Drain, and take nothing more from the rings.
    Pause { reply: SyncSender<()> },
    /// Retry what the error policy kept, and serve the rings again.
    Resume,
    /// The disk's limits changed: start what may start by now.
    Release,
    /// What the error policy keeps.
    Kept { reply: SyncSender<Vec<KeptRequest>> },
    /// Keep this request, from a snapshot.
    Keep { position: usize, head: u16, reply: SyncSender<bool> },
    /// End the thread.
    Exit,
}

/// The device's end of a worker thread.
pub(super) struct WorkerThread {
    commands: Mutex<Sender<Command>>,
    control: Arc<EventFd>,
    join: Mutex<Option<JoinHandle<()>>>,
}

impl WorkerThread {
    /// Starts thread `number` of the disk; it will serve up to `positions` queues.
    pub(super) fn spawn(
        shared: &Arc<Shared>,
        counters: Arc<Counters>,
        number: usize,
        positions: usize,
    ) -> Result<Self, BlockError> {
        let thread = format!("disk-{}-{number}", shared.options.name);
        let failed = |source| BlockError::Thread { thread: thread.clone(), source };
        let control = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?);
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK);
        let timer = timer.map_err(|error| failed(error.into()))?;
        let (sender, receiver) = mpsc::channel();
        let body = {
            let (shared, control) = (Arc::clone(shared), Arc::clone(&control));
            move || {
                run(Loop {
                    shared,
                    counters,
                    positions,
                    control,
                    timer,
                    commands: receiver,
                    worker: None,
                    paused: false,
                    exit: false,
                })
            }
        };
        let join = std::thread::Builder::new().name(thread.clone()).spawn(body).map_err(failed)?;
        Ok(Self { commands: Mutex::new(sender), control, join: Mutex::new(Some(join)) })
    }

    /// Sends a command without waiting. A thread that is gone has already told the VM.
    pub(super) fn send(&self, command: Command) {
        let sent = self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command);
        if sent.is_ok()
            && let Err(error) = self.control.write(1)
        {
            tracing::error!(%error, "cannot wake a disk's worker thread");
        }
    }

    /// Sends the command made by `command` and waits for its answer. `None`: the thread is gone.
    pub(super) fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Option<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(command(reply));
        answer.recv().ok()
    }

    /// Ends the thread and waits for it.
    pub(super) fn join(&self) {
        self.send(Command::Exit);
        let join = self.join.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(join) = join {
            // The body catches panics, so that there is nothing to learn from the result.
            let _ = join.join();
        }
    }
}

/// The thread's body. Whatever ends it but `Exit` is reported to the VM.
fn run(state: Loop) {
    let shared = Arc::clone(&state.shared);
    let result = catch_unwind(AssertUnwindSafe(|| state.run()));
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

/// What a descriptor in the event loop stands for.
const CONTROL: u32 = 0;
const COMPLETION: u32 = 1;
/// The disk's limits let something start.
const TIMER: u32 = 2;
/// And from here on: the kick of the queue at the position that follows.
const KICK: u32 = 3;

struct Loop {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    positions: usize,
    control: Arc<EventFd>,
    /// Expires when `Worker::release` has something to do.
    timer: OwnedFd,
    commands: Receiver<Command>,
    worker: Option<Worker>,
    paused: bool,
    exit: bool,
}

impl Loop {
    fn run(self) -> Result<(), event_manager::Error> {
        // One event each for control, completions, the timer and kicks is all that can be ready at a time.
        let mut manager = EventManager::new_with_capacity(self.positions + 3)?;
        let id = manager.add_subscriber(self);
        while !manager.subscriber_mut(id)?.exit {
            manager.run()?;
        }
        Ok(())
    }

    fn handle(&mut self, command: Command, ops: &mut EventOps<'_>) {
        match command {
            Command::Start { agreement, reply } => answer(&reply, self.start(agreement, ops)),
            Command::AddQueue { position, queue, reply } => answer(&reply, self.add_queue(position, queue, ops)),
            Command::RemoveQueue { position, reply } => {
                self.unwatch(position, ops);
                let queue = self.worker.as_mut().and_then(|worker| worker.remove_ring(position));
                answer(&reply, queue);
            }
            Command::Stop { reply } => answer(&reply, self.stop(ops)),
            Command::Pause { reply } => {
                self.paused = true;
                if let Some(worker) = &mut self.worker {
                    worker.pause();
                }
                answer(&reply, ());
            }
            Command::Resume => {
                self.paused = false;
                if let Some(worker) = &mut self.worker {
                    worker.resume();
                }
            }
            Command::Release => {
                if let Some(worker) = &mut self.worker {
                    worker.release(Instant::now());
                }
            }
            Command::Kept { reply } => answer(&reply, self.worker.as_ref().map_or(Vec::new(), Worker::kept)),
            Command::Keep { position, head, reply } => {
                answer(&reply, self.worker.as_mut().is_some_and(|worker| worker.park(position, head)));
            }
            Command::Exit => {
                self.stop(ops);
                self.exit = true;
            }
        }
    }

    fn start(&mut self, agreement: Agreement, ops: &mut EventOps<'_>) -> io::Result<()> {
        let (shared, counters) = (Arc::clone(&self.shared), Arc::clone(&self.counters));
        let worker = Worker::new(shared, counters, agreement, self.positions, self.paused)?;
        if let Some(fd) = worker.completion_fd() {
            add(ops, fd, COMPLETION)?;
        }
        self.worker = Some(worker);
        Ok(())
    }

    fn add_queue(&mut self, position: usize, queue: ActiveQueue, ops: &mut EventOps<'_>) -> io::Result<()> {
        let Some(worker) = &mut self.worker else { return Err(io::ErrorKind::NotConnected.into()) };
        let kick = queue.kick.as_raw_fd();
        worker.add_ring(position, queue)?;
        add(ops, kick, KICK + position as u32)?;
        // What the driver queued before counts too, with or without a kick.
        worker.serve(position);
        Ok(())
    }

    fn unwatch(&self, position: usize, ops: &mut EventOps<'_>) {
        if let Some(ring) = self.worker.as_ref().and_then(|worker| worker.ring(position)) {
            remove(ops, ring.kick().as_raw_fd());
        }
    }

    fn stop(&mut self, ops: &mut EventOps<'_>) -> Vec<ActiveQueue> {
        // Descriptors leave the loop before they are closed: a reused number would be refused.
        (0..self.positions).for_each(|position| self.unwatch(position, ops));
        let Some(worker) = self.worker.take() else { return Vec::new() };
        if let Some(fd) = worker.completion_fd() {
            remove(ops, fd);
        }
        worker.stop()
    }
}

impl Loop {
    /// Sets the timer for what waits for the disk's limits. Each expiry is an edge, and the timer is never read.
    fn schedule(&self) {
        let Some(wait) = self.worker.as_ref().and_then(|worker| worker.next_release(Instant::now())) else { return };
        // A timer set to zero never expires.
        let wait = wait.max(Duration::from_micros(1));
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }),
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(%error, "cannot set a disk's timer");
        }
    }
}

impl MutEventSubscriber for Loop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::with_data(&*self.control, CONTROL, EventSet::IN)) {
            tracing::error!(%error, "cannot watch a worker's control descriptor");
            self.exit = true;
        }
        if let Err(error) = add(ops, self.timer.as_raw_fd(), TIMER) {
            tracing::error!(%error, "cannot watch a worker's timer");
            self.exit = true;
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTROL => {
                // Clears the count; which may be zero only if someone else read it, and nobody does.
                let _ = self.control.read();
                while let Ok(command) = self.commands.try_recv() {
                    self.handle(command, ops);
                }
            }
            COMPLETION => {
                if let Some(worker) = &mut self.worker {
                    worker.reap();
                }
            }
            TIMER => {
                if let Some(worker) = &mut self.worker {
                    worker.release(Instant::now());
                }
            }
            kick => {
                if let Some(worker) = &mut self.worker {
                    worker.serve((kick - KICK) as usize);
                }
            }
        }
        self.schedule();
    }
}

/// Watches an eventfd edge-triggered: each write to it is an edge, so that it need never be read.
fn add(ops: &mut EventOps<'_>, fd: RawFd, data: u32) -> io::Result<()> {
    let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
    ops.add(Events::with_data_raw(fd, data, edges)).map_err(io::Error::other)
}

fn remove(ops: &mut EventOps<'_>, fd: RawFd) {
    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
        tracing::error!(%error, "cannot stop watching a descriptor");
    }
}

/// The asker may be gone; then nobody wants the answer.
fn answer<T>(reply: &SyncSender<T>, value: T) {
    let _ = reply.send(value);
}

//! A worker's thread: an event loop over commands, the kicks of its queues, the engine's completions, and a timer.
//!
//! The thread, its [`Worker`] and its engine are made with the device, because a confined process could not make them later.
//!
//! `BlockDevice` and `BlockHandle` send commands from the vCPUs' threads and the main thread, and do not wait until a command is carried
//! out: this thread may be waiting for the host. The command of a reset or a pause brings a [`Party`] of a drain with it. After each event
//! this thread checks whether the reset or pause is complete, and then drops the party. That wakes the thread that waits for the drain.
//!
//! All that a worker does is called from here. So this thread alone takes requests, completes them and interrupts the driver for them.
//!
//! If the event loop fails or the worker panics, [`run`] sends an event to the VM, which ends.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::admission::Limiter;
use super::events::BlockEvent;
use super::options::BlockError;
use super::shared::DiskShared;
use super::worker::Worker;
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::{EngineSetup, MAX_THREADS, MIN_THREADS};
use crate::lock;
use crate::spawn::DiskThreads;
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::Party;

/// A command of `BlockDevice` or `BlockHandle`, carried out on the worker thread: it calls a method of [`Loop`].
type Command = Box<dyn FnOnce(&mut Loop, &mut EventOps<'_>) + Send>;

/// A handle to a worker thread, for the device: a channel of commands, and the eventfd that wakes the thread for them. The
/// thread lives as long as the device.
pub(super) struct WorkerThread {
    commands: Sender<Command>,
    control: Arc<EventFd>,
    join: Mutex<Option<JoinHandle<()>>>,
}

impl WorkerThread {
    /// Starts thread `number` of the disk, with its engine. The thread will serve up to `positions` queues.
    pub(super) fn spawn(
        shared: &Arc<DiskShared>,
        number: usize,
        positions: usize,
        memory: &GuestMemory,
        threads: &DiskThreads,
        limiter: impl FnOnce() -> io::Result<Box<dyn Limiter>>,
    ) -> Result<Self, BlockError> {
        let thread = format!("disk-{}-{number}", shared.options.name);
        let failed = |source| BlockError::Thread { thread: thread.clone(), source };
        let control = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?);
        // At most these can be ready at once: control, completions, the timer, and one kick for each queue.
        let manager =
            EventManager::new_with_capacity(positions + 3).map_err(|error| match error {
                event_manager::Error::Epoll(error) => failed(error.into()),
                error => failed(io::Error::other(error.to_string())),
            })?;
        let setup = EngineSetup {
            memory: memory.clone(),
            depth: shared.depth(positions),
            threads: (MAX_THREADS / shared.counters.len()).max(MIN_THREADS),
            spawn: Arc::clone(&threads.io),
        };
        let engine = Arc::clone(&shared.disk).engine(setup).map_err(failed)?;
        let limiter = limiter().map_err(failed)?;
        let mut watched = vec![edges(control.as_raw_fd(), CONTROL), edges(limiter.timer(), TIMER)];
        watched.extend(engine.completion_fd().map(|fd| edges(fd, COMPLETION)));
        let (sender, commands) = mpsc::channel();
        let worker = Worker::new(shared, number, positions, memory.clone(), limiter, engine);
        let state = Loop {
            shared: Arc::clone(shared),
            worker,
            commands,
            control: Arc::clone(&control),
            pausing: None,
            exit: false,
        };
        let body = Box::new(move || run(state, manager, watched));
        let join = (threads.worker)(thread.clone(), body).map_err(failed)?;
        Ok(Self { commands: sender, control, join: Mutex::new(Some(join)) })
    }

    /// Sends a command, and does not wait for it.
    ///
    /// # Errors
    /// The thread is gone, and has reported that to the VM.
    pub(super) fn send(
        &self,
        command: impl FnOnce(&mut Loop, &mut EventOps<'_>) + Send + 'static,
    ) -> io::Result<()> {
        let gone = |_| io::Error::other("the disk's worker thread is gone");
        self.commands.send(Box::new(command)).map_err(gone)?;
        if let Err(error) = self.control.write(1) {
            tracing::error!("cannot wake a disk's worker thread: {error}");
        }
        Ok(())
    }

    /// Ends the thread, and waits until it is gone.
    pub(super) fn join(&self) {
        let _ = self.send(|thread, _| thread.exit = true);
        let join = lock(&self.join).take();
        if let Some(join) = join {
            // The thread has caught and reported panics itself.
            let _ = join.join();
        }
    }
}

/// The thread's body. If it ends for another reason than `WorkerThread::join`, the VM gets an event.
fn run(state: Loop, manager: EventManager<Loop>, watched: Vec<Events>) {
    let shared = Arc::clone(&state.shared);
    let result = catch_unwind(AssertUnwindSafe(|| state.run(manager, watched)));
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

/// The numbers by which the event loop tells its descriptors apart.
const CONTROL: u32 = 0;
const COMPLETION: u32 = 1;
/// The timer of requests that wait for the limiter.
const TIMER: u32 = 2;
/// The kick of the queue at position `n` is `KICK + n`.
const KICK: u32 = 3;

/// The state of a worker thread. Its methods are called by commands, and by the event loop.
pub(super) struct Loop {
    shared: Arc<DiskShared>,
    pub(super) worker: Worker,
    commands: Receiver<Command>,
    control: Arc<EventFd>,
    /// This thread's party in the drain of a pause that is not complete. It finishes when it is dropped.
    pausing: Option<Party>,
    exit: bool,
}

impl Loop {
    fn run(
        self,
        mut manager: EventManager<Self>,
        watched: Vec<Events>,
    ) -> Result<(), event_manager::Error> {
        let id = manager.add_subscriber(self);
        let mut ops = manager.event_ops(id)?;
        watched.into_iter().try_for_each(|events| ops.add(events))?;
        while !manager.subscriber_mut(id)?.exit {
            manager.run()?;
        }
        Ok(())
    }

    /// Adds the queue at this position, and serves it. If that fails, the driver gets DEVICE_NEEDS_RESET.
    pub(super) fn add_queue(
        &mut self,
        position: usize,
        queue: ActiveQueue,
        ops: &mut EventOps<'_>,
    ) {
        let kick = queue.kick.as_raw_fd();
        self.worker.add_queue(position, queue);
        match ops.add(edges(kick, KICK + position as u32)) {
            // No kick comes for chains that the driver made available before.
            Ok(()) => self.worker.serve(position),
            Err(error) => self.worker.cannot_start_queue(&io::Error::other(error)),
        }
    }

    /// Begins a pause: takes no more requests until `resume`, and drops `party` when nothing is with the host.
    pub(super) fn pause(&mut self, party: Party) {
        self.pausing = Some(party);
        self.worker.pause();
    }

    /// Ends a pause: begins the stopped requests again, and serves the queues.
    pub(super) fn resume(&mut self) {
        self.pausing = None;
        self.worker.resume();
    }
}

impl MutEventSubscriber for Loop {
    fn init(&mut self, _: &mut EventOps<'_>) {}

    /// After each event, also finishes resets and pauses that have become complete, and continues a turn that was cut short.
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTROL => {
                while let Ok(command) = self.commands.try_recv() {
                    command(self, ops);
                }
                self.worker.continue_requests();
            }
            COMPLETION => self.worker.continue_requests(),
            TIMER => self.worker.start_waiting(Instant::now()),
            kick => {
                waypoint!();
                tracing::trace!(target: "virtio_queue_notify", queue = kick - KICK);
                self.worker.serve((kick - KICK) as usize);
            }
        }
        self.worker.advance_resets();
        if self.worker.stands_still() {
            self.pausing = None;
        }
        if self.worker.wants_turn()
            && let Err(error) = self.control.write(1)
        {
            self.shared.report_own_error("wake its own thread", &error);
        }
    }
}

/// Watches a descriptor edge-triggered. Each write to an eventfd is an edge, so it need not be read; nor need a timer.
fn edges(fd: RawFd, data: u32) -> Events {
    Events::with_data_raw(fd, data, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

//! Serves queues: the one place where something happens to a request, in six verbs.
//!
//! ```text
//! fetch      a chain from the available ring                        virtio::queue::split
//! parse      the chain into a Request, or a refusal                 request
//! admit      now, or later: the limiter decides                     admission
//! submit     to the engine, merged with its neighbors, in pieces    dispatch, disk
//! complete   status byte and used ring, or what the error policy decides
//! notify     one interrupt for all that was completed               virtio::interrupt
//! ```
//!
//! Each verb calls down and gets a value back; the modules below decide and count, and only the worker (this file and
//! `verbs`) acts. A worker exists from the driver's DRIVER_OK to its reset and belongs to one thread, `worker_thread`, which
//! calls it for each kick, completion and command. The worker knows nothing of threads, and waits for nothing but, for a bounded time, while it
//! busy-polls, and for the host where the engine does a transfer on the calling thread.
//!
//! | state | takes chains | submits pieces | leads to |
//! | --- | --- | --- | --- |
//! | Idle: no worker exists | no | no | `Serving` or `Paused` at DRIVER_OK |
//! | `Serving` | yes | yes | `Paused`; `Stopped` when the error policy stops a request; Idle at a reset |
//! | `Stopped` | no | yes | `Paused`; `Serving` by `resume`, or when its stopped requests are reset; Idle at a reset |
//! | `Paused` | no | no | `Serving` by `resume`; Idle at a reset |
//!
//! A reset is not a state of its own: it marks the queues as leaving, and is over when nothing is with the engine any more
//! ([`Worker::advance_resets`]). The same condition makes a pause complete ([`Worker::stands_still`]). So both wait for at most
//! [`BYTES_WITH_ENGINE`](super::dispatch::BYTES_WITH_ENGINE) of data, besides flushes and SCSI commands under way. A reset of a
//! writable disk also waits for a last flush.

pub(super) mod state;
mod verbs;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::admission::{Direction, WaitingRequest};
use super::busy_poll::BusyPolling;
use super::dispatch::Dispatcher;
use super::in_flight::InFlightRequest;
use super::queue::{QueueState, Queues, WorkerQueue};
use super::shared::Shared;
use super::stats::Counters;
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::{Completion, Engine};
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::Drain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec;

/// Passes over one queue before the other queues and the control commands get their turn: a driver that never stops adding
/// chains must not keep the worker from them.
const PASSES_PER_TURN: u32 = 16;

/// What driver and transport have negotiated. Every worker gets a copy at DRIVER_OK; a driver can change none of it
/// without a reset, which ends the workers.
#[derive(Clone)]
pub(super) struct Negotiated {
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    pub(super) interrupt: Interrupt,
}

/// See the table in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Serving,
    Stopped,
    Paused,
}

/// How far a reset of the device has come.
enum Ending {
    No,
    /// Waits for what is with the engine.
    Draining(Drain),
    /// Waits for the flush after it: the driver is gone, and nothing else makes durable what it wrote.
    Flushing(Drain),
    Ended(Drain),
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Queue,
    /// The limiter made it wait.
    Waited,
    /// It was started before: it travels alone, and the limiter has counted it.
    Retry,
}

/// One thread's share of a running device: its queues, its engine, and the requests between them. It has no lock,
/// because only its thread uses it; what other threads may see of it is in [`Shared`] and in the [`Counters`].
pub(super) struct Worker {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    negotiated: Negotiated,
    state: State,
    ending: Ending,
    queues: Queues,
    /// Queue resets under way, by position.
    leaving: Vec<(usize, Drain)>,
    dispatcher: Dispatcher,
    /// The buffers of the chain at hand.
    buffers: ChainBuffers,
    /// The direction whose turn it is when the limiter lets both go.
    turn: Direction,
    /// Scratch: what the engine has just given back, and what ended without it.
    done: Vec<Completion>,
    over: Vec<(InFlightRequest, u8)>,
    /// When the pass over a queue, or the round of completions, began: one look at the clock serves a batch.
    now: Instant,
    busy_polling: BusyPolling,
}

/// What the thread asks for.
impl Worker {
    /// A worker that has `engine` until it ends. `positions`: how many queues it may get.
    pub(super) fn new(
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        negotiated: Negotiated,
        positions: usize,
        paused: bool,
        engine: Box<dyn Engine>,
    ) -> Self {
        let depth = shared.depth(positions);
        Self {
            busy_polling: BusyPolling::new(shared.options.poll),
            shared,
            counters,
            negotiated,
            state: if paused { State::Paused } else { State::Serving },
            ending: Ending::No,
            queues: Queues::new(positions),
            leaving: Vec::new(),
            dispatcher: Dispatcher::new(engine, depth),
            buffers: ChainBuffers::default(),
            turn: Direction::Read,
            done: Vec::with_capacity(depth as usize),
            over: Vec::new(),
            now: Instant::now(),
        }
    }

    /// The queue at `position`, when the driver has it enabled.
    pub(super) fn queue(&self, position: usize) -> Option<&WorkerQueue> {
        self.queues.find(position)
    }

    /// Takes a queue over. The caller serves it once without a kick.
    ///
    /// # Errors
    /// When the device never offered a queue at this position.
    pub(super) fn add_queue(&mut self, position: usize, active: ActiveQueue) -> io::Result<()> {
        let place = self.queues.place(position);
        let event_index = self.negotiated.features & spec::F_EVENT_IDX != 0;
        *place.ok_or(io::ErrorKind::InvalidInput)? = Some(WorkerQueue::new(active, event_index));
        Ok(())
    }

    pub(super) fn cannot_start_queue(&self, error: &io::Error) {
        self.shared.report_own_error("start a queue", error);
        self.negotiated.interrupt.device_needs_reset();
    }

    /// The driver kicked the queue at `position`: serves it until it is empty or has had its share.
    pub(super) fn serve(&mut self, position: usize) {
        waypoint!();
        self.dispatcher.begin_turn();
        self.negotiated.interrupt.collect_acknowledgements();
        let mut more = Ok(true);
        let mut passes = 0..PASSES_PER_TURN;
        while more == Ok(true) && !self.dispatcher.turn_is_over() && passes.next().is_some() {
            more = self.pass(position);
        }
        self.notify();
        match more {
            Err(error) => self.break_queue(position, error),
            // The event loop comes back here after the turn of everything else.
            Ok(true) => {
                if let Some(Err(error)) = self.queue(position).map(|queue| queue.kick.write(1)) {
                    self.shared.report_own_error("kick a queue again", &error);
                }
            }
            Ok(false) => {}
        }
    }

    /// The engine finished something, or an earlier turn was cut short: completes requests and submits further pieces.
    pub(super) fn reap(&mut self) {
        self.dispatcher.begin_turn();
        self.hand_over();
        self.notify();
    }

    /// Whether a turn ended although more could be submitted: the thread is to call `reap` soon.
    pub(super) fn wants_turn(&self) -> bool {
        let pieces = self.state != State::Paused && self.dispatcher.has_pieces_to_submit();
        self.dispatcher.turn_is_over() && pieces
    }

    /// Takes no chains and submits no pieces until `resume`. What the limiter makes wait, waits on.
    pub(super) fn pause(&mut self) {
        self.state = State::Paused;
    }

    /// Nothing is with the engine: as long as the worker is paused, nothing touches guest memory or the disk.
    pub(super) fn stands_still(&self) -> bool {
        self.dispatcher.stands_still()
    }

    /// Starts the stopped requests over, queue by queue in the order in which they stopped, and serves what has come since.
    pub(super) fn resume(&mut self) {
        self.state = State::Serving;
        self.dispatcher.begin_turn();
        self.now = Instant::now();
        for position in self.queues.positions() {
            let queue = self.queues.find_mut(position);
            for chain in queue.map(|queue| std::mem::take(&mut queue.stopped)).unwrap_or_default() {
                self.begin(position, chain, self.now, Origin::Retry);
            }
        }
        self.reap();
        self.release(Instant::now());
        self.queues.positions().for_each(|position| self.serve(position));
    }

    /// The driver resets the queue at `position`. `advance_resets` hands it back when nothing of it is with the engine.
    pub(super) fn remove_queue(&mut self, position: usize, drain: Drain) {
        match self.queues.find_mut(position) {
            Some(queue) if queue.state != QueueState::Leaving => {
                queue.leave();
                self.leaving.push((position, drain));
                self.pump();
                if self.state == State::Stopped
                    && self.queues.iter().all(|(_, queue)| queue.stopped.is_empty())
                {
                    self.state = State::Serving;
                }
            }
            _ => drain.finish([]),
        }
    }

    /// The driver resets the device. `advance_resets` ends the worker when nothing is with the engine.
    pub(super) fn reset(&mut self, drain: Drain) {
        self.queues.iter_mut().for_each(WorkerQueue::leave);
        self.pump();
        self.ending = Ending::Draining(drain);
    }

    /// What a reset waited for may have come: hands back queues that nothing is in flight of, and takes the next step of the
    /// worker's end. The thread calls this after everything else. Returns whether the worker has ended.
    pub(super) fn advance_resets(&mut self) -> bool {
        if self.leaving.is_empty() && matches!(self.ending, Ending::No) {
            return false;
        }
        let queues = &mut self.queues;
        self.leaving.retain(|(position, drain)| match queues.take_if_empty(*position) {
            Some(queue) => {
                drain.finish([queue.into_active()]);
                false
            }
            None => true,
        });
        if let Ending::Draining(drain) = &self.ending
            && self.dispatcher.is_empty()
        {
            let drain = drain.clone();
            if self.shared.disk.read_only() {
                self.ending = Ending::Ended(drain);
            } else {
                self.ending = Ending::Flushing(drain);
                self.dispatcher.submit_last_flush();
                self.complete_finished();
            }
        }
        matches!(self.ending, Ending::Ended(_))
    }

    /// Hands all queues of a worker that has ended to the drain that waits for them, and gives back its engine, which has nothing
    /// in flight.
    pub(super) fn finish(self) -> Box<dyn Engine> {
        let Self { ending, queues, dispatcher, .. } = self;
        if let Ending::Ended(drain) = ending {
            drain.finish(queues.into_active());
        }
        dispatcher.into_engine()
    }

    /// Starts the requests that the limiter lets go at `now`, the two directions in turn.
    pub(super) fn release(&mut self, now: Instant) {
        if self.state != State::Serving {
            return;
        }
        self.now = now;
        self.dispatcher.begin_turn();
        while let Some((position, WaitingRequest { chain, started })) = self.next_admitted(now) {
            self.begin(position, chain, started, Origin::Waited);
        }
        self.hand_over();
        self.notify();
    }

    /// How long from `now` until `release` has something to do. `None`: nothing waits, or not for the clock.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        if self.state != State::Serving {
            return None;
        }
        let waiting =
            Direction::BOTH.into_iter().filter(|of| self.queues.oldest_waiting(*of).is_some());
        waiting.map(|direction| self.shared.limiter.wait(direction, now)).min()
    }
}

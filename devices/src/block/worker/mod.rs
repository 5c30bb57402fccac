//! Serves queues. Everything that happens to a request happens here, in six verbs:
//!
//! ```text
//! fetch      take chains from the available ring                        virtio::queue::split
//! parse      make a Request of a chain, or refuse it                    request
//! admit      start the request now, or let it wait for the limiter      admission
//! submit     hand it to the engine, merged or in pieces                 dispatch, disk
//! complete   write status byte and used ring, or do as the error policy decides
//! notify     send one interrupt for all that was completed              virtio::interrupt
//! ```
//!
//! Each verb calls a module below and gets a value back. These modules decide and count, and only the worker (this file and
//! `verbs`) acts. A worker exists from the driver's DRIVER_OK to its reset. It belongs to one thread, `worker_thread`, which
//! calls it for each kick, completion and command. The worker knows nothing of threads. It waits in two places only: while it
//! busy-polls, for a bounded time, and while the engine makes a transfer on the calling thread.
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

/// Most passes over one queue in a row. Then the other queues and the commands get their turn, even if the driver never stops
/// adding chains to this one.
const PASSES_PER_TURN: u32 = 16;

/// What the transport hands over at DRIVER_OK, to each worker. None of it changes before the next reset, which ends the
/// workers.
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
    /// Waits for the last flush: no driver is left that would make the written data durable.
    Flushing(Drain),
    Ended(Drain),
}

/// Why a request begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Its chain was just taken from the ring.
    Queue,
    /// The limiter made it wait before, and lets it start now.
    Waited,
    /// It has failed or was stopped before. It is not merged, and the limiter has counted it.
    Retry,
}

/// One thread's share of a running device: its queues, its engine, and the requests between them. It has no lock, because
/// only its thread uses it. What other threads read is in [`Shared`] and in the [`Counters`].
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
    /// The buffers of the chain that is being parsed.
    buffers: ChainBuffers,
    /// The direction that `release` tries first. The two directions alternate.
    next_direction: Direction,
    /// Scratch: completions that the engine has just given back.
    done: Vec<Completion>,
    /// Scratch: requests in pieces that have ended, with their status.
    ended: Vec<(InFlightRequest, u8)>,
    /// When the current pass over a queue, or the current round of completions, began. The clock is read once for a batch.
    now: Instant,
    busy_polling: BusyPolling,
}

/// What the worker thread calls.
impl Worker {
    /// A worker that owns `engine` until it ends. `positions`: how many queues it may get.
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
            next_direction: Direction::Read,
            done: Vec::with_capacity(depth as usize),
            ended: Vec::new(),
            now: Instant::now(),
        }
    }

    /// The queue at `position`. `None`: the driver has not enabled it.
    pub(super) fn queue(&self, position: usize) -> Option<&WorkerQueue> {
        self.queues.find(position)
    }

    /// Adds a queue. The caller then serves it once without a kick, for chains that the driver added before.
    ///
    /// # Errors
    /// When the device never offered a queue at this position.
    pub(super) fn add_queue(&mut self, position: usize, active: ActiveQueue) -> io::Result<()> {
        let entry = self.queues.entry(position).ok_or(io::ErrorKind::InvalidInput)?;
        let event_index = self.negotiated.features & spec::F_EVENT_IDX != 0;
        *entry = Some(WorkerQueue::new(active, event_index));
        Ok(())
    }

    pub(super) fn cannot_start_queue(&self, error: &io::Error) {
        self.shared.report_own_error("start a queue", error);
        self.negotiated.interrupt.device_needs_reset();
    }

    /// The driver kicked the queue at `position`: serves the queue until it is empty or its turn is over.
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
            // More is to do. This kick makes the event loop call again, after all other events.
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
        self.submit_and_complete();
        self.notify();
    }

    /// Whether a turn ended although more pieces could be submitted: the thread must then call `reap` again.
    pub(super) fn wants_turn(&self) -> bool {
        let pieces = self.state != State::Paused && self.dispatcher.has_pieces_to_submit();
        self.dispatcher.turn_is_over() && pieces
    }

    /// Takes no chains, submits no pieces and starts no waiting requests until `resume`.
    pub(super) fn pause(&mut self) {
        self.state = State::Paused;
    }

    /// Whether nothing is with the engine. Then a paused worker touches neither guest memory nor the disk.
    pub(super) fn stands_still(&self) -> bool {
        self.dispatcher.stands_still()
    }

    /// Begins the stopped requests again, queue by queue and in the order in which they stopped. Then serves all queues.
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

    /// The driver resets the queue at `position`. `advance_resets` hands the queue back when none of its chains is outstanding.
    pub(super) fn remove_queue(&mut self, position: usize, drain: Drain) {
        match self.queues.find_mut(position) {
            Some(queue) if queue.state != QueueState::Leaving => {
                queue.leave();
                self.leaving.push((position, drain));
                self.submit_pieces();
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
        self.submit_pieces();
        self.ending = Ending::Draining(drain);
    }

    /// Takes the next step of each reset under way: hands back queues whose chains are all settled, and takes the worker from
    /// `Draining` to `Flushing` and `Ended`. The thread calls this after each event. Returns whether the worker has ended.
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

    /// The worker has ended: hands its queues to the drain, and returns its engine, which has nothing in flight.
    pub(super) fn finish(self) -> Box<dyn Engine> {
        let Self { ending, queues, dispatcher, .. } = self;
        if let Ending::Ended(drain) = ending {
            drain.finish(queues.into_active());
        }
        dispatcher.into_engine()
    }

    /// Begins the waiting requests that the limiter lets start at `now`, reads and writes alternately.
    pub(super) fn release(&mut self, now: Instant) {
        if self.state != State::Serving {
            return;
        }
        self.now = now;
        self.dispatcher.begin_turn();
        while let Some((position, WaitingRequest { chain, started })) = self.next_admitted(now) {
            self.begin(position, chain, started, Origin::Waited);
        }
        self.submit_and_complete();
        self.notify();
    }

    /// How long from `now` until `release` has something to do. `None`: nothing waits, or the worker takes no requests now.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        if self.state != State::Serving {
            return None;
        }
        let waiting =
            Direction::BOTH.into_iter().filter(|of| self.queues.oldest_waiting(*of).is_some());
        waiting.map(|direction| self.shared.limiter.wait(direction, now)).min()
    }
}

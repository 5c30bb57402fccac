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
//! Each verb calls another module and gets a value back. These modules decide and count, and only the worker (this folder) acts:
//! `verbs` on requests, `reset` on queues that the driver resets, and `state` on queues that are saved or restored. A worker lives as
//! long as its thread, `worker_thread`, which calls it for each kick, completion and command. It has queues from the driver's
//! DRIVER_OK to its reset. The worker knows nothing of threads. It waits in two places only: while it busy-polls, for a bounded time,
//! and while the engine makes a transfer on the calling thread.
//!
//! | state | takes chains | submits pieces | leads to |
//! | --- | --- | --- | --- |
//! | `Serving` | yes | yes | `Paused`; `Stopped` when the error policy stops a request |
//! | `Stopped` | no | yes | `Paused`; `Serving` by `resume`, or when its stopped requests are reset |
//! | `Paused` | no | no | `Serving` by `resume` |
//!
//! A pause is complete when nothing is with the engine any more ([`Worker::stands_still`]). A reset (`reset`, a capability) is not a
//! state of the worker: it marks the queues as leaving, and hands each back when none of its chains is outstanding. So both wait
//! for less than 36 MiB of data ([`BYTES_WITH_ENGINE`](super::dispatch::BYTES_WITH_ENGINE)), besides flushes and SCSI commands under way.

mod reset;
pub(super) mod state;
mod verbs;

#[cfg(test)]
use std::any::Any;
use std::io;
use std::sync::Arc;

use super::admission::{Limiter, Origin};
use super::busy_poll::BusyPolling;
use super::dispatch::Dispatcher;
use super::queue::{Queues, TakenChain, WorkerQueue};
use super::request::Details;
use super::shared::DiskShared;
use super::stats::Counters;
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::{Completion, Engine};
use crate::virtio::device::ActiveQueue;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec;

/// Most passes over one queue in a row. Then the other queues and the commands get their turn, even if the driver never stops
/// adding chains to this one.
const PASSES_PER_TURN: u32 = 16;

/// What the transport hands over at DRIVER_OK, to each worker. It does not change before the next reset.
#[derive(Clone)]
pub(super) struct Negotiated {
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

/// A reset under way, of the device or of a queue: takes its next step, and returns whether the reset is over.
pub(super) type Reset = Box<dyn FnMut(&mut Worker) -> bool + Send>;

/// One thread's share of a device: its queues, its engine, and the requests between them. It has no lock, because only its
/// thread uses it. What other threads read is in [`DiskShared`] and in the [`Counters`].
pub(super) struct Worker {
    shared: Arc<DiskShared>,
    counters: Arc<Counters>,
    memory: GuestMemory,
    features: u64,
    /// `None` while no driver has started the device. Then there are no queues either.
    interrupt: Option<Interrupt>,
    state: State,
    queues: Queues,
    dispatcher: Dispatcher,
    /// The buffers of the chain that is being parsed.
    buffers: ChainBuffers,
    /// What the chain is checked against, and what belongs to its request beside the buffers.
    details: Details,
    limiter: Box<dyn Limiter>,
    /// Scratch: completions that the engine has just given back.
    reaped: Vec<Completion>,
    /// When chains were last taken, requests were completed, or the worker looked for work while it polled. The clock is read once for
    /// several of them.
    now: Instant,
    busy_polling: BusyPolling,
    /// Dropped after the engine, because a reset is over at the latest when it is dropped.
    resets: Vec<Reset>,
}

/// What the worker thread calls.
impl Worker {
    /// Worker `number` of a disk. `positions`: how many queues it may get.
    pub(super) fn new(
        shared: &Arc<DiskShared>,
        number: usize,
        positions: usize,
        memory: GuestMemory,
        limiter: Box<dyn Limiter>,
        engine: Box<dyn Engine>,
    ) -> Self {
        let depth = shared.depth(positions);
        Self {
            busy_polling: BusyPolling::new(shared.options.poll),
            shared: Arc::clone(shared),
            counters: Arc::clone(&shared.counters[number]),
            memory,
            features: 0,
            interrupt: None,
            state: State::Serving,
            queues: Queues::new(positions),
            dispatcher: Dispatcher::new(engine, depth),
            buffers: ChainBuffers::default(),
            details: Details::default(),
            limiter,
            reaped: Vec::with_capacity(depth as usize),
            now: Instant::now(),
            resets: Vec::new(),
        }
    }

    /// DRIVER_OK. The queues follow one by one, by `add_queue`.
    pub(super) fn start(&mut self, Negotiated { features, interrupt }: Negotiated) {
        (self.features, self.interrupt) = (features, Some(interrupt));
    }

    /// Adds a queue. The caller then serves it once without a kick, for chains that the driver added before.
    pub(super) fn add_queue(&mut self, position: usize, active: ActiveQueue) {
        let event_index = self.features & spec::F_EVENT_IDX != 0;
        self.queues.set(position, WorkerQueue::new(active, event_index));
    }

    /// A queue that the driver enabled cannot be served.
    pub(super) fn cannot_start_queue(&self, error: &io::Error) {
        self.shared.report_own_error("start a queue", error);
        self.request_reset();
    }

    /// The driver kicked the queue at `position`: serves the queue until it is empty or its turn is over.
    pub(super) fn serve(&mut self, position: usize) {
        waypoint!();
        self.now = Instant::now();
        self.dispatcher.begin_turn();
        if let Some(interrupt) = &self.interrupt {
            interrupt.collect_acknowledgements();
        }
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
                let kicked = self.queues.find(position).map(|queue| queue.kick.write(1));
                if let Some(Err(error)) = kicked {
                    self.shared.report_own_error("wake its own thread", &error);
                }
            }
            Ok(false) => {}
        }
    }

    /// The engine finished something, or an earlier turn was cut short: completes requests and submits further pieces.
    pub(super) fn continue_requests(&mut self) {
        self.dispatcher.begin_turn();
        self.submit_and_complete();
        self.notify();
    }

    /// Whether a turn ended although more pieces could be submitted: the thread must then call `continue_requests`.
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

    /// Begins the stopped requests again, queue by queue and in the order in which they stopped. Those that a limit does not admit wait for
    /// the limiter. Then serves all queues.
    pub(super) fn resume(&mut self) {
        self.state = State::Serving;
        self.dispatcher.begin_turn();
        self.now = Instant::now();
        for position in self.queues.positions() {
            let queue = self.queues.find_mut(position);
            for chain in queue.map(|queue| std::mem::take(&mut queue.stopped)).unwrap_or_default() {
                let taken = TakenChain { chain, queue: position, started: self.now };
                self.begin_again(taken, Origin::New);
            }
        }
        self.continue_requests();
        self.start_waiting(Instant::now());
        self.queues.positions().for_each(|position| self.serve(position));
    }

    /// Continues the resets under way. The thread calls this after each event.
    pub(super) fn advance_resets(&mut self) {
        let mut resets = std::mem::take(&mut self.resets);
        resets.retain_mut(|is_over| !is_over(self));
        self.resets = resets;
    }

    /// Starts the requests that waited and that the limiter now admits: its timer expired, or the limits changed.
    pub(super) fn start_waiting(&mut self, now: Instant) {
        if self.state != State::Serving {
            return;
        }
        self.now = now;
        self.dispatcher.begin_turn();
        while let Some(taken) = self.limiter.next(now) {
            self.begin_again(taken, Origin::Waited);
        }
        self.submit_and_complete();
        self.notify();
    }
}

#[cfg(test)]
impl Worker {
    pub(in crate::block) fn limiter(&self) -> &dyn Any {
        &*self.limiter
    }
}

//! Resets, of a device or of one queue: the worker gives its queues up, and hands them back when none of their chains is outstanding.
//! `devices/docs/follow-one-reset.md` walks through a reset.
//!
//! A capability: a request passes it only if its queue is reset. `device` sends [`Loop::reset`] and [`Loop::reset_queue`] as commands.
//! Both mark queues as `Leaving` and put a [`Reset`](super::Reset) into the worker, whose thread calls it after each event. The reset of
//! a device also waits for a last flush: no driver is left that would make written data durable.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events};

use super::{State, Worker};
use crate::block::queue::QueueState;
use crate::block::worker_thread::Loop;
use crate::clock::Instant;
use crate::disk::Transfer;
use crate::virtio::device::ActiveQueue;
use crate::virtio::drain::Party;

impl Loop {
    /// Begins the reset of the queue at `position`. `party` finishes when the queue has been handed back.
    pub(in crate::block) fn reset_queue(
        &mut self,
        position: usize,
        party: Party,
        ops: &mut EventOps<'_>,
    ) {
        self.unwatch(position, ops);
        self.worker.reset_queue(position, party);
    }

    /// Begins the reset of the device. `party` finishes when all queues of the worker have been handed back.
    pub(in crate::block) fn reset(&mut self, party: Party, ops: &mut EventOps<'_>) {
        // Before the eventfds are closed: the loop would refuse a new descriptor with the number of one that it still has.
        self.worker.queues.positions().for_each(|position| self.unwatch(position, ops));
        self.worker.reset(party);
    }

    fn unwatch(&self, position: usize, ops: &mut EventOps<'_>) {
        if let Some(queue) = self.worker.queues.find(position)
            && queue.state != QueueState::Leaving
            && let Err(error) = ops.remove(Events::empty_raw(queue.kick.as_raw_fd()))
        {
            let disk = &self.worker.shared.options.name;
            tracing::error!("disk {disk}: cannot stop watching a queue: {error}");
        }
    }
}

impl Worker {
    pub(in crate::block) fn reset_queue(&mut self, position: usize, party: Party) {
        let state = self.state;
        // First: if what follows panics, the part in the drain is finished after the engine is dropped.
        self.resets.push(Box::new(move |worker| worker.hand_back(position, &party)));
        self.leave(position);
        self.submit_pieces();
        if state != self.state {
            self.start_waiting(Instant::now());
        }
    }

    pub(in crate::block) fn reset(&mut self, party: Party) {
        let mut reset = DeviceReset { party, flushes: false };
        self.resets.push(Box::new(move |worker| reset.advance(worker)));
        self.queues.positions().for_each(|position| self.leave(position));
        // Only now, when all queues leave: no request gets its next piece.
        self.submit_pieces();
    }

    /// Takes no more chains from a queue, and gives up what is stopped or waits. The caller then calls `submit_pieces`, which
    /// completes the requests in pieces.
    fn leave(&mut self, position: usize) {
        let Some(queue) = self.queues.find_mut(position) else { return };
        queue.state = QueueState::Leaving;
        for chain in queue.stopped.drain(..).chain(self.limiter.give_up(position)) {
            queue.split.abandon(chain);
        }
        let is_stopped = self.queues.iter().any(|(_, queue)| !queue.stopped.is_empty());
        if self.state == State::Stopped && !is_stopped {
            self.state = State::Serving;
        }
    }

    /// Hands the queue at `position` back if none of its chains is outstanding. Returns whether the worker no longer has it.
    fn hand_back(&mut self, position: usize, party: &Party) -> bool {
        let Some(entry) = self.queues.0.get_mut(position) else { return true };
        if let Some(queue) = entry.take_if(|queue| queue.split.outstanding() == 0) {
            let (index, kick) = (queue.index, queue.kick);
            let queue = queue.split.into_inner();
            party.hand_back(ActiveQueue { index, queue, kick, restored: false });
        }
        entry.is_none()
    }
}

struct DeviceReset {
    party: Party,
    /// The last flush is with the engine.
    flushes: bool,
}

impl DeviceReset {
    /// Takes the next step. Returns whether the reset is over.
    fn advance(&mut self, worker: &mut Worker) -> bool {
        let dispatcher = &mut worker.dispatcher;
        if !self.flushes {
            if !dispatcher.is_empty() {
                return false;
            }
            self.flushes = worker.interrupt.is_some() && !worker.shared.disk.info().read_only;
            if self.flushes {
                dispatcher.flushing = true;
                // Nothing else is in flight, so no other transfer has this tag.
                dispatcher.engine.submit(Transfer::FLUSH);
                dispatcher.engine.commit();
            }
        }
        if self.flushes {
            let mut done = Vec::new();
            dispatcher.engine.reap(&mut done);
            let Some(completion) = done.pop() else { return false };
            dispatcher.flushing = false;
            if let Err(error) = completion.result {
                let disk = &worker.shared.options.name;
                worker.shared.log_limits.last_flush.warn(format_args!(
                    "disk {disk}: its last flush failed: {error}; what the guest had not flushed may be lost"
                ));
            }
        }
        worker.interrupt = None;
        let mut positions = worker.queues.positions();
        positions.all(|position| worker.hand_back(position, &self.party))
    }
}

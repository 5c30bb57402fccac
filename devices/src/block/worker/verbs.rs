//! The six verbs that a request passes, and their helpers. The parent module has their order, and the worker's states.
//!
//! `pass` runs all six for the chains of one queue. The methods `fetch`, `submit`, `complete_request` and `notify` are four of them.
//! `parse_and_admit` is two: it calls `request::parse`, and then asks the limiter. `begin_again` takes a request that came out of the ring
//! earlier through the verbs from *parse* on: it was stopped, had to wait for the limiter, or failed as a part of a group.
//!
//! The modules that these methods call decide and count. Only the worker acts.

use vm_memory::GuestAddress;

use super::{State, Worker};
use crate::GuestMemory;
use crate::block::admission::Origin;
use crate::block::batch::BATCH_MAX;
use crate::block::in_flight::Step;
use crate::block::queue::{QueueState, TakenChain, WorkerQueue};
use crate::block::request::{Action, Refusal, Request, parse};
use crate::clock::Instant;
use crate::disk::{Completion, Operation};
use crate::virtio::queue::{QueueError, memory};
use crate::virtio::spec::{self, blk};

/// The verbs.
impl Worker {
    /// One pass over a queue: fetches chains, submits their requests, and completes what is finished. `true`: there
    /// may be more to fetch.
    pub(super) fn pass(&mut self, position: usize) -> Result<bool, QueueError> {
        let is_running = |queue: &WorkerQueue| queue.state == QueueState::Running;
        if self.state != State::Serving || !self.queues.find(position).is_some_and(is_running) {
            return Ok(false);
        }
        let fetched = self.fetch(position);
        // Even if the ring is broken: the chains that were fetched before are still served.
        self.submit_and_complete();
        if fetched? || self.poll_for_more(position) {
            return Ok(true);
        }
        self.notify();
        self.queues.get(position).split.enable_notifications(&self.memory)
    }

    /// Takes up to [`BATCH_MAX`] chains from the queue, and starts parsing each. `true`: more are available.
    fn fetch(&mut self, position: usize) -> Result<bool, QueueError> {
        waypoint!();
        let memory = &self.memory;
        let split = &mut self.queues.get(position).split;
        split.disable_notifications(memory)?;
        let available = split.available(memory)?;
        if available == 0 {
            return Ok(false);
        }
        split.note_submission(memory);
        self.now = Instant::now();
        self.busy_polling.work(self.now);
        // The request limits are read after the available index. So if the driver changed `writeback` before it added these chains,
        // the change applies to them.
        self.details.limits = self.shared.request_limits(self.features, !self.limiter.is_off());
        let count = available.min(BATCH_MAX as u16);
        for _ in 0..count {
            let chain = self.queues.get(position).split.pop(&self.memory)?;
            let taken = TakenChain { chain, queue: position, started: self.now };
            self.parse_and_admit(taken, Origin::New)?;
        }
        Ok(available > count)
    }

    /// Begins a chain that was taken from the ring before.
    pub(super) fn begin_again(&mut self, taken: TakenChain, origin: Origin) {
        let queue = taken.queue;
        self.details.limits = self.shared.request_limits(self.features, !self.limiter.is_off());
        if let Err(error) = self.parse_and_admit(taken, origin) {
            self.break_queue(queue, error);
        }
    }

    /// Walks and parses a chain. Then submits its request, lets it wait for the limiter, or refuses it.
    fn parse_and_admit(&mut self, taken: TakenChain, origin: Origin) -> Result<(), QueueError> {
        let (memory, details) = (&self.memory, &mut self.details);
        let split = &mut self.queues.get(taken.queue).split;
        let indirect = details.limits.features & spec::F_INDIRECT_DESC != 0;
        if let Err(error) = split.walk(memory, &taken.chain, indirect, &mut self.buffers) {
            split.abandon(taken.chain);
            return Err(error.into());
        }
        let types = &self.shared.request_types;
        let Some(request) = parse(&mut self.buffers, memory, types, details) else {
            return self.refuse(taken);
        };
        let (kind, bytes, now) = (request.kind, request.range.length, taken.started);
        if details.limits.throttled && !self.limiter.try_start(kind, bytes, origin, now) {
            self.limiter.hold(kind, taken);
        } else {
            self.submit(taken, request, origin);
        }
        Ok(())
    }

    /// Hands the request to the engine, or completes it if it needs no disk.
    fn submit(&mut self, taken: TakenChain, request: Request, origin: Origin) {
        let Request { kind, action, range, .. } = request;
        // `{ kind }` is a copy: a reference would keep the request out of registers.
        tracing::trace!(
            target: "virtio_blk_handle", disk = self.shared.options.name, req = taken.id(), kind = ?{ kind },
            sector = matches!(action, Action::Transfer | Action::Ranges).then_some(range.offset / blk::SECTOR_SIZE),
            nsectors = range.length / blk::SECTOR_SIZE,
        );
        let is_answered =
            range.length == 0 && matches!(action, Action::Answered | Action::Transfer);
        if !is_answered {
            tracing::trace!(target: "virtio_blk_submit", req = taken.id());
        }
        let tag = self.dispatcher.in_flight.insert(taken, request);
        match action {
            Action::Transfer if !is_answered => {
                let data = if range.operation == Operation::Read {
                    self.buffers.writable()
                } else {
                    self.shared.changes_up_to(range.offset + range.length);
                    self.buffers.readable()
                };
                self.dispatcher.submit_transfer(tag, data, origin == Origin::Retry);
            }
            Action::Transfer | Action::Answered => self.complete_request(tag, blk::S_OK),
            Action::Flush => self.dispatcher.submit_flush(tag),
            Action::Ranges => {
                let ranges = &self.details.ranges;
                let ends = ranges.iter().map(|range| range.offset + range.length);
                self.shared.changes_up_to(ends.max().unwrap_or_default());
                self.dispatcher.begin_pieces(tag, ranges, &[]);
            }
            Action::Command => match self.details.command.take() {
                Some(command) => self.dispatcher.submit_command(tag, command, &self.buffers),
                None => self.complete_request(tag, blk::S_IOERR),
            },
        }
    }

    /// Completes everything that the engine has finished, and publishes the completions to the driver.
    pub(super) fn reap_finished(&mut self) {
        let mut reaped = std::mem::take(&mut self.reaped);
        let mut any = false;
        while self.dispatcher.in_flight.len() > 0 {
            self.dispatcher.engine.reap(&mut reaped);
            if reaped.is_empty() {
                break;
            }
            any = true;
            self.now = Instant::now();
            for completion in reaped.drain(..) {
                self.transfer_finished(completion);
            }
            for queue in self.queues.iter_mut() {
                // Cannot fail: the transport has checked where the ring lies. If it does fail, `publish` interrupts all the same.
                let _ = queue.split.store_used_index(&self.memory);
            }
            self.submit_pieces();
            // Submits the rest of the batch, and the requests that begin again alone after their group failed.
            self.dispatcher.commit();
        }
        self.reaped = reaped;
        // A paused worker does not touch guest memory, unless it has just completed something.
        if any || self.state != State::Paused {
            let (memory, now) = (&self.memory, self.now);
            self.queues.iter_mut().for_each(|queue| queue.split.publish(memory, now));
        }
    }

    /// A transfer is finished: completes its request, or all requests that were merged into it. Or does what the error policy decides.
    fn transfer_finished(&mut self, Completion { tag, result }: Completion) {
        let (mut next, mut merged) = (Some(tag), false);
        while let Some(tag) = next {
            next = self.dispatcher.end_transfer(tag, result.is_ok());
            merged |= next.is_some();
            let in_flight = self.dispatcher.in_flight.get(tag);
            let code = match (&in_flight.step, result) {
                (Step::Command(command), _) => {
                    let code;
                    (code, in_flight.parsed.written) = command.reply(&self.memory, result);
                    Some(code)
                }
                // A piece: the next one is submitted, or the request ends.
                (Step::Pieces, Ok(())) => {
                    self.dispatcher.ready.push_back(tag);
                    continue;
                }
                (_, Ok(())) => Some(blk::S_OK),
                (_, Err(_)) if merged => None,
                (_, Err(error)) => self.shared.host_errors.decide(in_flight.parsed.kind, error),
            };
            match code {
                Some(code) => self.complete_request(tag, code),
                // A group failed, which does not say which of its requests did: each is tried again, alone.
                None if merged => self.retry(tag),
                None => self.stop(tag),
            }
        }
    }

    /// Interrupts the driver, if it wants an interrupt for what was published. The passes of one turn share a call of this. But if an
    /// interrupt becomes due while the worker busy-polls, it is sent at once.
    pub(super) fn notify(&mut self) {
        // The queues share the line, and a driver that is interrupted looks at all of them. So every coalescer is reset.
        let take = |wanted, queue: &mut WorkerQueue| queue.split.take_interrupt() || wanted;
        if self.queues.iter_mut().fold(false, take)
            && let Some(interrupt) = &self.interrupt
        {
            self.counters.interrupts.add(1);
            tracing::trace!(target: "virtio_notify", disk = self.shared.options.name);
            let begin = Instant::now();
            interrupt.used_buffer();
            self.busy_polling.interrupted(Instant::now() - begin);
        }
    }
}

/// Helpers of the verbs.
impl Worker {
    /// Submits the next pieces of requests in pieces, and completes those that have ended. A paused worker submits none.
    pub(super) fn submit_pieces(&mut self) {
        let submit = self.state != State::Paused;
        for _ in 0..self.dispatcher.ready.len() {
            let is_leaving = |queue| self.queues.is_leaving(queue);
            if let Some((tag, code)) = self.dispatcher.submit_piece(submit, is_leaving) {
                self.complete_request(tag, code);
            }
        }
    }

    /// Submits all that was gathered, and completes what is finished. Sends no interrupt: the caller calls `notify`.
    pub(super) fn submit_and_complete(&mut self) {
        self.submit_pieces();
        self.dispatcher.commit();
        self.reap_finished();
    }

    /// Completes a request with this status: counts it, and writes the status byte and the used ring.
    fn complete_request(&mut self, tag: u32, code: u8) {
        let in_flight = self.dispatcher.in_flight.get(tag);
        tracing::trace!(target: "virtio_blk_req_complete", req = in_flight.taken.id(), status = code);
        let Request { kind, status, range, mut written, .. } = in_flight.parsed;
        let time = self.now.nanoseconds_since(in_flight.taken.started);
        if code == blk::S_OK {
            self.counters.done(
                kind,
                range.length,
                range.offset + range.length,
                in_flight.merged,
                time,
            );
        } else {
            self.counters.failed(kind, time);
            // Of a request that failed, only a command has written data that counts.
            written = if matches!(in_flight.step, Step::Command(_)) { written } else { 0 };
        }
        put_status(&self.memory, status, code);
        let TakenChain { chain, queue, .. } = self.dispatcher.in_flight.remove(tag);
        let split = &mut self.queues.get(queue).split;
        if let Err(error) = split.complete(&self.memory, chain, written + blk::STATUS_SIZE as u32) {
            self.break_queue(queue, error);
        }
    }

    /// The error policy stops a request until `resume`.
    fn stop(&mut self, tag: u32) {
        let taken = self.dispatcher.in_flight.remove(tag);
        let waits = self.queues.get(taken.queue).stop_request(taken.chain);
        if waits && self.state == State::Serving {
            self.state = State::Stopped;
        }
    }

    /// Begins a request again that was merged into a transfer that failed. If the worker is paused, the request waits for `resume`. If its
    /// queue is leaving, it is abandoned.
    fn retry(&mut self, tag: u32) {
        let taken = self.dispatcher.in_flight.remove(tag);
        if self.state == State::Paused || self.queues.is_leaving(taken.queue) {
            self.queues.get(taken.queue).stop_request(taken.chain);
        } else {
            self.begin_again(taken, Origin::Retry);
        }
    }

    /// Answers a chain that did not become a request.
    fn refuse(&mut self, taken: TakenChain) -> Result<(), QueueError> {
        self.shared.report_refusal(&self.details.refusal);
        let written = match self.details.refusal {
            Refusal::Status { kind, address, code, written } => {
                self.counters.invalid(kind);
                put_status(&self.memory, address, code);
                written + blk::STATUS_SIZE as u32
            }
            Refusal::Unanswerable => {
                self.counters.unanswerable.add(1);
                0
            }
        };
        let split = &mut self.queues.get(taken.queue).split;
        split.complete(&self.memory, taken.chain, written)
    }

    /// The driver broke this queue: takes nothing more from it until a reset. The other queues go on (virtio 1.2 §2.1.2).
    pub(super) fn break_queue(&mut self, position: usize, error: QueueError) {
        let Some(queue) = self.queues.find_mut(position) else { return };
        if queue.state == QueueState::Running {
            queue.state = QueueState::Broken;
            self.counters.broken_rings.add(1);
            self.shared.report_broken_queue(queue.index, error);
            self.request_reset();
        }
    }

    /// Sets DEVICE_NEEDS_RESET, so that the driver resets the device (virtio 1.2 §2.1.2).
    pub(super) fn request_reset(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.device_needs_reset();
        }
    }

    /// Busy-polls for chains and completions, if `busy_poll` says that this pays. The driver does not kick meanwhile
    /// (`disable_notifications`). Returns `true` if the queue at `position` has chains.
    fn poll_for_more(&mut self, position: usize) -> bool {
        self.now = Instant::now();
        let Some(end) = self.busy_polling.idle(self.now) else { return false };
        loop {
            if !self.dispatcher.is_empty() {
                self.reap_finished();
            }
            let max_delay = self.busy_polling.max_interrupt_delay();
            let (now, expected) = (self.now, self.busy_polling.expected());
            let due = |queue: &mut WorkerQueue| {
                queue.split.coalescer.should_interrupt(now, expected, max_delay)
            };
            if self.queues.iter_mut().any(due) {
                self.notify();
            }
            let memory = &self.memory;
            if let Some((found, _)) = self.queues.iter().find(|(_, queue)| queue.has_work(memory)) {
                return found == position;
            }
            self.now = Instant::now();
            if self.now >= end || self.dispatcher.turn_is_over() {
                self.busy_polling.in_vain(self.now);
                return false;
            }
            std::hint::spin_loop();
        }
    }
}

/// Writes the status byte. Its address was checked when the chain was walked.
#[inline(always)]
fn put_status(memory: &GuestMemory, address: GuestAddress, code: u8) {
    if memory::store(memory, address, code).is_none() {
        tracing::error!("bug in minivmm, please report it: a status byte outside guest memory");
    }
}

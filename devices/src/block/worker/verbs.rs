//! The six verbs that a request passes, and their helpers.
//!
//! See the parent module for their order, and for the states. A verb is called by the one before it, or by a method that the
//! thread calls. Each calls a module below once, and acts on the value that it gets back.

use vm_memory::GuestAddress;

use super::{State, Worker};
use crate::GuestMemory;
use crate::block::admission::Origin;
use crate::block::batch::BATCH_MAX;
use crate::block::in_flight::{InFlightRequest, Step};
use crate::block::queue::{QueueState, TakenChain, WorkerQueue};
use crate::block::request::{Action, DiskRange, Refusal, Request, RequestLimits, parse};
use crate::clock::Instant;
use crate::disk::{Completion, Operation};
use crate::virtio::queue::{QueueError, memory};
use crate::virtio::spec::{self, blk};

/// The verbs.
impl Worker {
    /// One pass over a queue: fetches a batch of chains, submits their requests, and completes what is finished. `true`: there
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

    /// Takes up to [`BATCH_MAX`] chains from the queue, and begins each. `true`: more wait.
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
        // Read after the available index, so that a change that the driver made before it added these chains applies to them.
        let limits = self.shared.request_limits(self.features);
        let count = available.min(BATCH_MAX as u16);
        for _ in 0..count {
            let chain = self.queues.get(position).split.pop(&self.memory)?;
            let taken = TakenChain { chain, queue: position, started: self.now };
            self.try_begin(taken, &limits, Origin::Queue)?;
        }
        Ok(available > count)
    }

    /// Begins a chain that was taken from the ring before.
    pub(super) fn begin(&mut self, taken: TakenChain, origin: Origin) {
        let (queue, limits) = (taken.queue, self.shared.request_limits(self.features));
        if let Err(error) = self.try_begin(taken, &limits, origin) {
            self.break_queue(queue, error);
        }
    }

    /// Walks and parses a chain. Then submits its request, lets it wait for the limiter, or refuses it.
    fn try_begin(
        &mut self,
        taken: TakenChain,
        limits: &RequestLimits,
        origin: Origin,
    ) -> Result<(), QueueError> {
        let memory = &self.memory;
        let split = &mut self.queues.get(taken.queue).split;
        let indirect = limits.features & spec::F_INDIRECT_DESC != 0;
        if let Err(error) = split.walk(memory, &taken.chain, indirect, &mut self.buffers) {
            split.abandon(taken.chain);
            return Err(error.into());
        }
        let request = match parse(&mut self.buffers, memory, limits, &self.shared.request_types) {
            Ok(request) => request,
            Err(refusal) => return self.refuse(taken, &refusal),
        };
        if self.limiter.is_off() || self.limiter.admits(&request, origin, taken.started) {
            self.submit(taken, request, origin);
        } else {
            self.limiter.hold(&request, taken);
        }
        Ok(())
    }

    /// Hands the request to the engine, or answers it if it needs no disk.
    fn submit(&mut self, taken: TakenChain, request: Request, origin: Origin) {
        let Request { kind, status, action } = request;
        let mut request = InFlightRequest::new(taken, kind, status);
        tracing::trace!(
            target: "virtio_blk_handle", disk = self.shared.options.name, req = request.id(), ?kind,
            sector = action.ranges().first().map(|range| range.offset / blk::SECTOR_SIZE),
            nsectors = action.ranges().iter().map(|range| range.length / blk::SECTOR_SIZE).sum::<u64>(),
        );
        match action {
            Action::Transfer(DiskRange { length: 0, .. }) => self.answer(request, blk::S_OK),
            Action::Transfer(range) => {
                (request.length, request.end) = (range.length, range.offset + range.length);
                let data = if range.operation == Operation::Read {
                    request.written = range.length as u32;
                    self.buffers.writable()
                } else {
                    self.shared.changes_up_to(request.end);
                    self.buffers.readable()
                };
                let alone = origin == Origin::Retry;
                self.dispatcher.submit_transfer(request, range, data, alone);
            }
            Action::Flush => self.dispatcher.submit_flush(request),
            Action::Ranges(ranges) => {
                request.length = ranges.iter().map(|range| range.length).sum();
                let ends = ranges.iter().map(|range| range.offset + range.length);
                self.shared.changes_up_to(ends.max().unwrap_or_default());
                self.dispatcher.submit_ranges(request, &ranges, &[]);
            }
            Action::Answered(written) => {
                request.written = written;
                self.answer(request, blk::S_OK);
            }
            Action::Command(command) => {
                request.step = Step::Command(command);
                self.dispatcher.submit_command(request, &self.buffers);
            }
        }
    }

    /// Completes everything that the engine has finished, and publishes the completions to the driver.
    pub(super) fn complete_finished(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        let mut any = false;
        while self.dispatcher.in_flight.len() > 0 {
            self.dispatcher.engine.reap(&mut done);
            if done.is_empty() {
                break;
            }
            any = true;
            self.now = Instant::now();
            for completion in done.drain(..) {
                self.complete(completion);
            }
            for queue in self.queues.iter_mut() {
                // A used ring outside of guest memory is noticed by `publish`, too.
                let _ = queue.split.show(&self.memory);
            }
            self.submit_pieces();
            // Submits the next step of the batch, and retries that `complete` has begun.
            self.dispatcher.commit();
        }
        self.done = done;
        // A paused worker does not touch guest memory, unless it has just completed something.
        if any || self.state != State::Paused {
            let (memory, now) = (&self.memory, self.now);
            self.queues.iter_mut().for_each(|queue| queue.split.publish(memory, now));
        }
    }

    /// A transfer is finished: ends its request, or all requests that were merged into it.
    fn complete(&mut self, completion: Completion) {
        let Completion { tag, result } = completion;
        let (mut tag, mut merged) = (Some(tag), false);
        while let Some(member) = tag {
            let (request, next) = self.dispatcher.take_back(member, result.is_ok());
            (tag, merged) = (next, merged || next.is_some());
            let Some(mut request) = request else { continue };
            match (&request.step, result) {
                (Step::Command(command), _) => {
                    let (code, written) = command.reply(&self.memory, result);
                    request.written = written;
                    self.answer(request, code);
                }
                (_, Ok(())) => self.answer(request, blk::S_OK),
                // A group failed, which does not say which of its requests did: each is tried again, alone.
                (_, Err(_)) if merged => self.retry(request.taken),
                (_, Err(error)) => match self.shared.host_errors.decide(request.kind, error) {
                    Some(code) => self.answer(request, code),
                    None => self.stop(request.taken),
                },
            }
        }
    }

    /// Interrupts the driver, if it wants an interrupt for what was published. The passes of one turn share a call of this. But if an
    /// interrupt is due while the worker busy-polls, it is sent at once.
    pub(super) fn notify(&mut self) {
        // The queues share the line, and a driver that is interrupted looks at all of them. So every coalescer is reset.
        let mut wanted = false;
        for queue in self.queues.iter_mut() {
            wanted |= queue.split.take_interrupt();
        }
        if wanted && let Some(interrupt) = &self.interrupt {
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
    /// Submits the next pieces of requests in pieces, and answers those that have ended. A paused worker submits none.
    pub(super) fn submit_pieces(&mut self) {
        let submit = self.state != State::Paused;
        for _ in 0..self.dispatcher.ready.len() {
            let is_leaving = |queue| self.queues.is_leaving(queue);
            if let Some((request, code)) = self.dispatcher.submit_piece(submit, is_leaving) {
                self.answer(request, code);
            }
        }
    }

    /// Submits all that was gathered, and completes what is finished. Sends no interrupt: the caller calls `notify`.
    pub(super) fn submit_and_complete(&mut self) {
        self.submit_pieces();
        self.dispatcher.commit();
        self.complete_finished();
    }

    /// Answers a request with this status: counts it, and writes the status byte and the used ring.
    fn answer(&mut self, request: InFlightRequest, code: u8) {
        tracing::trace!(target: "virtio_blk_req_complete", req = request.id(), status = code);
        let InFlightRequest { taken: TakenChain { chain, queue, started }, kind, status, .. } =
            request;
        let time = self.now.saturating_duration_since(started);
        match code {
            blk::S_OK => {
                self.counters.done(kind, request.length, request.end, request.merged, time)
            }
            _ => self.counters.failed(kind, time),
        }
        put_status(&self.memory, status, code);
        let counts = code == blk::S_OK || matches!(request.step, Step::Command(_));
        let written = if counts { request.written } else { 0 } + blk::STATUS_SIZE as u32;
        let split = &mut self.queues.get(queue).split;
        if let Err(error) = split.complete(&self.memory, chain, written) {
            self.break_queue(queue, error);
        }
    }

    /// The error policy stops a request until `resume`.
    fn stop(&mut self, taken: TakenChain) {
        let waits = self.queues.get(taken.queue).stop_request(taken.chain);
        if waits && self.state == State::Serving {
            self.state = State::Stopped;
        }
    }

    /// Begins a request again that was merged into a transfer that failed.
    fn retry(&mut self, taken: TakenChain) {
        if self.state == State::Paused || self.queues.is_leaving(taken.queue) {
            self.queues.get(taken.queue).stop_request(taken.chain);
        } else {
            self.begin(taken, Origin::Retry);
        }
    }

    /// Answers a chain that did not become a request.
    fn refuse(&mut self, taken: TakenChain, refusal: &Refusal) -> Result<(), QueueError> {
        self.shared.report_refusal(refusal);
        let written = match *refusal {
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
            self.needs_reset();
        }
    }

    /// Has the driver reset the device (virtio 1.2 §2.1.2).
    pub(super) fn needs_reset(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.device_needs_reset();
        }
    }

    /// Busy-polls for chains and completions, if `busy_poll` says that this pays. The driver has been asked not to kick. Returns
    /// `true` if the queue at `position` has chains.
    fn poll_for_more(&mut self, position: usize) -> bool {
        let mut now = Instant::now();
        let Some(end) = self.busy_polling.idle(now) else { return false };
        loop {
            if !self.dispatcher.is_empty() {
                self.complete_finished();
            }
            let expected = self.busy_polling.expected();
            let max_delay = self.busy_polling.max_interrupt_delay();
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
            now = Instant::now();
            if now >= end || self.dispatcher.turn_is_over() {
                self.busy_polling.in_vain(now);
                return false;
            }
            std::hint::spin_loop();
        }
    }
}

/// Writes the status byte. Its address was checked when the chain was walked.
fn put_status(memory: &GuestMemory, address: GuestAddress, code: u8) {
    if memory::store(memory, address, code).is_none() {
        tracing::error!(address = address.0, "bug: a status byte outside guest memory");
    }
}

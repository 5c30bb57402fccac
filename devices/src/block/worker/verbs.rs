//! The six verbs that a request passes, and their helpers.
//!
//! See the parent module for their order, and for the states. A verb is called by the one before it, or by a method that the
//! thread calls. Each calls a module below once, and acts on the value that it gets back.

use std::time::Duration;

use vm_memory::GuestAddress;

use super::{Ending, Origin, State, Worker};
use crate::GuestMemory;
use crate::block::admission::{Direction, WaitingRequest, measure};
use crate::block::batch::BATCH_MAX;
use crate::block::error_policy::decide;
use crate::block::events::ErrorAction;
use crate::block::in_flight::{InFlightRequest, Step};
use crate::block::queue::{QueueState, WorkerQueue};
use crate::block::request::{Action, DiskRange, Refusal, Request, RequestLimits, parse};
use crate::block::stats::Kind;
use crate::clock::Instant;
use crate::disk::{Completion, DiskError, Operation};
use crate::virtio::queue::{ChainBuffers, DescriptorChain, QueueError, memory, write_at};
use crate::virtio::spec::{self, blk};

/// The verbs.
impl Worker {
    /// One pass over a queue: fetches a batch of chains, submits their requests, and completes what is finished. `true`: there
    /// may be more to fetch.
    pub(super) fn pass(&mut self, position: usize) -> Result<bool, QueueError> {
        if self.state != State::Serving
            || self.queue(position).is_none_or(|queue| queue.state != QueueState::Running)
        {
            return Ok(false);
        }
        let fetched = self.fetch(position);
        // Even if the ring is broken: the chains that were fetched before are still served.
        self.submit_and_complete();
        if fetched? || self.poll_for_more(position) {
            return Ok(true);
        }
        self.notify();
        match self.queues.find(position) {
            Some(queue) => queue.split.enable_notifications(&self.negotiated.memory),
            None => Ok(false),
        }
    }

    /// Takes up to [`BATCH_MAX`] chains from the queue, and begins each. `true`: more wait.
    fn fetch(&mut self, position: usize) -> Result<bool, QueueError> {
        waypoint!();
        let memory = &self.negotiated.memory;
        let Some(queue) = self.queues.find_mut(position) else { return Ok(false) };
        queue.split.disable_notifications(memory)?;
        let available = queue.split.available(memory)?;
        if available == 0 {
            return Ok(false);
        }
        queue.split.note_submission(memory);
        self.now = Instant::now();
        self.busy_polling.work(self.now);
        // Read after the available index, so that a change that the driver made before it added these chains applies to them.
        let limits = self.shared.request_limits(self.negotiated.features);
        // Moved out of `self`, because a request borrows from the buffers while methods of the worker are called.
        let mut buffers = std::mem::take(&mut self.buffers);
        let count = available.min(BATCH_MAX as u16);
        let fetched = (0..count).try_for_each(|_| {
            let chain = self.queues.get(position).split.pop(&self.negotiated.memory)?;
            self.try_begin(position, chain, &limits, &mut buffers, self.now, Origin::Queue)
        });
        self.buffers = buffers;
        fetched.map(|()| available > count)
    }

    /// Begins a chain that was taken from the ring before.
    pub(super) fn begin(
        &mut self,
        position: usize,
        chain: DescriptorChain,
        started: Instant,
        origin: Origin,
    ) {
        let limits = self.shared.request_limits(self.negotiated.features);
        let mut buffers = std::mem::take(&mut self.buffers);
        let begun = self.try_begin(position, chain, &limits, &mut buffers, started, origin);
        self.buffers = buffers;
        if let Err(error) = begun {
            self.break_queue(position, error);
        }
    }

    /// Walks and parses a chain. Then submits its request, lets it wait for the limiter, or refuses it.
    fn try_begin(
        &mut self,
        position: usize,
        chain: DescriptorChain,
        limits: &RequestLimits,
        buffers: &mut ChainBuffers,
        started: Instant,
        origin: Origin,
    ) -> Result<(), QueueError> {
        let memory = &self.negotiated.memory;
        let queue = self.queues.get(position);
        let indirect = limits.features & spec::F_INDIRECT_DESC != 0;
        if let Err(error) = queue.split.walk(memory, &chain, indirect, buffers) {
            queue.split.abandon(chain);
            return Err(error.into());
        }
        let request = match parse(buffers, memory, limits, &self.shared.request_types) {
            Ok(request) => request,
            Err(refusal) => return self.refuse(position, chain, &refusal),
        };
        match self.admit(&request, started, origin) {
            Ok(()) => self.submit(position, chain, request, started, origin),
            Err(direction) => {
                let waiting = self.queues.get(position).waiting(direction);
                waiting.push_back(WaitingRequest { chain, started });
            }
        }
        Ok(())
    }

    /// Lets a request start, and has the limiter count it.
    ///
    /// # Errors
    /// The request has to wait: the direction that it waits in.
    fn admit(
        &self,
        request: &Request<'_>,
        started: Instant,
        origin: Origin,
    ) -> Result<(), Direction> {
        let limiter = &self.shared.limiter;
        if limiter.is_off() || origin == Origin::Retry {
            return Ok(());
        }
        let Some((direction, bytes)) = measure(request) else { return Ok(()) };
        // No request overtakes those that wait for the same limit.
        let must_wait = || {
            self.queues.oldest_waiting(direction).is_some()
                || limiter.couples_directions() && self.queues.is_waiting()
                || limiter.wait(direction, started) > Duration::ZERO
        };
        if origin == Origin::Queue && must_wait() {
            return Err(direction);
        }
        limiter.charge(direction, bytes);
        Ok(())
    }

    /// Hands the request to the engine, or answers it if it needs no disk.
    fn submit(
        &mut self,
        queue: usize,
        chain: DescriptorChain,
        Request { kind, status, action, data }: Request<'_>,
        started: Instant,
        origin: Origin,
    ) {
        let mut request = InFlightRequest::new(chain, queue, kind, status, started);
        tracing::trace!(
            target: "virtio_blk_handle", disk = self.shared.options.name, req = request.id(), ?kind,
            sector = action.ranges().first().map(|range| range.offset / blk::SECTOR_SIZE),
            nsectors = action.ranges().iter().map(|range| range.length / blk::SECTOR_SIZE).sum::<u64>(),
        );
        let memory = &self.negotiated.memory;
        match action {
            Action::Transfer(DiskRange { length: 0, .. }) => self.answer(request, blk::S_OK),
            Action::Transfer(range) => {
                (request.length, request.end) = (range.length, range.offset + range.length);
                if range.operation == Operation::Read {
                    request.written = range.length as u32;
                } else {
                    self.shared.changes_up_to(request.end);
                }
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
            Action::Answer(bytes) => {
                request.written = write_at(memory, data, 0, &bytes) as u32;
                self.answer(request, blk::S_OK);
            }
            Action::Command(command) => {
                request.step = Step::Command(command);
                self.dispatcher.submit_command(request, data);
            }
        }
    }

    /// Completes everything that the engine has finished, and publishes the completions to the driver.
    pub(super) fn complete_finished(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        let mut any = false;
        loop {
            self.dispatcher.reap(&mut done);
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
                let _ = queue.split.show(&self.negotiated.memory);
            }
            self.submit_pieces();
            // Submits the next step of the batch, and retries that `complete` has begun.
            self.dispatcher.commit();
        }
        self.done = done;
        // A paused worker does not touch guest memory, unless it has just completed something.
        if any || self.state != State::Paused {
            let (memory, now) = (&self.negotiated.memory, self.now);
            self.queues.iter_mut().for_each(|queue| queue.split.publish(memory, now));
        }
    }

    /// A transfer is finished: ends its request, or all requests that were merged into it.
    fn complete(&mut self, completion: Completion) {
        if self.dispatcher.take_last_flush(&completion) {
            return self.last_flush_done(completion.result);
        }
        let Completion { tag, result } = completion;
        let (mut tag, mut merged) = (Some(tag), false);
        while let Some(member) = tag {
            let (request, next) = self.dispatcher.take_back(member, result.is_ok());
            (tag, merged) = (next, merged || next.is_some());
            let Some(mut request) = request else { continue };
            match (&request.step, result) {
                (Step::Command(command), _) => {
                    let (code, written) = command.reply(&self.negotiated.memory, result);
                    request.written = written;
                    self.answer(request, code);
                }
                (_, Ok(())) => self.answer(request, blk::S_OK),
                // A group failed, which does not say which of its requests did: each is tried again, alone.
                (_, Err(_)) if merged => self.retry(request),
                (_, Err(error)) => self.fail(request, error),
            }
        }
    }

    /// Interrupts the driver, if it wants an interrupt for what was published. Only `serve` delays this call.
    pub(super) fn notify(&mut self) {
        // The queues share the line, and a driver that is interrupted looks at all of them. So every coalescer is reset.
        let mut wanted = false;
        for queue in self.queues.iter_mut() {
            wanted |= queue.split.take_interrupt();
        }
        if wanted {
            self.counters.interrupts.add(1);
            tracing::trace!(target: "virtio_notify", disk = self.shared.options.name);
            let begin = Instant::now();
            self.negotiated.interrupt.used_buffer();
            self.busy_polling.interrupted(Instant::now() - begin);
        }
    }
}

/// Helpers of the verbs.
impl Worker {
    /// Submits the next pieces of requests in pieces, and answers those that have ended. A paused worker submits none.
    pub(super) fn submit_pieces(&mut self) {
        if !self.dispatcher.has_ready() {
            return;
        }
        let (submit, queues) = (self.state != State::Paused, &self.queues);
        let is_leaving = |position| queues.is_leaving(position);
        self.dispatcher.submit_pieces(submit, is_leaving, &mut self.ended);
        let mut ended = std::mem::take(&mut self.ended);
        for (request, code) in ended.drain(..) {
            self.answer(request, code);
        }
        self.ended = ended;
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
        let InFlightRequest { chain, queue, kind, status, .. } = request;
        let time = self.now.saturating_duration_since(request.started);
        match code {
            blk::S_OK => {
                self.counters.done(kind, request.length, request.end, request.merged, time)
            }
            _ => self.counters.failed(kind, time),
        }
        put_status(&self.negotiated.memory, status, code);
        let counts = code == blk::S_OK || matches!(request.step, Step::Command(_));
        let written = if counts { request.written } else { 0 } + blk::STATUS_SIZE as u32;
        let split = &mut self.queues.get(queue).split;
        if let Err(error) = split.complete(&self.negotiated.memory, chain, written) {
            self.break_queue(queue, error);
        }
    }

    /// The host failed a request: the error policy decides what becomes of it.
    fn fail(&mut self, request: InFlightRequest, error: DiskError) {
        let options = &self.shared.options;
        let read = request.kind == Kind::Read;
        let policy = if read { options.read_errors } else { options.write_errors };
        let Some(action) = decide(policy, error) else {
            let unsupported = error == DiskError::Unsupported;
            let code = if unsupported { blk::S_UNSUPP } else { blk::S_IOERR };
            return self.answer(request, code);
        };
        self.shared.report_error(request.kind, error, action);
        match action {
            ErrorAction::Report => self.answer(request, blk::S_IOERR),
            ErrorAction::Ignore => self.answer(request, blk::S_OK),
            ErrorAction::Stop => {
                if self.queues.get(request.queue).stop_request(request.chain)
                    && self.state == State::Serving
                {
                    self.state = State::Stopped;
                }
            }
        }
    }

    /// Begins a request again that was merged into a transfer that failed.
    fn retry(&mut self, InFlightRequest { queue, chain, started, .. }: InFlightRequest) {
        if self.state == State::Paused || self.queues.is_leaving(queue) {
            self.queues.get(queue).stop_request(chain);
        } else {
            self.begin(queue, chain, started, Origin::Retry);
        }
    }

    /// Answers a chain that did not become a request.
    fn refuse(
        &mut self,
        position: usize,
        chain: DescriptorChain,
        refusal: &Refusal,
    ) -> Result<(), QueueError> {
        self.shared.report_refusal(refusal);
        let written = match *refusal {
            Refusal::Status { kind, address, code, written } => {
                self.counters.invalid(kind);
                put_status(&self.negotiated.memory, address, code);
                written + blk::STATUS_SIZE as u32
            }
            Refusal::Unanswerable => {
                self.counters.unanswerable.add(1);
                0
            }
        };
        self.queues.get(position).split.complete(&self.negotiated.memory, chain, written)
    }

    /// The driver broke this queue: takes nothing more from it until a reset. The other queues go on (virtio 1.2 §2.1.2).
    pub(super) fn break_queue(&mut self, position: usize, error: QueueError) {
        let Some(queue) = self.queues.find_mut(position) else { return };
        if queue.state == QueueState::Running {
            queue.state = QueueState::Broken;
            self.counters.broken_rings.add(1);
            self.shared.report_broken_queue(queue.index, error);
            self.negotiated.interrupt.device_needs_reset();
        }
    }

    fn last_flush_done(&mut self, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.shared.report_last_flush(error);
        }
        self.ending = match std::mem::replace(&mut self.ending, Ending::No) {
            Ending::Flushing(drain) => Ending::Ended(drain),
            other => other,
        };
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
            let memory = &self.negotiated.memory;
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

    /// Takes the next waiting request that the limiter lets start at `now`, with the position of its queue.
    pub(super) fn next_admitted(&mut self, now: Instant) -> Option<(usize, WaitingRequest)> {
        for direction in [self.next_direction, self.next_direction.other()] {
            if let Some(position) = self.queues.oldest_waiting(direction)
                && self.shared.limiter.wait(direction, now) == Duration::ZERO
            {
                self.next_direction = direction.other();
                return Some((position, self.queues.get(position).waiting(direction).pop_front()?));
            }
        }
        None
    }
}

/// Writes the status byte. Its address was checked when the chain was walked.
fn put_status(memory: &GuestMemory, address: GuestAddress, code: u8) {
    if memory::store(memory, address, code).is_none() {
        tracing::error!(address = address.0, "bug: a status byte outside guest memory");
    }
}

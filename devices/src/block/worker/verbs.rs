//! The six verbs that a request passes, and what they need.
//!
//! See the parent module for their order, and for the states. Every verb is called by the one before it or by a command of
//! the thread; each calls down once and acts on the value that comes back.

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
    /// One batch: fetches all chains that wait, submits them, completes what is finished. `true`: look again.
    pub(super) fn pass(&mut self, position: usize) -> Result<bool, QueueError> {
        if self.state != State::Serving
            || self.queue(position).is_none_or(|queue| queue.state != QueueState::Running)
        {
            return Ok(false);
        }
        let fetched = self.fetch(position);
        // Whatever became of the rest, the chains fetched so far go on.
        self.hand_over();
        if fetched? || self.poll_for_more(position) {
            return Ok(true);
        }
        self.notify();
        match self.queues.find(position) {
            Some(queue) => queue.split.enable_notifications(&self.negotiated.memory),
            None => Ok(false),
        }
    }

    /// Takes the chains that wait in the queue, a batch at most, and begins each. `true`: more wait.
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
        // Read after the available index: a change that the driver made before it added these chains counts for them.
        let limits = self.shared.request_limits(self.negotiated.features);
        // Out of `self`, so that requests can borrow from it while the worker acts.
        let mut buffers = std::mem::take(&mut self.buffers);
        let count = available.min(BATCH_MAX as u16);
        let fetched = (0..count).try_for_each(|_| {
            let chain = self.queues.get(position).split.pop(&self.negotiated.memory)?;
            self.try_begin(position, chain, &limits, &mut buffers, self.now, Origin::Queue)
        });
        self.buffers = buffers;
        fetched.map(|()| available > count)
    }

    /// Begins a chain that was taken before.
    pub(super) fn begin(
        &mut self,
        position: usize,
        chain: DescriptorChain,
        started: Instant,
        from: Origin,
    ) {
        let limits = self.shared.request_limits(self.negotiated.features);
        let mut buffers = std::mem::take(&mut self.buffers);
        let begun = self.try_begin(position, chain, &limits, &mut buffers, started, from);
        self.buffers = buffers;
        if let Err(error) = begun {
            self.break_queue(position, error);
        }
    }

    /// Parses a chain, and submits its request, lets it wait, or answers it at once.
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
        match queue.split.walk(memory, &chain, indirect, buffers) {
            Err(error) => {
                queue.split.abandon(chain);
                Err(error.into())
            }
            Ok(()) => match parse(buffers, memory, limits, &self.shared.request_types) {
                Err(refusal) => self.refuse(position, chain, &refusal),
                Ok(request) => match self.must_wait(&request, started, origin) {
                    Some(direction) => {
                        let waiting = self.queues.get(position).waiting(direction);
                        waiting.push_back(WaitingRequest { chain, started });
                        Ok(())
                    }
                    None => {
                        self.submit(position, chain, request, started, origin);
                        Ok(())
                    }
                },
            },
        }
    }

    /// Admits a request, which the limiter has counted then, or says in which direction it has to wait.
    fn must_wait(
        &self,
        request: &Request<'_>,
        started: Instant,
        origin: Origin,
    ) -> Option<Direction> {
        let limiter = &self.shared.limiter;
        if limiter.is_off() || origin == Origin::Retry {
            return None;
        }
        let (direction, bytes) = measure(request)?;
        // No request overtakes those that wait for the same limit.
        let wait = || {
            self.queues.oldest_waiting(direction).is_some()
                || limiter.couples_directions() && self.queues.is_waiting()
                || limiter.wait(direction, started) > Duration::ZERO
        };
        if origin == Origin::Queue && wait() {
            return Some(direction);
        }
        limiter.charge(direction, bytes);
        None
    }

    /// Hands the request to the engine, or answers it without the disk.
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

    /// Completes everything that the engine has finished, and shows the driver.
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
            let memory = &self.negotiated.memory;
            // An address that is no memory is found by `publish`, too.
            let _ = self.queues.iter_mut().map(|queue| queue.split.show(memory)).last();
            self.pump();
            // The next step of the batch, and whatever the completions led to.
            self.dispatcher.commit();
        }
        self.done = done;
        // A paused worker leaves guest memory alone, but for what it still completes.
        if any || self.state != State::Paused {
            let (memory, now) = (&self.negotiated.memory, self.now);
            self.queues.iter_mut().for_each(|queue| queue.split.publish(memory, now));
        }
    }

    /// One transfer came back, for one request or for several that were merged.
    fn complete(&mut self, completion: Completion) {
        if self.dispatcher.take_last_flush(&completion) {
            return self.end(completion.result);
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
                // A failed group says nothing about its members: each is tried again, alone.
                (_, Err(_)) if merged => self.retry(request),
                (_, Err(error)) => self.fail(request, error),
            }
        }
    }

    /// Interrupts the driver, if it wants to hear of what was published. Nothing is held back outside of `serve`.
    pub(super) fn notify(&mut self) {
        // The queues share the line, and the driver looks at all of them. No short cut: each starts to count anew.
        let owed = |owed, queue: &mut WorkerQueue| queue.split.coalescer.take() | owed;
        if self.queues.iter_mut().fold(false, owed) {
            self.counters.interrupts.add(1);
            tracing::trace!(target: "virtio_notify", disk = self.shared.options.name);
            let begin = Instant::now();
            self.negotiated.interrupt.used_buffer();
            self.busy_polling.interrupted(Instant::now() - begin);
        }
    }
}

/// What the verbs need.
impl Worker {
    /// Goes on with the requests that are not with the engine, and answers those that are over.
    pub(super) fn pump(&mut self) {
        if !self.dispatcher.has_ready() {
            return;
        }
        let (submit, queues) = (self.state != State::Paused, &self.queues);
        self.dispatcher.pump(submit, |position| queues.is_leaving(position), &mut self.over);
        let mut over = std::mem::take(&mut self.over);
        for (request, code) in over.drain(..) {
            self.answer(request, code);
        }
        self.over = over;
    }

    /// Hands everything to the host, and completes what is finished. The driver may have to wait for its interrupt.
    pub(super) fn hand_over(&mut self) {
        self.pump();
        self.dispatcher.commit();
        self.complete_finished();
    }

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

    fn retry(&mut self, InFlightRequest { queue, chain, started, .. }: InFlightRequest) {
        if self.state == State::Paused || self.queues.is_leaving(queue) {
            self.queues.get(queue).stop_request(chain);
        } else {
            self.begin(queue, chain, started, Origin::Retry);
        }
    }

    /// Answers a chain that is no request.
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

    /// The driver broke this queue: no more of it until a reset. The other queues go on (virtio 1.2 §2.1.2).
    pub(super) fn break_queue(&mut self, position: usize, error: QueueError) {
        let Some(queue) = self.queues.find_mut(position) else { return };
        if queue.state == QueueState::Running {
            queue.state = QueueState::Broken;
            self.counters.broken_rings.add(1);
            self.shared.report_broken_queue(queue.index, error);
            self.negotiated.interrupt.device_needs_reset();
        }
    }

    fn end(&mut self, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.shared.report_last_flush(error);
        }
        self.ending = match std::mem::replace(&mut self.ending, Ending::No) {
            Ending::Flushing(drain) => Ending::Ended(drain),
            other => other,
        };
    }

    /// Busy-polls for chains or completions, if that is promising: the driver has been asked not to kick. `true` when the
    /// queue at `position` has chains.
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
                self.busy_polling.in_vain();
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// The next request that the limiter lets go at `now`, with the position of its queue.
    pub(super) fn next_admitted(&mut self, now: Instant) -> Option<(usize, WaitingRequest)> {
        for direction in [self.turn, self.turn.other()] {
            if let Some(position) = self.queues.oldest_waiting(direction)
                && self.shared.limiter.wait(direction, now) == Duration::ZERO
            {
                self.turn = direction.other();
                return Some((position, self.queues.get(position).waiting(direction).pop_front()?));
            }
        }
        None
    }
}

/// The status is one byte, in memory that was checked when the chain was walked.
fn put_status(memory: &GuestMemory, address: GuestAddress, code: u8) {
    if memory::store(memory, address, code).is_none() {
        tracing::error!(address = address.0, "bug: a status byte outside guest memory");
    }
}

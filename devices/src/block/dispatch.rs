//! Hands requests to the engine: merged with their neighbors, or piece by piece.
//!
//! The worker submits a request here once, and gets it back by [`Dispatcher::take_back`] when the engine is done with it. A
//! read or write of at most [`PIECE`] bytes goes into the batch and travels whole. Larger ones, discards and zeroes, and
//! whatever comes while [`BYTES_WITH_ENGINE`] are under way, wait in `ready` for their next piece; `pump` submits pieces in
//! turn while there is room. So what is with the engine is bounded, whatever the guest asked for, and a pause or a reset
//! waits for no more than that.
//!
//! This file decides nothing about requests: when to submit pieces, and what a failure means, is the worker's business.

use std::collections::VecDeque;

use super::batch::Batch;
use super::in_flight::{InFlight, InFlightRequest, PIECE, Step, cost};
use super::request::DiskRange;
use crate::GuestRange;
use crate::disk::{Completion, Engine, Operation, Transfer};
use crate::virtio::spec::blk;

/// Most bytes of reads, writes and zeroes that are with the engine at a time: 32 MiB keep a device of 10 GB/s busy for
/// 3 ms, and are done within a second by one that writes 32 MB/s.
pub(super) const BYTES_WITH_ENGINE: u64 = 32 << 20;

/// Bytes that are submitted before the control commands get their turn: an engine may execute a transfer within `submit`,
/// and 128 MiB are copied in about 50 ms.
pub(super) const BYTES_PER_TURN: u64 = 128 << 20;

/// Bytes of transfers that the engine finishes at once, before their requests are completed and the driver sees that. The
/// driver then works on its next requests while the rest of the batch is executed. 16 KiB are copied in 4 us; steps
/// half and twice as large were as fast.
const STEP_BYTES: u64 = 16 << 10;

/// Stands for the flush that ends a worker, when the table is empty.
const LAST_FLUSH: u32 = 0;

pub(super) struct Dispatcher {
    engine: Box<dyn Engine>,
    /// Whether adjacent requests may become one transfer, as the engine says.
    merges: bool,
    batch: Batch,
    in_flight: InFlight,
    /// Tags of requests that are not with the engine, in turn: they have a piece to submit, or are done.
    ready: VecDeque<u32>,
    /// Cost of what is with the engine.
    with_engine: u64,
    /// Cost of what may still be submitted in this turn.
    turn: u64,
    flushing: bool,
}

impl Dispatcher {
    /// For at most `depth` requests at a time.
    pub(super) fn new(engine: Box<dyn Engine>, depth: u32) -> Self {
        Self {
            merges: engine.merges(),
            engine,
            batch: Batch::new(),
            in_flight: InFlight::new(depth),
            ready: VecDeque::with_capacity(depth as usize),
            with_engine: 0,
            turn: BYTES_PER_TURN,
            flushing: false,
        }
    }

    /// Gives the engine back, with nothing in flight.
    pub(super) fn into_engine(self) -> Box<dyn Engine> {
        self.engine
    }

    /// The thread has looked at its commands.
    pub(super) fn begin_turn(&mut self) {
        self.turn = BYTES_PER_TURN;
    }

    pub(super) fn turn_is_over(&self) -> bool {
        self.turn == 0
    }

    /// Nothing is in flight, not even waiting for its next piece.
    pub(super) fn is_empty(&self) -> bool {
        self.in_flight.len() == 0 && !self.flushing
    }

    pub(super) fn stands_still(&self) -> bool {
        self.in_flight.len() == self.ready.len() && !self.flushing
    }

    /// Whether pieces wait that there is room for.
    pub(super) fn has_pieces_to_submit(&self) -> bool {
        !self.ready.is_empty() && self.with_engine < BYTES_WITH_ENGINE
    }

    /// Whether requests are not with the engine.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The requests that wait for their next piece.
    pub(super) fn ready(&self) -> impl Iterator<Item = &InFlightRequest> {
        self.ready.iter().filter_map(|tag| self.in_flight.find(*tag))
    }

    /// A read or write. `alone`: it must not be merged.
    #[inline]
    pub(super) fn submit_transfer(
        &mut self,
        mut request: InFlightRequest,
        range: DiskRange,
        data: &[GuestRange],
        alone: bool,
    ) {
        waypoint!();
        let DiskRange { operation, offset, length } = range;
        let room = self.with_engine + length <= BYTES_WITH_ENGINE && self.turn > 0;
        if length > PIECE || !room || !self.ready.is_empty() {
            return self.submit_ranges(request, &[range], data);
        }
        request.cost = length;
        self.count(length);
        let tag = self.in_flight.insert(request);
        let transfer = Transfer { tag, operation, offset, length, ranges: data };
        if alone || !self.merges {
            return self.engine.submit(transfer);
        }
        if self.batch.is_full(operation) {
            self.submit_batch();
        }
        self.batch.push(&transfer);
    }

    /// A request of several ranges, or a large one. `pump` submits its pieces.
    pub(super) fn submit_ranges(
        &mut self,
        mut request: InFlightRequest,
        ranges: &[DiskRange],
        data: &[GuestRange],
    ) {
        request.step = Step::Pieces;
        let tag = self.in_flight.insert(request);
        self.in_flight.set_remaining(tag, ranges, data);
        self.ready.push_back(tag);
    }

    /// A flush, behind everything that was gathered before it.
    pub(super) fn submit_flush(&mut self, request: InFlightRequest) {
        self.submit_batch();
        let tag = self.in_flight.insert(request);
        self.engine.submit(flush(tag));
    }

    /// A flush of no request. `take_back` never sees it; `take_last_flush` does.
    pub(super) fn submit_last_flush(&mut self) {
        debug_assert!(self.is_empty(), "the last flush overtakes requests");
        self.flushing = true;
        self.engine.submit(flush(LAST_FLUSH));
        self.engine.commit();
    }

    /// Whether `completion` is that of the last flush, which is over then.
    pub(super) fn take_last_flush(&mut self, completion: &Completion) -> bool {
        completion.tag == LAST_FLUSH && std::mem::take(&mut self.flushing)
    }

    /// A command, whose step knows how to submit itself.
    pub(super) fn submit_command(&mut self, request: InFlightRequest, data: &[GuestRange]) {
        let tag = self.in_flight.insert(request);
        if let Step::Command(command) = &self.in_flight.get(tag).step {
            command.submit(tag, data, &mut *self.engine);
        }
    }

    /// Submits all groups of the batch.
    fn submit_batch(&mut self) {
        while self.submit_group().is_some() {}
    }

    /// Submits the next group of the batch as one transfer, and returns its length. `None`: the batch is empty.
    fn submit_group(&mut self) -> Option<u64> {
        let (transfer, followers) = self.batch.take_group()?;
        let (length, mut last) = (transfer.length, transfer.tag);
        for follower in followers {
            self.in_flight.get(last).next = Some(follower.tag);
            self.in_flight.get(follower.tag).merged = true;
            last = follower.tag;
        }
        let (offset, num_reqs) = (transfer.offset, 1 + followers.len());
        tracing::trace!(target: "virtio_blk_submit_multireq", num_reqs, offset, size = length);
        self.engine.submit(transfer);
        Some(length)
    }

    /// Hands everything to the host that was submitted. Of a batch that the engine executes at once, only the next step: the
    /// worker completes that, and comes back for the rest.
    pub(super) fn commit(&mut self) {
        let mut step = 0;
        while let Some(length) = self.submit_group() {
            step += length;
            if step >= STEP_BYTES && self.engine.finished() > 0 {
                break;
            }
        }
        self.engine.commit();
    }

    pub(super) fn reap(&mut self, done: &mut Vec<Completion>) {
        self.engine.reap(done);
    }

    /// The transfer with this tag came back. Returns the request, unless a piece of it succeeded, and the tag of the next
    /// request in the same merged transfer.
    #[inline]
    pub(super) fn take_back(
        &mut self,
        tag: u32,
        succeeded: bool,
    ) -> (Option<InFlightRequest>, Option<u32>) {
        let request = self.in_flight.get(tag);
        tracing::trace!(target: "virtio_blk_rw_complete", req = request.id(), succeeded);
        self.with_engine -= std::mem::take(&mut request.cost);
        let next = request.next.take();
        if succeeded && matches!(request.step, Step::Pieces) {
            self.ready.push_back(tag);
            return (None, next);
        }
        (Some(self.in_flight.remove(tag)), next)
    }

    /// Goes on with the requests that are not with the engine, in turn: puts those that are done, or that a reset gave up,
    /// into `over` with their status, and with `submit` submits pieces as far as there is room.
    pub(super) fn pump(
        &mut self,
        submit: bool,
        is_leaving: impl Fn(usize) -> bool,
        over: &mut Vec<(InFlightRequest, u8)>,
    ) {
        for _ in 0..self.ready.len() {
            let Some(tag) = self.ready.pop_front() else { return };
            let position = self.in_flight.get(tag).queue;
            let remaining = self.in_flight.has_remaining(tag);
            if !remaining || is_leaving(position) {
                let code = if remaining { blk::S_IOERR } else { blk::S_OK };
                over.push((self.in_flight.remove(tag), code));
            } else if submit && self.turn > 0 && self.with_engine < BYTES_WITH_ENGINE {
                let Some(transfer) = self.in_flight.next_piece(tag) else { continue };
                let cost = cost(transfer.operation, transfer.length);
                self.engine.submit(transfer);
                self.in_flight.get(tag).cost = cost;
                self.count(cost);
            } else {
                self.ready.push_back(tag);
            }
        }
    }

    fn count(&mut self, cost: u64) {
        self.with_engine += cost;
        self.turn = self.turn.saturating_sub(cost);
    }
}

fn flush(tag: u32) -> Transfer<'static> {
    Transfer { tag, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] }
}

//! Hands requests to the engine: merged with their neighbors, or piece by piece.
//!
//! The worker submits a request here once, and gets it back by [`Dispatcher::take_back`] when the engine is done with it.
//!
//! - A read or write of at most [`PIECE`] bytes goes into the batch, and is one transfer or a part of a merged one.
//! - Larger ones, discards and zeroes, and all that come while [`BYTES_WITH_ENGINE`] are with the engine, are executed in
//!   pieces. Their tags wait in `ready`. [`Dispatcher::submit_pieces`] submits one piece of each in turn while there is room.
//!
//! So what the engine has is bounded, whatever the guest asked for, and a pause or a reset waits for no more than that.
//!
//! The worker decides when to submit pieces, and what a failure means.

use std::collections::VecDeque;

use super::batch::Batch;
use super::in_flight::{InFlight, InFlightRequest, PIECE, Step, cost};
use super::request::DiskRange;
use crate::GuestRange;
use crate::disk::{Completion, Engine, Operation, Transfer};
use crate::virtio::spec::blk;

/// Most bytes of reads, writes and zeroes that are with the engine at a time. 32 MiB keep a device of 10 GB/s busy for
/// 3 ms, and a device that writes 32 MB/s is done with them within a second.
pub(super) const BYTES_WITH_ENGINE: u64 = 32 << 20;

/// Most bytes that are submitted in one turn, before the thread looks at its commands. An engine may execute a transfer
/// within `submit`, and 128 MiB are copied in about 50 ms.
pub(super) const BYTES_PER_TURN: u64 = 128 << 20;

/// If the engine executes transfers within `submit`, the worker completes their requests after each step of this many bytes.
/// So the driver can work on its next requests while the rest of the batch is executed. 16 KiB are copied in 4 us. Steps
/// half and twice as large were as fast.
const STEP_BYTES: u64 = 16 << 10;

/// The tag of the last flush, which ends a worker. No request is in flight then, so none has this tag.
const LAST_FLUSH: u32 = 0;

pub(super) struct Dispatcher {
    engine: Box<dyn Engine>,
    /// Whether adjacent requests may become one transfer, as the engine says.
    merges: bool,
    batch: Batch,
    in_flight: InFlight,
    /// Tags of requests in pieces that have no piece with the engine: each has a next piece to submit, or is done. The first
    /// is served next.
    ready: VecDeque<u32>,
    /// The [`cost`] of what is with the engine, in bytes.
    with_engine: u64,
    /// How much may still be submitted in this turn, in bytes of [`cost`].
    left_in_turn: u64,
    /// The last flush is with the engine.
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
            left_in_turn: BYTES_PER_TURN,
            flushing: false,
        }
    }

    /// Gives the engine back, with nothing in flight.
    pub(super) fn into_engine(self) -> Box<dyn Engine> {
        self.engine
    }

    /// Begins a turn: the thread has looked at its commands, so the worker may submit [`BYTES_PER_TURN`] again.
    pub(super) fn begin_turn(&mut self) {
        self.left_in_turn = BYTES_PER_TURN;
    }

    pub(super) fn turn_is_over(&self) -> bool {
        self.left_in_turn == 0
    }

    /// Whether no request is in flight: none with the engine, and none that waits for its next piece.
    pub(super) fn is_empty(&self) -> bool {
        self.in_flight.len() == 0 && !self.flushing
    }

    /// Whether nothing is with the engine. Requests may wait for their next piece.
    pub(super) fn stands_still(&self) -> bool {
        self.in_flight.len() == self.ready.len() && !self.flushing
    }

    /// Whether pieces wait and the engine has room for one.
    pub(super) fn has_pieces_to_submit(&self) -> bool {
        !self.ready.is_empty() && self.with_engine < BYTES_WITH_ENGINE
    }

    /// Whether requests in pieces wait for their next piece, or to be answered.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The requests in pieces that have no piece with the engine.
    pub(super) fn ready(&self) -> impl Iterator<Item = &InFlightRequest> {
        self.ready.iter().filter_map(|tag| self.in_flight.find(*tag))
    }

    /// Submits a read or write. `alone`: it must not be merged.
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
        let room = self.with_engine + length <= BYTES_WITH_ENGINE && self.left_in_turn > 0;
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

    /// Puts a request of several ranges, or a large one, into `ready`. `submit_pieces` submits its pieces.
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

    /// Submits a flush, after all transfers of the batch.
    pub(super) fn submit_flush(&mut self, request: InFlightRequest) {
        self.submit_batch();
        let tag = self.in_flight.insert(request);
        self.engine.submit(flush(tag));
    }

    /// Submits a flush that belongs to no request. Its completion goes to `take_last_flush`, not to `take_back`.
    pub(super) fn submit_last_flush(&mut self) {
        debug_assert!(self.is_empty(), "the last flush overtakes requests");
        self.flushing = true;
        self.engine.submit(flush(LAST_FLUSH));
        self.engine.commit();
    }

    /// Whether `completion` is that of the last flush. If it is, the last flush is no longer under way.
    pub(super) fn take_last_flush(&mut self, completion: &Completion) -> bool {
        completion.tag == LAST_FLUSH && std::mem::take(&mut self.flushing)
    }

    /// Submits a command: the request's step is [`Step::Command`], which calls the engine itself.
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

    /// Submits the batch, and has the engine hand everything to the host. If the engine executes transfers within `submit`,
    /// this stops after [`STEP_BYTES`]: the worker completes these and calls again for the rest.
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

    /// Takes a request back whose transfer is finished. Returns the request, and the tag of the next request in the same merged
    /// transfer. If the transfer was a piece that succeeded, the request stays in flight, and there is none to return.
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

    /// Goes once through the `ready` requests. A request that is done, or whose queue `is_leaving`, goes into `ended` with its
    /// status. For the others, if `submit` is true, it submits the next piece as far as there is room.
    pub(super) fn submit_pieces(
        &mut self,
        submit: bool,
        is_leaving: impl Fn(usize) -> bool,
        ended: &mut Vec<(InFlightRequest, u8)>,
    ) {
        for _ in 0..self.ready.len() {
            let Some(tag) = self.ready.pop_front() else { return };
            let position = self.in_flight.get(tag).queue;
            let remaining = self.in_flight.has_remaining(tag);
            if !remaining || is_leaving(position) {
                let code = if remaining { blk::S_IOERR } else { blk::S_OK };
                ended.push((self.in_flight.remove(tag), code));
            } else if submit && self.left_in_turn > 0 && self.with_engine < BYTES_WITH_ENGINE {
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
        self.left_in_turn = self.left_in_turn.saturating_sub(cost);
    }
}

fn flush(tag: u32) -> Transfer<'static> {
    Transfer { tag, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] }
}

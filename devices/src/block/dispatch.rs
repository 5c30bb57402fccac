//! Hands requests to the engine: merged with their neighbors, or piece by piece.
//!
//! The worker submits a request here once. When the engine is done with it, [`Dispatcher::end_transfer`] says which request was merged with it.
//!
//! - A read or write of at most [`PIECE_BYTES`] bytes goes into the batch, and is one transfer or a part of a merged one.
//! - Larger ones, discards and zeroes are executed in pieces. So is every read and write that does not fit into what the engine or this
//!   turn may still get, or that comes while others wait for that. Their tags wait in `ready`. [`Dispatcher::submit_piece`] submits a
//!   piece of each in turn while there is room.
//!
//! So what the engine has is bounded, whatever the guest asked for, and a pause or a reset waits for no more than that.
//!
//! The worker decides when to submit pieces, and what a failure means.

use std::collections::VecDeque;

use super::batch::Batch;
use super::in_flight::{InFlight, PIECE_BYTES, Step, cost};
use super::request::{CommandRequest, DiskRange};
use crate::GuestRange;
use crate::disk::{Engine, Transfer};
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec::blk;

/// While this many bytes are with the engine, only flushes and commands are submitted. The last piece may go beyond it, so the engine has
/// less than `BYTES_WITH_ENGINE` + [`PIECE_BYTES`] (36 MiB) at a time. 32 MiB keep a device of 10 GB/s busy for 3 ms, and a device that writes
/// 36 MiB/s is done with all of it within a second.
pub(super) const BYTES_WITH_ENGINE: u64 = 32 << 20;

/// Most bytes that are submitted in one turn, before the thread looks at its commands. An engine may execute a transfer
/// within `submit`, and 128 MiB are copied in about 50 ms.
pub(super) const BYTES_PER_TURN: u64 = 128 << 20;

/// If the engine executes transfers within `submit`, the worker completes their requests whenever it has executed this many bytes.
/// So the driver can work on its next requests while the rest of the batch is executed. 16 KiB are copied in 4 us. 8 and 32 KiB were as
/// fast.
const INLINE_BYTES_BEFORE_COMPLETING: u64 = 16 << 10;

pub(super) struct Dispatcher {
    pub(super) engine: Box<dyn Engine>,
    /// Whether adjacent requests may become one transfer, as the engine says.
    merges: bool,
    batch: Batch,
    pub(super) in_flight: InFlight,
    /// Tags of requests in pieces that have no piece with the engine: each has a next piece to submit, or is done. `submit_piece` takes
    /// the first.
    pub(super) ready: VecDeque<u32>,
    /// The [`cost`] of what is with the engine, in bytes.
    with_engine: u64,
    /// How much may still be submitted in this turn, in bytes of [`cost`].
    left_in_turn: u64,
    /// A flush is with the engine that belongs to no request: the last one, of a reset.
    pub(super) flushing: bool,
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

    /// Submits a read or write. `alone`: it must not be merged.
    #[inline]
    pub(super) fn submit_transfer(&mut self, tag: u32, data: &[GuestRange], alone: bool) {
        waypoint!();
        let request = self.in_flight.get(tag);
        let range @ DiskRange { operation, offset, length } = request.parsed.range;
        let room = self.with_engine + length <= BYTES_WITH_ENGINE && self.left_in_turn > 0;
        if length > PIECE_BYTES || !room || !self.ready.is_empty() {
            return self.begin_pieces(tag, &[range], data);
        }
        request.cost = length;
        self.count(length);
        let transfer = Transfer { tag, operation, offset, length, ranges: data };
        if alone || !self.merges {
            return self.engine.submit(transfer);
        }
        if self.batch.is_full(operation) {
            self.submit_batch();
        }
        self.batch.push(&transfer);
    }

    /// Puts a request of several ranges, or a large one, into `ready`. `submit_piece` submits its pieces.
    #[cold]
    pub(super) fn begin_pieces(&mut self, tag: u32, ranges: &[DiskRange], data: &[GuestRange]) {
        self.in_flight.get(tag).step = Step::Pieces;
        self.in_flight.set_remaining(tag, ranges, data);
        self.ready.push_back(tag);
    }

    /// Submits a flush, after all transfers of the batch.
    pub(super) fn submit_flush(&mut self, tag: u32) {
        self.submit_batch();
        self.engine.submit(Transfer { tag, ..Transfer::FLUSH });
    }

    /// Submits a command, which calls the engine itself.
    pub(super) fn submit_command(
        &mut self,
        tag: u32,
        command: Box<dyn CommandRequest>,
        buffers: &ChainBuffers,
    ) {
        command.submit(tag, buffers, &mut *self.engine);
        self.in_flight.get(tag).step = Step::Command(command);
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

    /// Submits the batch, and lets the engine hand everything to the host. If the engine executes transfers within `submit`,
    /// this stops after [`INLINE_BYTES_BEFORE_COMPLETING`]: the worker completes these and calls again for the rest.
    pub(super) fn commit(&mut self) {
        let mut bytes = 0;
        while let Some(length) = self.submit_group() {
            bytes += length;
            if bytes >= INLINE_BYTES_BEFORE_COMPLETING && self.engine.finished() > 0 {
                break;
            }
        }
        self.engine.commit();
    }

    /// A transfer is finished: its bytes no longer count as with the engine. Returns the tag of the next request that was merged into it.
    #[inline]
    pub(super) fn end_transfer(&mut self, tag: u32, succeeded: bool) -> Option<u32> {
        let request = self.in_flight.get(tag);
        tracing::trace!(target: "virtio_blk_rw_complete", req = request.taken.id(), succeeded);
        self.with_engine -= std::mem::take(&mut request.cost);
        request.next.take()
    }

    /// Takes the first request of `ready`. If it is done, or its queue `is_leaving`, returns its tag and its status. Otherwise submits
    /// its next piece. If `submit` is false or there is no room, the request becomes the last of `ready` instead.
    pub(super) fn submit_piece(
        &mut self,
        submit: bool,
        is_leaving: impl Fn(usize) -> bool,
    ) -> Option<(u32, u8)> {
        let tag = self.ready.pop_front()?;
        let remaining = self.in_flight.has_remaining(tag);
        if !remaining || is_leaving(self.in_flight.get(tag).taken.queue) {
            let code = if remaining { blk::S_IOERR } else { blk::S_OK };
            return Some((tag, code));
        }
        if submit && self.left_in_turn > 0 && self.with_engine < BYTES_WITH_ENGINE {
            let transfer = self.in_flight.next_piece(tag)?;
            let cost = cost(transfer.operation, transfer.length);
            self.engine.submit(transfer);
            self.in_flight.get(tag).cost = cost;
            self.count(cost);
        } else {
            self.ready.push_back(tag);
        }
        None
    }

    fn count(&mut self, cost: u64) {
        self.with_engine += cost;
        self.left_in_turn = self.left_in_turn.saturating_sub(cost);
    }
}

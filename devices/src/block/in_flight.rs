//! The table of requests in flight. The index of an entry is the request's *tag*, which the engine gives back with the
//! completion.
//!
//! Large requests are executed in *pieces*. A piece is at most [`PIECE_BYTES`] bytes of a read, write or write-zeroes, or
//! [`DISCARD_PIECE_BYTES`] bytes of a discard or secure erase. A request has at most one piece with the engine at a time. So a
//! pause or a reset waits for one piece of a request and not for all of it. The table entry keeps the ranges that remain.
//!
//! The table has a fixed size, which bounds the requests in flight. No memory is allocated for a request.

use vm_memory::GuestAddress;

use super::queue::TakenChain;
use super::request::{CommandRequest, DiskRange, Request};
use crate::GuestRange;
use crate::disk::{Operation, Transfer};

/// Most bytes of a read, write or write-zeroes that the engine gets at once: 4 MiB, so that a usual request is one transfer. It is the
/// largest request that Linux makes by default, since its commit 9b8b84879d4a (2025). Before, that was 1280 KiB.
pub(super) const PIECE_BYTES: u64 = 4 << 20;
/// Most bytes of a discard or secure erase that the engine gets at once: 2 GiB, the largest segment that the driver may
/// send, since the host moves no data for it.
const DISCARD_PIECE_BYTES: u64 = 2 << 30;

/// A request in flight: admitted, and not yet completed. It owns the chain's token, so the chain can be completed, stopped or
/// abandoned only once.
pub(super) struct InFlightRequest {
    pub(super) taken: TakenChain,
    pub(super) parsed: Request,
    pub(super) step: Step,
    /// The [`cost`] of the transfer that the engine has for it.
    pub(super) cost: u64,
    /// The tag of the next request in the same merged transfer.
    pub(super) next: Option<u32>,
    /// It was merged into the transfer of another request.
    pub(super) merged: bool,
}

/// What the request is executed as, and so what a completion of the engine means for it.
pub(super) enum Step {
    /// One transfer or flush: the request is done.
    Whole,
    /// One piece after the other: this piece is done, and [`Remaining`] has the rest.
    Pieces,
    /// A command, whose reply is still to be written.
    Command(Box<dyn CommandRequest>),
}

/// The part of a request in pieces that the engine has not got yet.
#[derive(Default)]
struct Remaining {
    /// Those before index `next` have been submitted. `ranges[next]` shrinks by each piece.
    ranges: Vec<DiskRange>,
    next: usize,
    /// The guest ranges of a read or write. Those before index `next_data` have been submitted.
    data: Vec<GuestRange>,
    next_data: usize,
}

#[derive(Default)]
struct Entry {
    request: Option<InFlightRequest>,
    /// Without a request: the tag of the next free entry.
    next_free: u32,
    /// Not inside of the request, so that the next request of this entry can use the lists again.
    remaining: Remaining,
}

pub(super) struct InFlight {
    entries: Vec<Entry>,
    /// The tag of the first free entry, which is the most recently used one: its cache lines are warm. If all have a request, it is
    /// their number.
    first_free: u32,
    /// How many entries have a request.
    occupied: usize,
    /// Scratch: the guest ranges of the piece at hand.
    piece_data: Vec<GuestRange>,
}

impl InFlight {
    pub(super) fn new(count: u32) -> Self {
        Self {
            entries: (1..=count).map(|next_free| Entry { next_free, ..Entry::default() }).collect(),
            first_free: 0,
            occupied: 0,
            piece_data: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.occupied
    }

    /// Adds a request and returns its tag. The queues together never have more chains outstanding than there are entries.
    #[inline]
    pub(super) fn insert(&mut self, taken: TakenChain, parsed: Request) -> u32 {
        waypoint!();
        let tag = self.first_free;
        let Some(entry) = self.entries.get_mut(tag as usize) else {
            unreachable!("more requests in flight than the queues hold")
        };
        debug_assert!(entry.request.is_none(), "a free entry has no request");
        self.first_free = entry.next_free;
        self.occupied += 1;
        let (step, cost, next, merged) = (Step::Whole, 0, None, false);
        let request = InFlightRequest { taken, parsed, step, cost, next, merged };
        // The old value is `None`: forgetting it leaves out the code that would drop a request.
        std::mem::forget(entry.request.replace(request));
        tag
    }

    /// The request with this tag. A tag without a request is a bug of the engine.
    pub(super) fn get(&mut self, tag: u32) -> &mut InFlightRequest {
        match self.entries.get_mut(tag as usize).and_then(|entry| entry.request.as_mut()) {
            Some(request) => request,
            None => unreachable!("no request with tag {tag} is in flight"),
        }
    }

    pub(super) fn find(&self, tag: u32) -> Option<&InFlightRequest> {
        self.entries.get(tag as usize)?.request.as_ref()
    }

    /// Removes a request, and returns its chain.
    #[inline(always)]
    pub(super) fn remove(&mut self, tag: u32) -> TakenChain {
        let entry = &mut self.entries[tag as usize];
        (entry.next_free, self.first_free) = (self.first_free, tag);
        self.occupied -= 1;
        match entry.request.take() {
            Some(InFlightRequest { taken, .. }) => taken,
            None => unreachable!("no request with tag {tag} is in flight"),
        }
    }

    /// Sets what is to be executed in pieces: the ranges of the disk, and for a read or write the guest ranges of its data.
    pub(super) fn set_remaining(&mut self, tag: u32, ranges: &[DiskRange], data: &[GuestRange]) {
        let remaining = &mut self.entries[tag as usize].remaining;
        remaining.ranges.clear();
        remaining.ranges.extend_from_slice(ranges);
        remaining.data.clear();
        remaining.data.extend_from_slice(data);
        (remaining.next, remaining.next_data) = (0, 0);
    }

    pub(super) fn has_remaining(&self, tag: u32) -> bool {
        let remaining = &self.entries[tag as usize].remaining;
        remaining.next < remaining.ranges.len()
    }

    /// Takes the next piece from what remains, as a transfer. `None`: nothing remains.
    pub(super) fn next_piece(&mut self, tag: u32) -> Option<Transfer<'_>> {
        self.piece_data.clear();
        let DiskRange { operation, offset, length } =
            self.entries[tag as usize].remaining.take_piece(&mut self.piece_data)?;
        Some(Transfer { tag, operation, offset, length, ranges: &self.piece_data })
    }
}

impl Remaining {
    /// Takes the next piece: returns its range of the disk, and appends the guest ranges of its data to `data`.
    fn take_piece(&mut self, data: &mut Vec<GuestRange>) -> Option<DiskRange> {
        let range = self.ranges.get_mut(self.next)?;
        let limit = piece_limit(range.operation);
        let length = if range.length <= limit {
            range.length
        } else {
            // Pieces end at multiples of their size, so that clusters and device blocks are not split needlessly.
            limit - range.offset % limit
        };
        let piece = DiskRange { length, ..*range };
        (range.offset, range.length) = (range.offset + length, range.length - length);
        self.next += usize::from(range.length == 0);
        let mut left = length;
        while left > 0 && self.next_data < self.data.len() {
            let range = &mut self.data[self.next_data];
            let part = left.min(range.length.into()) as u32;
            data.push(GuestRange { address: range.address, length: part });
            range.address = GuestAddress(range.address.0 + u64::from(part));
            range.length -= part;
            left -= u64::from(part);
            self.next_data += usize::from(range.length == 0);
        }
        Some(piece)
    }
}

fn piece_limit(operation: Operation) -> u64 {
    match operation {
        Operation::Discard | Operation::SecureErase => DISCARD_PIECE_BYTES,
        _ => PIECE_BYTES,
    }
}

/// What a transfer counts for in the limits of bytes: its length, but a discard or secure erase counts for less, so that a
/// full piece of any operation counts the same.
pub(super) fn cost(operation: Operation, length: u64) -> u64 {
    length / (piece_limit(operation) / PIECE_BYTES)
}

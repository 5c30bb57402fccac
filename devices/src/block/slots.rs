//! The requests in flight: a fixed table whose index is the tag that an engine hands back.

use std::time::Instant;

use vm_memory::GuestAddress;

use super::request::Piece;
use super::ring::Popped;
use super::scsi::Packet;
use super::stats::Kind;

/// A request on its way through the engine.
#[derive(Debug)]
pub(super) struct Slot {
    /// The debt to the driver.
    pub(super) popped: Popped,
    /// Position of its ring among the worker's rings.
    pub(super) ring: usize,
    pub(super) kind: Kind,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// Bytes of disk that the request covers.
    pub(super) length: u64,
    /// First byte of disk after a read or write.
    pub(super) end: u64,
    /// Bytes of data that the device has written to guest memory when the request succeeds.
    pub(super) written: u32,
    /// When it was taken from the ring.
    pub(super) started: Instant,
    /// What happens when its transfer is finished.
    pub(super) then: Then,
    /// The next request in the same merged transfer.
    pub(super) next: Option<u32>,
    /// It travelled in another request's transfer.
    pub(super) merged: bool,
    /// It is this SCSI command.
    pub(super) scsi: Option<Box<Packet>>,
}

/// What follows a finished transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The answer.
    Answer,
    /// The piece with this index; when there is none, the answer.
    Piece(usize),
}

/// The table. Its size bounds the requests in flight, and nothing in it is allocated anew for a request.
pub(super) struct Slots {
    entries: Vec<Entry>,
    /// Most recently used last: its cache lines are warm.
    free: Vec<u32>,
}

#[derive(Default)]
struct Entry {
    slot: Option<Slot>,
    /// Kept beside the slot, so that the allocation stays.
    pieces: Vec<Piece>,
}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Self { entries: (0..count).map(|_| Entry::default()).collect(), free: (0..count).rev().collect() }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Files a request and returns its tag. The rings together never have more outstanding than there are slots.
    pub(super) fn insert(&mut self, slot: Slot) -> u32 {
        let Some(tag) = self.free.pop() else { unreachable!("more requests in flight than the queues hold") };
        self.entries[tag as usize].slot = Some(slot);
        tag
    }

    /// The request with this tag. An engine that makes tags up is a bug of ours.
    pub(super) fn get(&mut self, tag: u32) -> &mut Slot {
        match self.entries.get_mut(tag as usize).and_then(|entry| entry.slot.as_mut()) {
            Some(slot) => slot,
            None => unreachable!("no request with tag {tag} is in flight"),
        }
    }

    pub(super) fn remove(&mut self, tag: u32) -> Slot {
        let Some(slot) = self.entries[tag as usize].slot.take() else {
            unreachable!("no request with tag {tag} is in flight")
        };
        self.free.push(tag);
        slot
    }

    pub(super) fn set_pieces(&mut self, tag: u32, pieces: &[Piece]) {
        let kept = &mut self.entries[tag as usize].pieces;
        kept.clear();
        kept.extend_from_slice(pieces);
    }

    pub(super) fn piece(&self, tag: u32, index: usize) -> Option<Piece> {
        self.entries[tag as usize].pieces.get(index).copied()
    }
}

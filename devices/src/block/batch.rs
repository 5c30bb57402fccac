//! Gathers the reads or writes of one pass over a ring, and merges those that are neighbours on the disk into one
//! vectored transfer: the cost of a transfer is mostly per call, not per byte. For reads too: 4k sequential reads at
//! depth 32 out of the page cache ran 1.3 times as fast (`cargo bench -p devices --bench queue`), random ones the same.

use super::chain::CHAIN_MAX;
use super::slots::Slots;
use crate::disk::{Engine, GuestRange, Operation, Transfer};

/// Most requests gathered before they are submitted; the classic limit.
const BATCH_MAX: usize = 32;

/// Transfers of one operation, not yet submitted.
pub(super) struct Batch {
    operation: Option<Operation>,
    members: Vec<Member>,
    /// The members' guest ranges, one after the other in the order of arrival.
    ranges: Vec<GuestRange>,
    /// Scratch: the ranges of a merged transfer, in disk order.
    merged: Vec<GuestRange>,
}

#[derive(Clone, Copy)]
struct Member {
    tag: u32,
    offset: u64,
    length: u64,
    /// Its part of `Batch::ranges`.
    first: usize,
    count: usize,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            operation: None,
            members: Vec::with_capacity(BATCH_MAX),
            ranges: Vec::with_capacity(BATCH_MAX),
            merged: Vec::with_capacity(BATCH_MAX),
        }
    }

    /// Adds a transfer; submits those before it when they are of another operation, or many.
    pub(super) fn push(&mut self, transfer: &Transfer<'_>, engine: &mut dyn Engine, slots: &mut Slots) {
        if self.operation.is_some_and(|operation| operation != transfer.operation) || self.members.len() == BATCH_MAX {
            self.submit(engine, slots);
        }
        self.operation = Some(transfer.operation);
        let (first, count) = (self.ranges.len(), transfer.ranges.len());
        self.members.push(Member { tag: transfer.tag, offset: transfer.offset, length: transfer.length, first, count });
        self.ranges.extend_from_slice(transfer.ranges);
    }

    /// Submits what was gathered. A merged transfer has the tag of its first request, and links the others to it.
    pub(super) fn submit(&mut self, engine: &mut dyn Engine, slots: &mut Slots) {
        let Some(operation) = self.operation.take() else { return };
        // Requests in flight together have no order (virtio 1.2 §5.2.6); the disk likes its own. Equals keep theirs.
        self.members.sort_unstable_by_key(|member| (member.offset, member.first));
        let mut rest = self.members.as_slice();
        while let Some((head, tail)) = rest.split_first() {
            let (mut length, mut count, mut last, mut run) = (head.length, head.count, head.tag, 0);
            for next in tail {
                if next.offset != head.offset + length || count + next.count > CHAIN_MAX as usize {
                    break;
                }
                slots.get(last).next = Some(next.tag);
                slots.get(next.tag).merged = true;
                (length, count, last, run) = (length + next.length, count + next.count, next.tag, run + 1);
            }
            let ranges = if run == 0 {
                &self.ranges[head.first..head.first + head.count]
            } else {
                self.merged.clear();
                for member in &rest[..=run] {
                    self.merged.extend_from_slice(&self.ranges[member.first..member.first + member.count]);
                }
                self.merged.as_slice()
            };
            engine.submit(Transfer { tag: head.tag, operation, offset: head.offset, length, ranges });
            rest = &tail[run..];
        }
        self.members.clear();
        self.ranges.clear();
    }
}

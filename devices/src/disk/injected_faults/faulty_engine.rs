//! Makes the faults of one worker's engine.

use std::sync::Arc;

use vm_memory::{Address, Bytes, GuestAddress};

use super::rule::{FaultKind, Faults, mix};
use crate::GuestMemory;
use crate::disk::layer::EngineLayer;
use crate::disk::{Completion, DiskError, Engine, GuestRange, SECTOR, Transfer};

pub(super) struct FaultyEngine {
    memory: GuestMemory,
    faults: Arc<Faults>,
    /// Requests that the engine inside did not see.
    done: Vec<Completion>,
    /// By tag: the byte of guest memory in which a bit flips when the read is complete.
    flips: Vec<Option<GuestAddress>>,
    /// The ranges of a torn write.
    torn: Vec<GuestRange>,
}

impl FaultyEngine {
    pub(super) fn new(memory: GuestMemory, depth: u32, faults: Arc<Faults>) -> Self {
        let flips = (0..depth).map(|_| None).collect();
        Self { memory, faults, done: Vec::new(), flips, torn: Vec::new() }
    }

    /// Submits the first half of a write's sectors.
    fn tear(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>) {
        let length = transfer.length / 2 / SECTOR * SECTOR;
        if length == 0 {
            self.done.push(Completion { tag: transfer.tag, result: Ok(()) });
            return;
        }
        let mut left = length;
        self.torn.clear();
        for range in transfer.ranges {
            let part = left.min(range.length.into());
            self.torn.push(GuestRange { length: part as u32, ..*range });
            left -= part;
        }
        self.torn.retain(|range| range.length > 0);
        engine.submit(Transfer { length, ranges: &self.torn, ..transfer });
    }

    /// The byte of a read that is to be wrong.
    fn byte(transfer: &Transfer<'_>, number: u64) -> Option<GuestAddress> {
        let mut at = mix(transfer.offset, number) % transfer.length.max(1);
        for range in transfer.ranges {
            if at < range.length.into() {
                return range.address.checked_add(at);
            }
            at -= u64::from(range.length);
        }
        None
    }

    /// Flips the bits of reads that are complete.
    fn flip(&mut self, completions: &[Completion]) {
        for Completion { tag, .. } in completions {
            if let Some(address) = self.flips.get_mut(*tag as usize).and_then(Option::take)
                && let Ok(byte) = self.memory.read_obj::<u8>(address)
            {
                // The address was read to just now.
                let _ = self.memory.write_obj(byte ^ 1, address);
            }
        }
    }
}

impl EngineLayer for FaultyEngine {
    fn submit(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>) {
        let tag = transfer.tag;
        match self.faults.fault(&transfer) {
            None => engine.submit(transfer),
            Some((FaultKind::Error, _)) => {
                let result = Err(DiskError::Host(libc::EIO));
                self.done.push(Completion { tag, result });
            }
            Some((FaultKind::Lost, _)) => self.done.push(Completion { tag, result: Ok(()) }),
            Some((FaultKind::Torn, _)) => self.tear(engine, transfer),
            Some((FaultKind::Flip, number)) => {
                if let Some(flip) = self.flips.get_mut(tag as usize) {
                    *flip = Self::byte(&transfer, number);
                }
                engine.submit(transfer);
            }
        }
    }

    fn complete(&mut self, done: &mut Vec<Completion>, first: usize) {
        self.flip(&done[first..]);
        done.append(&mut self.done);
    }

    fn finished(&self) -> usize {
        self.done.len()
    }
}

//! Logs the changes that go through one worker's engine.

use std::sync::Arc;

use vm_memory::Bytes;

use super::format::{Entry, FUA, SECTOR_BYTES};
use super::write_log::{FlushPlace, WriteLog};
use crate::GuestMemory;
use crate::disk::layer::EngineLayer;
use crate::disk::{Completion, Engine, Operation, SECTOR, Transfer};

/// A larger buffer is freed when its write completes.
const KEPT_BUFFER: usize = 256 << 10;

pub(super) struct LoggedEngine {
    memory: GuestMemory,
    log: Arc<WriteLog>,
    ignores_flush: bool,
    /// The change of each transfer in flight, by its tag.
    changes: Vec<ChangeInFlight>,
}

/// What a transfer changes, until it is complete.
#[derive(Default)]
struct ChangeInFlight {
    /// `None`: a read, or no transfer.
    operation: Option<Operation>,
    entry: Entry,
    /// Only of a write: a sector for the entry, and the data.
    buffer: Vec<u8>,
    flush: FlushPlace,
}

impl LoggedEngine {
    pub(super) fn new(
        memory: GuestMemory,
        depth: u32,
        log: Arc<WriteLog>,
        ignores_flush: bool,
    ) -> Self {
        let changes = (0..depth).map(|_| ChangeInFlight::default()).collect();
        Self { memory, log, ignores_flush, changes }
    }

    /// Copies the change of a transfer that is about to be submitted.
    fn begin(&mut self, transfer: &Transfer<'_>) {
        let Some(change) = self.changes.get_mut(transfer.tag as usize) else { return };
        change.operation = Some(transfer.operation).filter(|kind| *kind != Operation::Read);
        match transfer.operation {
            Operation::Read => return,
            Operation::Flush if !self.ignores_flush => {
                change.flush = self.log.flush_begins();
                self.log.publish();
                return;
            }
            Operation::Write { .. } => {
                change.buffer.resize(SECTOR_BYTES + transfer.length as usize, 0);
                let mut rest = &mut change.buffer[SECTOR_BYTES..];
                for range in transfer.ranges {
                    let (part, others) = rest.split_at_mut(rest.len().min(range.length as usize));
                    // The range is outside of guest memory, so the inner engine refuses the transfer.
                    let _ = self.memory.read_slice(part, range.address);
                    rest = others;
                }
            }
            _ => {}
        }
        let durable = matches!(
            transfer.operation,
            Operation::Write { durable: true } | Operation::WriteZeroes { durable: true, .. }
        );
        change.entry = Entry {
            sector: transfer.offset / SECTOR,
            sectors: transfer.length / SECTOR,
            flags: if durable { FUA } else { 0 },
            submitted: Some(self.log.entries()),
            ..Entry::default()
        };
    }

    /// Logs the change of a transfer that has completed.
    fn end(&mut self, completions: &[Completion]) {
        for Completion { tag, result } in completions {
            let Some(change) = self.changes.get_mut(*tag as usize) else { continue };
            let Some(operation) = change.operation.take() else { continue };
            let (log, entry) = (&self.log, &change.entry);
            match (operation, result) {
                (Operation::Read, _) => {}
                (Operation::Flush, _) if self.ignores_flush => {
                    log.mark("flush, ignored (cache=unsafe)");
                }
                (Operation::Flush, Ok(())) => log.flush_ends(change.flush),
                // It stays a mark.
                (Operation::Flush, Err(_)) => {}
                (_, Err(error)) => log.mark(&format!(
                    "failed: {} sectors at {}: {error}",
                    entry.sectors, entry.sector
                )),
                (_, Ok(())) if entry.sectors == 0 => {}
                (Operation::Write { .. }, Ok(())) => log.write(entry, &mut change.buffer),
                (Operation::WriteZeroes { .. }, Ok(())) => log.zeroes(entry),
                (Operation::Discard | Operation::SecureErase, Ok(())) => log.discard(entry),
            }
            if change.buffer.len() > KEPT_BUFFER {
                change.buffer = Vec::new();
            }
        }
        self.log.publish();
    }
}

impl EngineLayer for LoggedEngine {
    fn submit(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>) {
        self.begin(&transfer);
        engine.submit(transfer);
    }

    fn complete(&mut self, done: &mut Vec<Completion>, first: usize) {
        self.end(&done[first..]);
    }
}

//! Applies faults to the requests of one worker's engine.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::{Address, Bytes, GuestAddress};

use super::alarm::Alarm;
use super::faults::{Faults, Hit};
use super::rule::{FaultKind, mix};
use crate::GuestMemory;
use crate::clock::Instant;
use crate::disk::layer::EngineLayer;
use crate::disk::{Completion, Disk, DiskError, Engine, GuestRange, SECTOR, Transfer};

pub(super) struct FaultyEngine {
    memory: GuestMemory,
    /// The disk, whose capacity limits misdirected writes.
    disk: Arc<dyn Disk>,
    faults: Arc<Faults>,
    alarm: Alarm,
    /// Completions of requests that the inner engine did not get.
    done: Vec<Completion>,
    /// What to do when a request completes, by its tag.
    pending: Vec<Pending>,
    /// Requests that the inner engine has completed and that are held back.
    held: Vec<(Hold, Completion)>,
    /// A buffer for the guest memory of a torn write.
    torn: Vec<GuestRange>,
}

/// What to do when a request completes.
#[derive(Clone, Copy, Default)]
struct Pending {
    /// Flip a bit in this byte of guest memory.
    flip: Option<GuestAddress>,
    hold: Option<Hold>,
}

/// How long a request is held back.
#[derive(Clone, Copy)]
struct Hold {
    /// At most as long as this rule exists.
    rule: u64,
    until: Option<Instant>,
}

impl FaultyEngine {
    pub(super) fn new(
        engine: &dyn Engine,
        memory: GuestMemory,
        depth: u32,
        disk: Arc<dyn Disk>,
        faults: Arc<Faults>,
    ) -> io::Result<Self> {
        let alarm = Alarm::new(engine.completion_fd())?;
        faults.wake_at_changes(Arc::clone(&alarm.wake));
        let pending = vec![Pending::default(); depth as usize];
        let (done, held, torn) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { memory, disk, faults, alarm, done, pending, held, torn })
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

    /// The address of the byte in which a read gets a wrong bit.
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

    /// Applies the fault that was pending for this completion. Returns how long to hold it back.
    fn settle(&mut self, completion: &Completion) -> Option<Hold> {
        let pending = std::mem::take(self.pending.get_mut(completion.tag as usize)?);
        if let Some(address) = pending.flip
            && let Ok(byte) = self.memory.read_obj::<u8>(address)
        {
            // A failure is not expected: the read has just written to this address.
            let _ = self.memory.write_obj(byte ^ 1, address);
        }
        pending.hold
    }

    /// Completes requests that are no longer held back, and sets the alarm for the next one.
    fn release(&mut self, done: &mut Vec<Completion>) {
        if self.held.is_empty() {
            return;
        }
        let (now, faults) = (Instant::now(), &self.faults);
        let is_over =
            |(hold, _): &mut (Hold, Completion)| !faults.holds(hold.rule, hold.until, now);
        done.extend(self.held.extract_if(.., is_over).map(|(_, completion)| completion));
        if let Some(next) = self.held.iter().filter_map(|(hold, _)| hold.until).min() {
            self.alarm.set(next - now);
        }
    }
}

impl EngineLayer for FaultyEngine {
    fn submit(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>) {
        let tag = transfer.tag;
        let Some(Hit { kind, number, rule }) = self.faults.hit(&transfer) else {
            return engine.submit(transfer);
        };
        let mut pending = Pending::default();
        match kind {
            FaultKind::Error(errno) => {
                let error = io::Error::from_raw_os_error(errno);
                let result = Err(DiskError::from(error));
                return self.done.push(Completion { tag, result });
            }
            FaultKind::Lost => return self.done.push(Completion { tag, result: Ok(()) }),
            FaultKind::Torn => return self.tear(engine, transfer),
            FaultKind::Misdirected(sector) => {
                let last = self.disk.capacity().saturating_sub(transfer.length);
                let offset = sector.saturating_mul(SECTOR).min(last);
                return engine.submit(Transfer { offset, ..transfer });
            }
            FaultKind::Flip => pending.flip = Self::byte(&transfer, number),
            FaultKind::Delay(time) => {
                pending.hold = Some(Hold { rule, until: Some(Instant::now() + time) });
            }
            FaultKind::Hang => pending.hold = Some(Hold { rule, until: None }),
        }
        if let Some(place) = self.pending.get_mut(tag as usize) {
            *place = pending;
        }
        engine.submit(transfer);
    }

    fn complete(&mut self, done: &mut Vec<Completion>, first: usize) {
        for completion in done.split_off(first) {
            match self.settle(&completion) {
                Some(hold) => self.held.push((hold, completion)),
                None => done.push(completion),
            }
        }
        done.append(&mut self.done);
        self.release(done);
    }

    /// Requests are not merged. Rules count the guest's requests. And if a merged transfer fails, its requests are tried again one by one,
    /// which the rule would no longer hit.
    fn merges(&self) -> bool {
        false
    }

    fn finished(&self) -> usize {
        self.done.len()
    }

    fn completion_fd(&self, _: Option<RawFd>) -> Option<RawFd> {
        Some(self.alarm.as_raw_fd())
    }

    fn wait_for_all(&mut self, done: &mut Vec<Completion>) {
        done.extend(self.held.drain(..).map(|(_, completion)| completion));
    }
}

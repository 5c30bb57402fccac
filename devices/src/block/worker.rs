//! Serves queues: takes chains from the available ring, submits them to the engine, reaps what is finished, answers.
//!
//! A [`Worker`] exists from the driver's DRIVER_OK to its reset and belongs to one thread. It knows nothing of threads
//! or file descriptors to wait on; that is [`super::thread`].

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::batch::Batch;
use super::chain::write_at;
use super::delayed::Delayed;
use super::device::Shared;
use super::memory;
use super::poll::Polling;
use super::request::{Action, Parser, Piece, Refusal, Request, Rules};
use super::ring::{Popped, Ring, RingError};
use super::slots::{Slot, Slots, Then};
use super::stats::Counters;
use crate::GuestMemory;
use crate::disk::{Completion, Engine, Operation, Transfer};
use crate::irq::Interrupt;
use crate::virtio::device::ActiveQueue;
use crate::virtio::spec::{self, blk};

/// Passes over one ring before the other rings and the control commands get their turn: a driver that never stops
/// adding chains must not keep the worker from them.
const PASSES: u32 = 16;

/// The part of the longest wait for requests that an answer may wait for its interrupt.
const HOLD: u32 = 4;

/// What the driver and the transport agreed on, as every worker gets it.
#[derive(Clone)]
pub(super) struct Agreement {
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    pub(super) interrupt: Interrupt,
}

/// One thread's share of a running device.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    counters: Arc<Counters>,
    agreement: Agreement,
    /// The rings by position; `None` while the driver has a ring disabled.
    pub(super) rings: Vec<Option<Ring>>,
    pub(super) engine: Box<dyn Engine>,
    pub(super) parser: Parser,
    batch: Batch,
    pub(super) slots: Slots,
    done: Vec<Completion>,
    /// When the pass over a ring, or the round of completions, began. One look at the clock serves a batch.
    pub(super) now: Instant,
    /// Requests that failed under the `stop` policy, in the order of failure, with their ring's position. Their
    /// descriptors still belong to the device, so that the chain says all there is to know about them.
    pub(super) parked: Vec<(usize, Popped)>,
    /// Requests that the disk's limits keep waiting.
    pub(super) delayed: Delayed,
    polling: Polling,
    /// The VM is paused: nothing is taken from the rings.
    pub(super) paused: bool,
}

impl Worker {
    /// Makes the worker and its engine, on the thread that will use them. `positions`: how many rings it may get.
    ///
    /// # Errors
    /// When the disk has no engine to give.
    pub(super) fn new(
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        agreement: Agreement,
        positions: usize,
        paused: bool,
    ) -> io::Result<Self> {
        let polling = Polling::new(shared.options.poll);
        let depth = u32::from(shared.options.queue_size) * positions as u32;
        let engine = Arc::clone(&shared.disk).engine(agreement.memory.clone(), depth)?;
        Ok(Self {
            shared,
            counters,
            agreement,
            rings: (0..positions).map(|_| None).collect(),
            engine,
            parser: Parser::default(),
            batch: Batch::new(),
            slots: Slots::new(depth),
            done: Vec::with_capacity(depth as usize),
            parked: Vec::new(),
            delayed: Delayed::default(),
            paused,
            now: Instant::now(),
            polling,
        })
    }

    /// The engine's completion descriptor, to be polled by the thread.
    pub(super) fn completion_fd(&self) -> Option<std::os::fd::RawFd> {
        self.engine.completion_fd()
    }

    /// Takes a queue over. The caller serves it once unasked.
    ///
    /// # Errors
    /// When the device never had such a queue, or not of that size.
    pub(super) fn add_ring(&mut self, position: usize, active: ActiveQueue) -> io::Result<()> {
        let place = self.rings.get_mut(position).filter(|_| active.queue.size() <= self.shared.options.queue_size);
        let event_index = self.agreement.features & spec::F_EVENT_IDX != 0;
        let hold = self.shared.options.poll / HOLD;
        *place.ok_or(io::ErrorKind::InvalidInput)? = Some(Ring::new(active, event_index, hold));
        Ok(())
    }

    /// The ring at `position`, when the driver has it enabled.
    pub(super) fn ring(&self, position: usize) -> Option<&Ring> {
        self.rings.get(position)?.as_ref()
    }

    /// Serves what waits in the ring at `position`, until it is empty or has had its share.
    pub(super) fn serve(&mut self, position: usize) {
        let mut more = Ok(true);
        let mut passes = 0..PASSES;
        while more == Ok(true) && passes.next().is_some() {
            more = self.pass(position);
        }
        self.interrupt();
        if let Err(error) = more {
            return self.give_up(position, error);
        }
        // Let the event loop come back here after everyone else's turn.
        if more == Ok(true)
            && let Some(ring) = self.ring(position)
            && let Err(error) = ring.kick().write(1)
        {
            tracing::error!(disk = self.shared.options.name, %error, "cannot kick a queue again");
        }
    }

    /// One batch: takes all chains that wait, submits them, answers what is finished. `true`: look again.
    fn pass(&mut self, position: usize) -> Result<bool, RingError> {
        // After a stop by the error policy too, the disk stands still until `resume`.
        if self.paused || !self.parked.is_empty() || self.ring(position).is_none_or(Ring::is_broken) {
            return Ok(false);
        }
        let taken = self.take_all(position);
        // Whatever became of the rest, the chains taken so far go on.
        self.hand_over();
        taken?;
        if self.more_soon(position) {
            return Ok(true);
        }
        self.interrupt();
        match &mut self.rings[position] {
            Some(ring) => ring.want_kicks(&self.agreement.memory),
            None => Ok(false),
        }
    }

    /// Hands the host what was gathered, and answers what is finished.
    pub(super) fn submit(&mut self) {
        self.hand_over();
        self.interrupt();
    }

    /// As `submit`, but the driver may have to wait for its interrupt.
    fn hand_over(&mut self) {
        self.batch.submit(&mut *self.engine, &mut self.slots);
        self.engine.commit();
        self.collect();
    }

    /// Waits awake for chains or completions, if that is promising: the driver has been asked not to kick. `true` when
    /// the ring at `position` has chains.
    fn more_soon(&mut self, position: usize) -> bool {
        let mut now = Instant::now();
        let Some(end) = self.polling.idle(now) else { return false };
        loop {
            if self.slots.in_flight() > 0 {
                self.collect();
            }
            let expected = self.polling.expected();
            if self.rings.iter_mut().flatten().any(|ring| ring.moderation.is_due(now, expected)) {
                self.interrupt();
            }
            let memory = &self.agreement.memory;
            // A ring that cannot be read has work, too: to find out why.
            let waiting = |ring: &Ring| !ring.is_broken() && ring.available(memory) != Ok(0);
            if let Some(found) = self.rings.iter().position(|ring| ring.as_ref().is_some_and(waiting)) {
                return found == position;
            }
            now = Instant::now();
            if now >= end {
                self.polling.in_vain();
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn take_all(&mut self, position: usize) -> Result<(), RingError> {
        let Some(ring) = &mut self.rings[position] else { return Ok(()) };
        ring.suppress_kicks(&self.agreement.memory)?;
        let available = ring.available(&self.agreement.memory)?;
        if available > 0 {
            ring.added(&self.agreement.memory);
        }
        // Read after the available index: a change that the driver made before it added these chains counts for them.
        let rules = self.rules();
        self.now = Instant::now();
        if available > 0 {
            self.polling.work(self.now);
        }
        for _ in 0..available {
            let Some(ring) = &mut self.rings[position] else { return Ok(()) };
            let popped = ring.pop(&self.agreement.memory)?;
            self.begin(position, popped, &rules, self.now, Arrival::Fresh)?;
        }
        Ok(())
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.agreement.memory
    }

    pub(super) fn rules(&self) -> Rules {
        let Agreement { features, .. } = self.agreement;
        Rules {
            features,
            capacity: self.shared.disk.capacity(),
            block_size: u64::from(self.shared.facts.block_size),
            size_max: self.shared.facts.size_max(features),
            read_only: self.shared.disk.read_only(),
            write_through: !self.shared.writeback(features),
            scsi: self.shared.disk.scsi(),
        }
    }

    /// Parses a chain and starts its request, lets it wait, or answers it at once.
    pub(super) fn begin(
        &mut self,
        position: usize,
        popped: Popped,
        rules: &Rules,
        started: Instant,
        arrival: Arrival,
    ) -> Result<(), RingError> {
        let Some(ring) = &mut self.rings[position] else { unreachable!("a chain came from this ring") };
        let memory = &self.agreement.memory;
        let indirect = rules.features & spec::F_INDIRECT_DESC != 0;
        if let Err(error) = self.parser.chain.walk(memory, ring.queue(), popped.head(), indirect) {
            ring.forget(popped);
            return Err(error.into());
        }
        match self.parser.parse(memory, rules) {
            Ok(request) => {
                if let Some(popped) = self.admit(position, popped, &request, started, arrival) {
                    self.start(position, popped, &request, started, arrival);
                }
                Ok(())
            }
            Err(refusal) => self.refuse(position, popped, refusal),
        }
    }

    fn start(&mut self, position: usize, popped: Popped, request: &Request, started: Instant, arrival: Arrival) {
        let Request { kind, status, action } = *request;
        tracing::trace!(disk = self.shared.options.name, head = popped.head(), ?kind, ?action, "request");
        let mut slot = Slot {
            popped,
            ring: position,
            kind,
            status,
            length: 0,
            end: 0,
            written: 0,
            started,
            then: Then::Answer,
            next: None,
            merged: false,
            scsi: None,
        };
        match action {
            Action::GetId => {
                slot.written = self.put_data(&action, &self.shared.id());
                self.answer(slot, blk::S_OK);
            }
            Action::GetLifetime => {
                slot.written = self.put_data(&action, &self.shared.lifetime().to_le_bytes());
                self.answer(slot, blk::S_OK);
            }
            Action::Scsi => self.start_scsi(slot),
            Action::Transfer { length: 0, .. } => self.answer(slot, blk::S_OK),
            Action::Transfer { operation, offset, length } => {
                (slot.length, slot.end) = (length, offset + length);
                if operation == Operation::Read {
                    slot.written = length as u32;
                } else {
                    self.shared.changes_up_to(slot.end);
                }
                let tag = self.slots.insert(slot);
                let transfer = Transfer { tag, operation, offset, length, ranges: self.parser.data(&action) };
                match arrival {
                    Arrival::Retried => self.engine.submit(transfer),
                    _ => self.batch.push(&transfer, &mut *self.engine, &mut self.slots),
                }
            }
            Action::Flush => {
                self.batch.submit(&mut *self.engine, &mut self.slots);
                let tag = self.slots.insert(slot);
                self.engine.submit(Transfer { tag, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] });
            }
            Action::Pieces => {
                slot.length = self.parser.pieces.iter().map(|piece| piece.length).sum();
                let ends = self.parser.pieces.iter().map(|piece| piece.offset + piece.length);
                self.shared.changes_up_to(ends.max().unwrap_or_default());
                slot.then = Then::Piece(0);
                let tag = self.slots.insert(slot);
                self.slots.set_pieces(tag, &self.parser.pieces);
                self.advance(tag);
            }
        }
    }

    /// Answers a chain that is no request.
    fn refuse(&mut self, position: usize, popped: Popped, refusal: Refusal) -> Result<(), RingError> {
        let (disk, limits) = (&self.shared.options.name, &self.shared.limits);
        let Some(ring) = &mut self.rings[position] else { unreachable!("a chain came from this ring") };
        match refusal {
            Refusal::Status { kind, address, code, written } => {
                if let Some(suppressed) = limits.bad_request.admit() {
                    tracing::debug!(disk, ?kind, code, suppressed, "the guest sent a bad request");
                }
                self.counters.invalid(kind);
                put_status(&self.agreement.memory, address, code);
                ring.answer(&self.agreement.memory, popped, written + blk::STATUS_SIZE as u32)
            }
            Refusal::Unanswerable => {
                if let Some(suppressed) = limits.no_status.admit() {
                    tracing::warn!(disk, suppressed, "the guest sent a request without a writable status byte");
                }
                self.counters.unanswerable();
                ring.answer(&self.agreement.memory, popped, 0)
            }
        }
    }

    /// Writes an answer that needs no disk, as far as the driver has room for it. Returns the bytes written.
    fn put_data(&self, action: &Action, bytes: &[u8]) -> u32 {
        write_at(&self.agreement.memory, self.parser.data(action), 0, bytes) as u32
    }

    /// Handles everything the engine has finished, then interrupts the driver if it wants to know.
    pub(super) fn reap(&mut self) {
        self.collect();
        self.interrupt();
    }

    /// Handles everything the engine has finished, and shows the driver the answers.
    fn collect(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        loop {
            self.engine.reap(&mut done);
            if done.is_empty() {
                break;
            }
            self.complete_all(&mut done);
        }
        self.done = done;
        self.show();
    }

    fn complete_all(&mut self, done: &mut Vec<Completion>) {
        self.now = Instant::now();
        for Completion { tag, result } in done.drain(..) {
            match result {
                Ok(()) => self.advance_all(tag),
                Err(error) => self.fail(tag, error),
            }
        }
        // For whatever the completions led to.
        self.engine.commit();
    }

    /// A transfer succeeded: so did every request merged into it.
    fn advance_all(&mut self, tag: u32) {
        let mut member = Some(tag);
        while let Some(tag) = member {
            member = self.slots.get(tag).next.take();
            self.advance(tag);
        }
    }

    /// The next step of one request.
    fn advance(&mut self, tag: u32) {
        if let Then::Piece(index) = self.slots.get(tag).then
            && let Some(Piece { operation, offset, length }) = self.slots.piece(tag, index)
        {
            let slot = self.slots.get(tag);
            // A reset need not wait for gigabytes of zeroes.
            if self.rings[slot.ring].as_ref().is_some_and(|ring| ring.leaving) {
                let slot = self.slots.remove(tag);
                return self.answer(slot, blk::S_IOERR);
            }
            slot.then = Then::Piece(index + 1);
            return self.engine.submit(Transfer { tag, operation, offset, length, ranges: &[] });
        }
        let slot = self.slots.remove(tag);
        match slot.scsi {
            Some(_) => self.answer_scsi(slot),
            None => self.answer(slot, blk::S_OK),
        }
    }

    /// Writes the status and settles the debt.
    pub(super) fn answer(&mut self, slot: Slot, code: u8) {
        let Slot { popped, ring: position, kind, status, length, end, written, started, merged, scsi, .. } = slot;
        tracing::trace!(disk = self.shared.options.name, head = popped.head(), ?kind, code, "answer");
        let time = self.now.saturating_duration_since(started);
        match code {
            blk::S_OK => self.counters.done(kind, length, end, merged, time),
            _ => self.counters.failed(kind, time),
        }
        // A SCSI command that was not carried out has a trailer all the same.
        let written = if code == blk::S_OK || scsi.is_some() { written } else { 0 };
        put_status(&self.agreement.memory, status, code);
        let Some(ring) = &mut self.rings[position] else {
            unreachable!("a ring stays until its requests are answered")
        };
        if let Err(error) = ring.answer(&self.agreement.memory, popped, written + blk::STATUS_SIZE as u32) {
            self.give_up(position, error);
        }
    }

    /// The driver broke this ring: no more of it until a reset. The other rings go on (virtio 1.2 §2.1.2).
    pub(super) fn give_up(&mut self, position: usize, error: RingError) {
        let Some(ring) = &mut self.rings[position] else { return };
        if ring.is_broken() {
            return;
        }
        ring.set_broken();
        self.counters.broken_ring();
        if let Some(suppressed) = self.shared.limits.broken_ring.admit() {
            let (disk, queue) = (&self.shared.options.name, ring.index());
            tracing::warn!(disk, queue, %error, suppressed, "the guest broke a ring; the disk needs a reset");
        }
        self.agreement.interrupt.device_needs_reset();
    }

    /// Shows the driver all that was answered.
    fn show(&mut self) {
        self.rings.iter_mut().flatten().for_each(|ring| ring.publish(&self.agreement.memory, self.now));
    }

    /// Interrupts the driver, if it wants to hear of what it was shown. Nothing is held back outside of `serve`.
    fn interrupt(&mut self) {
        // The rings share the line, and the driver looks at all of them. No short cut: each starts to count anew.
        if self.rings.iter_mut().flatten().fold(false, |owed, ring| ring.moderation.take() | owed) {
            self.counters.interrupt();
            self.agreement.interrupt.used_buffer();
        }
    }

    /// Drains, what the disk's limits keep waiting included, and takes nothing more from the rings until `resume`.
    pub(super) fn pause(&mut self) {
        self.paused = true;
        (0..self.rings.len()).for_each(|position| self.let_through(position));
        self.drain();
    }

    /// Waits until nothing is in flight. Only what the error policy keeps stays unanswered.
    pub(super) fn drain(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        while self.slots.in_flight() > 0 {
            self.engine.drain(&mut done);
            assert!(!done.is_empty(), "the engine lost a request");
            self.complete_all(&mut done);
        }
        self.done = done;
        self.show();
        self.interrupt();
    }

    /// Drains, and gives the queue at `position` back, with an answer to everything but what the error policy keeps: the
    /// driver has given that up. Requests of several segments end where they are.
    pub(super) fn remove_ring(&mut self, position: usize) -> Option<ActiveQueue> {
        if let Some(ring) = self.rings.get_mut(position)?.as_mut() {
            ring.leaving = true;
        }
        self.let_through(position);
        self.drain();
        self.forget_kept(position);
        Some(self.rings.get_mut(position)?.take()?.into_active())
    }

    /// Drains, and gives all queues back.
    pub(super) fn stop(mut self) -> Vec<ActiveQueue> {
        self.rings.iter_mut().flatten().for_each(|ring| ring.leaving = true);
        let queues = (0..self.rings.len()).filter_map(|position| self.remove_ring(position)).collect();
        if !self.shared.disk.read_only() {
            self.last_flush();
        }
        queues
    }

    /// The driver is gone: nobody else will ask for what it wrote to become durable.
    fn last_flush(&mut self) {
        self.engine.submit(Transfer { tag: 0, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] });
        self.engine.commit();
        self.engine.drain(&mut self.done);
        if let Some(Completion { result: Err(error), .. }) = self.done.pop()
            && let Some(suppressed) = self.shared.limits.host_error.admit()
        {
            tracing::error!(disk = self.shared.options.name, %error, suppressed, "the disk's last flush failed");
        }
    }
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// From the ring.
    Fresh,
    /// The disk's limits kept it waiting.
    Released,
    /// It failed before: it travels alone, and has been counted.
    Retried,
}

/// The status is one byte, in memory that was checked when the chain was walked.
fn put_status(memory: &GuestMemory, address: GuestAddress, code: u8) {
    if memory::store(memory, address, code).is_none() {
        tracing::error!(address = address.0, "bug: a status byte outside guest memory");
    }
}

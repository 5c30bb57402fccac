//! One split virtqueue (virtio 1.2 §2.7): heads out of the available ring, answers into the used ring, and who needs to
//! be woken.
//!
//! `virtio_queue::Queue` holds the ring's place, size and indices. The ring itself is read and written here: the crate's
//! iterators let heads beyond the queue through, cannot tell the end of a chain from a broken one and ignore
//! NO_INTERRUPT, and it shows each answer on its own where a batch can share one write and one barrier.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::memory;
use super::moderation::Moderation;
use crate::GuestMemory;
use crate::virtio::device::ActiveQueue;

/// The driver broke the ring. Nothing on it can be trusted until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    #[error("the available index jumped from {from} to {to}, more than the queue's size {size}")]
    AvailableIndex { from: u16, to: u16, size: u16 },
    #[error("descriptor {head} is beyond the queue's size {size}")]
    Head { head: u16, size: u16 },
    #[error("more chains made available than the queue's size {size} holds")]
    Overcommitted { size: u16 },
    #[error("the ring lies outside guest memory")]
    Memory,
    #[error(transparent)]
    Chain(#[from] super::chain::ChainError),
}

/// A chain taken from the available ring: a debt that only [`Ring::answer`] (or [`Ring::forget`], once the driver
/// has given the ring up) settles. Dropping it is a bug, and says so.
#[derive(Debug)]
#[must_use = "a chain taken from the ring must be answered"]
pub(super) struct Popped {
    head: u16,
}

impl Popped {
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    fn settle(self) -> u16 {
        let head = self.head;
        std::mem::forget(self);
        head
    }
}

impl Drop for Popped {
    fn drop(&mut self) {
        // While a panic unwinds, the VM is about to stop and the first panic is the one to report.
        if !std::thread::panicking() {
            tracing::error!(head = self.head, "bug: a request was dropped without an answer");
            debug_assert!(false, "a request was dropped without an answer");
        }
    }
}

/// A virtqueue in use.
pub(super) struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// Chains popped and not yet answered.
    outstanding: u16,
    /// EVENT_IDX was negotiated.
    event_index: bool,
    /// The used index that the driver has been shown.
    published: u16,
    /// The queue came with answers that the driver may not have been told of: from a snapshot.
    restored: bool,
    /// Set once the driver broke the ring; no more chains are taken from it.
    broken: bool,
    /// The driver is taking the ring back: what has not begun need not be done.
    pub(super) leaving: bool,
    /// What the driver is yet to hear of.
    pub(super) moderation: Moderation,
}

impl Ring {
    /// `hold`: the longest that the driver may wait for an interrupt.
    pub(super) fn new(active: ActiveQueue, event_index: bool, hold: Duration) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        let published = queue.next_used();
        let restored = published != 0;
        let moderation = Moderation::new(hold);
        Self {
            index,
            queue,
            kick,
            outstanding: 0,
            event_index,
            published,
            restored,
            broken: false,
            leaving: false,
            moderation,
        }
    }

    /// Hands the queue back. Nothing may be outstanding.
    pub(super) fn into_active(self) -> ActiveQueue {
        debug_assert_eq!(self.outstanding, 0, "a queue was handed back with requests in flight");
        ActiveQueue { index: self.index, queue: self.queue, kick: self.kick }
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) fn set_broken(&mut self) {
        self.broken = true;
    }

    /// How many chains wait in the available ring (virtio 1.2 §2.7.6). Everything that the driver wrote before it made
    /// them available is visible after this.
    pub(super) fn available(&self, memory: &GuestMemory) -> Result<u16, RingError> {
        let index = GuestAddress(self.queue.avail_ring() + 2);
        let to = memory::load_atomic(memory, index, Ordering::Acquire).map(u16::from_le).ok_or(RingError::Memory)?;
        let from = self.queue.next_avail();
        let size = self.queue.size();
        let waiting = to.wrapping_sub(from);
        if waiting > size { Err(RingError::AvailableIndex { from, to, size }) } else { Ok(waiting) }
    }

    /// Takes the next chain, one of those that `available` counted.
    pub(super) fn pop(&mut self, memory: &GuestMemory) -> Result<Popped, RingError> {
        let size = self.queue.size();
        if self.outstanding >= size {
            return Err(RingError::Overcommitted { size });
        }
        let next = self.queue.next_avail();
        // The ring follows flags and idx, 16 bits each (§2.7.6).
        let entry = self.queue.avail_ring() + 4 + 2 * u64::from(next % size);
        let head = memory::load(memory, GuestAddress(entry)).map(u16::from_le).ok_or(RingError::Memory)?;
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        self.outstanding += 1;
        Ok(Popped { head })
    }

    /// Takes on a chain that was taken before this ring was restored from a snapshot.
    pub(super) fn adopt(&mut self, head: u16) -> Option<Popped> {
        let size = self.queue.size();
        (head < size && self.outstanding < size).then(|| {
            self.outstanding += 1;
            Popped { head }
        })
    }

    /// Puts the chain into the used ring with `written` bytes (virtio 1.2 §2.7.8). The driver sees it after `publish`.
    pub(super) fn answer(&mut self, memory: &GuestMemory, popped: Popped, written: u32) -> Result<(), RingError> {
        let next = self.queue.next_used();
        // The ring follows flags and idx, 16 bits each; an element is two le32.
        let element = self.queue.used_ring() + 4 + 8 * u64::from(next % self.queue.size());
        self.outstanding -= 1;
        let used = [u32::from(popped.settle()).to_le(), written.to_le()];
        memory::store(memory, GuestAddress(element), used).ok_or(RingError::Memory)?;
        self.queue.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Drops the debt: the driver reset the ring, or broke it, and expects no answer.
    pub(super) fn forget(&mut self, popped: Popped) {
        self.outstanding -= 1;
        popped.settle();
    }

    /// Asks the driver not to kick while chains are being taken. A hint, and with EVENT_IDX the state after each kick
    /// (virtio 1.2 §2.7.10).
    pub(super) fn suppress_kicks(&self, memory: &GuestMemory) -> Result<(), RingError> {
        if self.event_index { Ok(()) } else { self.set_used_flags(memory, VRING_USED_F_NO_NOTIFY as u16) }
    }

    /// Asks the driver to kick again. `true`: chains arrived meanwhile whose kick will not come; look once more.
    pub(super) fn want_kicks(&self, memory: &GuestMemory) -> Result<bool, RingError> {
        if self.event_index {
            // avail_event follows the used ring's elements (§2.7.8).
            let event = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
            let next = self.queue.next_avail().to_le();
            memory::store_atomic(memory, GuestAddress(event), next, Ordering::Relaxed).ok_or(RingError::Memory)?;
        } else {
            self.set_used_flags(memory, 0)?;
        }
        // The wish must be visible before the index is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        self.available(memory).map(|waiting| waiting > 0)
    }

    fn set_used_flags(&self, memory: &GuestMemory, flags: u16) -> Result<(), RingError> {
        let address = GuestAddress(self.queue.used_ring());
        memory::store_atomic(memory, address, flags.to_le(), Ordering::Relaxed).ok_or(RingError::Memory)
    }

    /// Where the driver says what it wants to hear of: `used_event` follows the available ring's entries, and without
    /// EVENT_IDX the flags come first (§2.7.6).
    fn wish(&self, memory: &GuestMemory) -> Option<u16> {
        let offset = if self.event_index { 4 + 2 * u64::from(self.queue.size()) } else { 0 };
        let wish = GuestAddress(self.queue.avail_ring() + offset);
        memory::load_atomic(memory, wish, Ordering::Relaxed).map(u16::from_le)
    }

    /// The driver added chains. How many answers it had not looked at tells whether it can do without hearing of them.
    pub(super) fn added(&mut self, memory: &GuestMemory) {
        // `used_event` is where a driver that wants to hear of the next answer has got to.
        if self.event_index
            && let Some(seen) = self.wish(memory)
        {
            self.moderation.added(self.published.wrapping_sub(seen));
        }
    }

    /// Shows the driver the answers since the last call.
    pub(super) fn publish(&mut self, memory: &GuestMemory, now: Instant) {
        let (old, new) = (self.published, self.queue.next_used());
        let restored = std::mem::take(&mut self.restored);
        if old == new && !restored {
            return;
        }
        self.published = new;
        let index = GuestAddress(self.queue.used_ring() + 2);
        let shown = memory::store_atomic(memory, index, new.to_le(), Ordering::Release);
        // The index must be visible before the driver's wish is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        let answers = new.wrapping_sub(old);
        let (unseen, wanted) = match (shown, self.wish(memory)) {
            (Some(()), Some(event)) if self.event_index => {
                // Did the index pass the event (§2.7.7.2)?
                (new.wrapping_sub(event), new.wrapping_sub(event).wrapping_sub(1) < answers)
            }
            (Some(()), Some(flags)) => (answers, u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0),
            // Rather one interrupt too many than one too few.
            _ => (answers, true),
        };
        self.moderation.shown(unseen, wanted || restored, now);
    }
}

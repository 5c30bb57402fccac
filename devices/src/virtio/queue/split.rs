//! One split virtqueue (virtio 1.2 §2.7): chains come out of the available ring, completions go into the used ring.
//!
//! `virtio_queue::Queue` holds the addresses, the size and the two indices. The rings themselves are read and written
//! here. The crate's own iterators accept heads beyond the queue, do not tell the end of a chain from a broken one, and
//! ignore NO_INTERRUPT. They also publish each completion on its own, where several can share one store and one barrier.
//!
//! The device calls [`SplitQueue::available`] and [`SplitQueue::pop`] to take chains, [`SplitQueue::complete`] or
//! [`SplitQueue::abandon`] for each of them, and [`SplitQueue::publish`] once for several completions. Device and driver each store one word
//! and then load one that the other side stores. So two places need a full barrier: `publish`, between the store of the used
//! index and the load of the driver's request for an interrupt, and `enable_notifications`, between the store that asks for a
//! kick and the load of the available index.

mod state;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::chain::{ChainBuffers, ChainError};
use super::coalesce::Coalescer;
#[cfg(not(loom))]
use super::memory;
use crate::GuestMemory;
use crate::clock::Instant;
use crate::sync::atomic::{Ordering, fence};
#[cfg(loom)]
use crate::virtio::model as memory;
use crate::virtio::spec::ring;

/// The driver broke the rules of the ring. Nothing in the queue can be trusted until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says what the field and the variant are")]
pub enum QueueError {
    #[error("the available index jumped from {from} to {to}, more than the queue's size {size}")]
    AvailableIndex { from: u16, to: u16, size: u16 },
    #[error("descriptor {head} is beyond the queue's size {size}")]
    Head { head: u16, size: u16 },
    #[error("more chains made available than the queue's size {size} holds")]
    Overcommitted { size: u16 },
    #[error("the ring lies outside guest memory")]
    Memory,
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// A token for one chain that was taken from the available ring and is not in the used ring yet. It must go back to its
/// queue: by [`SplitQueue::complete`] or, when the driver expects no completion any more, by [`SplitQueue::abandon`]. A
/// request that is never completed hangs a process in the guest for good. So dropping the token is a bug, which panics in a
/// debug build and logs an error in a release build.
#[derive(Debug)]
#[must_use = "a chain taken from the queue must be completed or abandoned"]
pub struct DescriptorChain {
    head: u16,
}

impl DescriptorChain {
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    fn into_head(self) -> u16 {
        let head = self.head;
        std::mem::forget(self);
        head
    }
}

impl Drop for DescriptorChain {
    fn drop(&mut self) {
        // While a panic unwinds, the VM is about to stop and the first panic is the one to report.
        if !std::thread::panicking() {
            tracing::error!("bug in minivmm, please report it: a request was dropped");
            debug_assert!(false, "a request was dropped without an answer");
        }
    }
}

/// A split virtqueue in use.
pub struct SplitQueue {
    queue: Queue,
    /// Chains taken and neither completed nor abandoned.
    outstanding: u16,
    /// EVENT_IDX was negotiated.
    event_index: bool,
    /// The used index in guest memory.
    shown: u16,
    /// The used index at the last `publish`: the coalescer knows of the completions up to it.
    published: u16,
    /// The next `publish` asks for an interrupt in any case. Set for a queue that was restored from a snapshot, which does
    /// not say whether the driver was interrupted for the last completions.
    owes_interrupt: bool,
    pub(crate) coalescer: Coalescer,
}

impl SplitQueue {
    /// Takes over a queue that the transport has validated. `restored` says that the queue comes from a snapshot.
    pub fn new(queue: Queue, event_index: bool, restored: bool) -> Self {
        Self {
            shown: queue.next_used(),
            published: queue.next_used(),
            queue,
            outstanding: 0,
            event_index,
            owes_interrupt: restored,
            coalescer: Coalescer::new(),
        }
    }

    /// Hands the queue back. No chain may be outstanding.
    pub(crate) fn into_inner(self) -> Queue {
        debug_assert_eq!(self.outstanding, 0, "a queue was handed back with requests in flight");
        self.queue
    }

    /// How many chains wait in the available ring (virtio 1.2 §2.7.6). Everything that the driver wrote before it made
    /// them available is visible after this call.
    pub fn available(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let index = GuestAddress(self.queue.avail_ring() + ring::IDX);
        let to = memory::load_atomic(memory, index, Ordering::Acquire)
            .map(u16::from_le)
            .ok_or(QueueError::Memory)?;
        let from = self.queue.next_avail();
        let size = self.queue.size();
        let waiting = to.wrapping_sub(from);
        if waiting > size {
            Err(QueueError::AvailableIndex { from, to, size })
        } else {
            Ok(waiting)
        }
    }

    /// Takes the next chain, one of those that `available` counted.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<DescriptorChain, QueueError> {
        waypoint!();
        let size = self.queue.size();
        if self.outstanding >= size {
            return Err(QueueError::Overcommitted { size });
        }
        let next = self.queue.next_avail();
        // The size is a power of two.
        let offset = ring::ELEMENTS + ring::AVAILABLE_ELEMENT * u64::from(next & (size - 1));
        let entry = self.queue.avail_ring() + offset;
        let head = memory::load(memory, GuestAddress(entry))
            .map(u16::from_le)
            .ok_or(QueueError::Memory)?;
        if head >= size {
            return Err(QueueError::Head { head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        self.outstanding += 1;
        Ok(DescriptorChain { head })
    }

    /// Chains taken and neither completed nor abandoned.
    pub(crate) fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Follows the chain's descriptors and puts its buffers into `buffers`. `indirect`: INDIRECT_DESC was negotiated.
    pub fn walk(
        &self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        indirect: bool,
        buffers: &mut ChainBuffers,
    ) -> Result<(), ChainError> {
        buffers.walk(memory, &self.queue, chain.head, indirect)
    }

    /// Puts the chain into the used ring with `written` bytes (virtio 1.2 §2.7.8). The driver sees it after `publish`.
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        chain: DescriptorChain,
        written: u32,
    ) -> Result<(), QueueError> {
        let next = self.queue.next_used();
        let offset =
            ring::ELEMENTS + ring::USED_ELEMENT * u64::from(next & (self.queue.size() - 1));
        let element = self.queue.used_ring() + offset;
        self.outstanding -= 1;
        let used = [u32::from(chain.into_head()).to_le(), written.to_le()];
        memory::store(memory, GuestAddress(element), used).ok_or(QueueError::Memory)?;
        self.queue.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Settles the chain without a completion: the driver has reset the queue, or broke it, and expects none.
    pub fn abandon(&mut self, chain: DescriptorChain) {
        self.outstanding -= 1;
        chain.into_head();
    }

    /// Asks the driver not to notify while the device takes chains anyway. This is a hint. With EVENT_IDX there is nothing to
    /// do: a driver that has notified once does not notify again until the device asks for it (virtio 1.2 §2.7.10).
    pub fn disable_notifications(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.event_index { Ok(()) } else { self.set_used_flags(memory, ring::USED_F_NO_NOTIFY) }
    }

    /// Asks the driver to notify again. Returns `true` when chains arrived meanwhile: no notification will come for
    /// them, so the device has to look once more.
    pub fn enable_notifications(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if self.event_index {
            let event = self.queue.used_ring() + ring::avail_event(self.queue.size());
            let next = self.queue.next_avail().to_le();
            memory::store_atomic(memory, GuestAddress(event), next, Ordering::Relaxed)
                .ok_or(QueueError::Memory)?;
        } else {
            self.set_used_flags(memory, 0)?;
        }
        // The driver must see the request before the index is read. Otherwise the driver could add a chain without a kick
        // after the device has looked.
        fence(Ordering::SeqCst);
        self.available(memory).map(|waiting| waiting > 0)
    }

    fn set_used_flags(&self, memory: &GuestMemory, flags: u16) -> Result<(), QueueError> {
        let address = GuestAddress(self.queue.used_ring());
        memory::store_atomic(memory, address, flags.to_le(), Ordering::Relaxed)
            .ok_or(QueueError::Memory)
    }

    /// The word by which the driver asks for interrupts: `used_event`, behind the available ring's entries, or without
    /// EVENT_IDX the flags, at the start of the available ring (§2.7.6).
    fn interrupt_request(&self, memory: &GuestMemory) -> Option<u16> {
        let offset = if self.event_index { ring::used_event(self.queue.size()) } else { 0 };
        let request = GuestAddress(self.queue.avail_ring() + offset);
        memory::load_atomic(memory, request, Ordering::Relaxed).map(u16::from_le)
    }

    /// The driver submitted chains: tells the coalescer how many completions the driver had not looked at by then.
    pub(crate) fn note_submission(&mut self, memory: &GuestMemory) {
        // A driver that wants an interrupt for its next completion sets `used_event` to the number of completions that it
        // has processed.
        if self.event_index
            && let Some(seen) = self.interrupt_request(memory)
        {
            self.coalescer.on_submit(self.published.wrapping_sub(seen));
        }
    }

    /// Whether the driver wants an interrupt for what was published. The caller must then raise it: the next call returns false.
    pub fn take_interrupt(&mut self) -> bool {
        self.coalescer.take()
    }

    /// Stores the used index and no more, so that a driver that polls sees the completions so far. The next `publish` decides whether to
    /// interrupt for them.
    pub fn store_used_index(&mut self, memory: &GuestMemory) -> Option<()> {
        let new = self.queue.next_used();
        if self.shown != new {
            let index = GuestAddress(self.queue.used_ring() + ring::IDX);
            memory::store_atomic(memory, index, new.to_le(), Ordering::Release)?;
            self.shown = new;
        }
        Some(())
    }

    /// Stores the used index, reads whether the driver wants an interrupt for the completions since the last call, and tells
    /// the coalescer.
    pub fn publish(&mut self, memory: &GuestMemory, now: Instant) {
        let (old, new) = (self.published, self.queue.next_used());
        let owes_interrupt = std::mem::take(&mut self.owes_interrupt);
        if old == new && !owes_interrupt {
            return;
        }
        self.published = new;
        let stored = self.store_used_index(memory);
        // The index must be visible before the driver's request is read. Otherwise the driver could ask for an interrupt
        // and look at the old index after the device has read the request: then no interrupt would come.
        fence(Ordering::SeqCst);
        let completions = new.wrapping_sub(old);
        let (unseen, wanted) = match (stored, self.interrupt_request(memory)) {
            (Some(()), Some(event)) if self.event_index => {
                // Did the index pass the event (§2.7.7.2)?
                (new.wrapping_sub(event), new.wrapping_sub(event).wrapping_sub(1) < completions)
            }
            (Some(()), Some(flags)) => (completions, flags & ring::AVAIL_F_NO_INTERRUPT == 0),
            // On an access error, interrupt: a spurious interrupt is harmless, a lost one hangs the driver.
            _ => (completions, true),
        };
        self.coalescer.on_complete(unseen, wanted || owes_interrupt, now);
    }
}

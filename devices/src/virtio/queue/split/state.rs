//! What a save and a restore need of a virtqueue beside its registers: how far the device has come in the rings, and the chains that
//! it had taken.
//!
//! A capability: a queue is served without it. It hooks in as a child of the queue's module, whose fields it reads and writes.

use virtio_queue::QueueT;

use super::{DescriptorChain, SplitQueue};

impl SplitQueue {
    /// The indices `next_avail` and `next_used`, from which the device of a restored machine goes on.
    pub fn ring_indices(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Makes the token of a chain that was outstanding in the snapshot from which this queue was restored. `None`: the queue
    /// cannot have had that chain.
    pub(crate) fn restore_chain(&mut self, head: u16) -> Option<DescriptorChain> {
        let size = self.queue.size();
        (head < size && self.outstanding < size).then(|| {
            self.outstanding += 1;
            DescriptorChain { head }
        })
    }
}

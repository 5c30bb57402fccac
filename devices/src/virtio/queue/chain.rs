//! Walks a descriptor chain (virtio 1.2 §2.7.5) into two lists of guest ranges: what the device reads, and what it
//! writes.
//!
//! The driver may split a request over descriptors wherever it likes (§2.7.4.1). So the lists do not say where a descriptor
//! ended: a device takes its header from the front of the readable bytes and its status from the end of the writable ones.
//! Each descriptor is read once, and each range is checked against guest memory once. A chain has at most [`CHAIN_MAX`]
//! descriptors, so a hostile chain costs bounded time. Zero-length buffers are ignored.

pub(crate) mod ranges;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, VolatileSlice};

use super::memory;
use crate::virtio::spec::ring;
use crate::{GuestMemory, GuestRange};

/// Most descriptors in a chain, indirect ones included: as many buffers as one vectored system call takes (IOV_MAX).
pub(crate) const CHAIN_MAX: u32 = 1024;
const DESCRIPTOR_SIZE: u32 = ring::DESCRIPTOR_SIZE as u32;

/// A chain that breaks the rules of the ring itself, as opposed to those of the block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each variant is")]
pub enum ChainError {
    #[error("a descriptor outside guest memory")]
    Table,
    #[error("a next index beyond the descriptor table")]
    Next,
    #[error("a loop, or more than {CHAIN_MAX} descriptors")]
    Endless,
    #[error("a buffer outside guest memory")]
    Buffer,
    #[error("a device-readable buffer after a device-writable one")]
    Order,
    #[error("an indirect table that was not negotiated, is nested, or has an impossible size")]
    Indirect,
}

/// The buffers of one chain. A device keeps one value and walks each chain into it, so that walking allocates nothing
/// once the lists have grown.
#[derive(Default)]
pub struct ChainBuffers {
    readable: Vec<GuestRange>,
    /// How many of `readable` have been consumed.
    consumed: usize,
    writable: Vec<GuestRange>,
}

/// A table of descriptors: the queue's own, or an indirect one.
struct Table<'m> {
    address: GuestAddress,
    entries: u32,
    /// All of it, if it lies in one region of guest memory.
    slice: Option<VolatileSlice<'m>>,
}

impl<'m> Table<'m> {
    fn new(memory: &'m GuestMemory, address: GuestAddress, entries: u32) -> Self {
        let slice = memory::slice(memory, address, entries as usize * DESCRIPTOR_SIZE as usize);
        Self { address, entries, slice }
    }

    /// Copies a descriptor. The copy is checked and used, so it does not matter if the driver changes the descriptor later.
    fn read(&self, memory: &GuestMemory, index: u32) -> Result<Descriptor, ChainError> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        if let Some(slice) = &self.slice {
            return memory::load_from(slice, offset as usize).ok_or(ChainError::Table);
        }
        let address = self.address.0.checked_add(offset).ok_or(ChainError::Table)?;
        memory::load(memory, GuestAddress(address)).ok_or(ChainError::Table)
    }
}

impl ChainBuffers {
    /// Walks the chain that starts at descriptor `head`, which is below the queue's size. `indirect`: INDIRECT_DESC was
    /// negotiated.
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        queue: &Queue,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        waypoint!();
        self.readable.clear();
        self.consumed = 0;
        self.writable.clear();
        let mut table =
            Table::new(memory, GuestAddress(queue.desc_table()), u32::from(queue.size()));
        let mut nested = false;
        let mut index = u32::from(head);
        let mut left = CHAIN_MAX;
        loop {
            left = left.checked_sub(1).ok_or(ChainError::Endless)?;
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                // §2.7.5.3.1: an indirect table contains no other one, and ends the chain. The walk continues inside.
                let entries = descriptor.len() / DESCRIPTOR_SIZE;
                let whole = descriptor.len().is_multiple_of(DESCRIPTOR_SIZE)
                    && (1..=CHAIN_MAX).contains(&entries);
                if !indirect || nested || descriptor.has_next() || !whole {
                    return Err(ChainError::Indirect);
                }
                nested = true;
                table = Table::new(memory, descriptor.addr(), entries);
                index = 0;
                continue;
            }
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
            if index >= table.entries {
                return Err(ChainError::Next);
            }
        }
    }

    /// What is left of the device-readable buffers.
    pub fn readable(&self) -> &[GuestRange] {
        &self.readable[self.consumed..]
    }

    /// What is left of the device-writable buffers.
    pub fn writable(&self) -> &[GuestRange] {
        &self.writable
    }

    /// Reads the next device-readable bytes as a value and consumes them. `None`: the chain has fewer.
    pub(crate) fn read<T: ByteValued>(&mut self, memory: &GuestMemory) -> Option<T> {
        let size = size_of::<T>() as u32;
        if let Some(range) = self.readable.get_mut(self.consumed)
            && range.length >= size
        {
            // The usual case: the driver did not split the value.
            let value = memory::load(memory, range.address)?;
            range.address = GuestAddress(range.address.0 + u64::from(size));
            range.length -= size;
            self.consumed += usize::from(range.length == 0);
            return Some(value);
        }
        let mut value = T::zeroed();
        self.read_bytes(memory, value.as_mut_slice())?;
        Some(value)
    }

    /// Fills `bytes` with the next device-readable bytes and consumes them. `None`: the chain has fewer.
    pub(crate) fn read_bytes(&mut self, memory: &GuestMemory, bytes: &mut [u8]) -> Option<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let range = self.readable.get_mut(self.consumed)?;
            let part = (bytes.len() - filled).min(range.length as usize);
            memory.read_slice(&mut bytes[filled..filled + part], range.address).ok()?;
            filled += part;
            range.address = GuestAddress(range.address.0 + part as u64);
            range.length -= part as u32;
            if range.length == 0 {
                self.consumed += 1;
            }
        }
        Some(())
    }

    /// Removes the last device-writable byte and returns its address. `None`: nothing is writable.
    pub(crate) fn take_last_writable(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        last.length -= 1;
        let address = GuestAddress(last.address.0 + u64::from(last.length));
        if last.length == 0 {
            self.writable.pop();
        }
        Some(address)
    }

    fn add(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let range = GuestRange { address: descriptor.addr(), length: descriptor.len() };
        // §2.7.4.2: readable buffers come first.
        if !descriptor.is_write_only() && !self.writable.is_empty() {
            return Err(ChainError::Order);
        }
        if range.length == 0 {
            return Ok(());
        }
        if !memory::contains(memory, range.address, range.length) {
            return Err(ChainError::Buffer);
        }
        if descriptor.is_write_only() {
            self.writable.push(range);
        } else {
            self.readable.push(range);
        }
        Ok(())
    }
}

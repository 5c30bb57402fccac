//! Walks a descriptor chain (virtio 1.2 §2.7.5) into a list of guest ranges: what the device reads, and behind it what it
//! writes.
//!
//! The driver may split a request over descriptors wherever it likes (§2.7.4.1). So a device takes its header from the front of the
//! readable bytes and its status from the end of the writable ones. The list has one range for each descriptor that is not empty, but
//! only the check of SIZE_MAX uses that. Each descriptor is read once, and each range is checked against guest memory once. A chain has
//! at most [`CHAIN_MAX`] descriptors, so a hostile chain costs bounded time. Zero-length buffers are ignored.

pub(crate) mod ranges;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemoryRegion, VolatileSlice};

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
/// once the list has grown.
#[derive(Default)]
pub struct ChainBuffers {
    /// The readable ranges, and behind them the writable ones.
    ranges: Vec<GuestRange>,
    /// How many of the readable ranges have been consumed.
    consumed: usize,
    /// How many ranges are readable.
    readable: usize,
}

/// A table of descriptors: the queue's own, or an indirect one.
struct Table<'m> {
    memory: &'m GuestMemory,
    address: GuestAddress,
    entries: u32,
    /// As much of it as lies in the region of its address.
    slice: VolatileSlice<'m>,
    /// Where that region starts, and its length.
    region: (u64, u64),
}

impl<'m> Table<'m> {
    fn new(memory: &'m GuestMemory, address: GuestAddress, entries: u32) -> Option<Self> {
        let (region, offset) = memory::find(memory, address)?;
        let length = u64::from(entries * DESCRIPTOR_SIZE).min(region.len() - offset.0);
        let slice = region.get_slice(offset, length as usize).ok()?;
        let region = (region.start_addr().0, region.len());
        Some(Self { memory, address, entries, slice, region })
    }

    /// Copies a descriptor. The copy is checked and used, so it does not matter if the driver changes the descriptor later.
    fn read(&self, index: u16) -> Result<Descriptor, ChainError> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        match memory::load_from(&self.slice, offset as usize) {
            Some(descriptor) => Ok(descriptor),
            None if u32::from(index) >= self.entries => Err(ChainError::Next),
            None => {
                let address = self.address.checked_add(offset).ok_or(ChainError::Table)?;
                memory::load_parts(self.memory, address).ok_or(ChainError::Table)
            }
        }
    }

    /// Whether a range is guest memory. In a guest with one region, it is in that of the table.
    fn contains(&self, range: &GuestRange) -> bool {
        let (start, length) = self.region;
        let end = range.address.0.wrapping_sub(start).checked_add(range.length.into());
        end.is_some_and(|end| end <= length)
            || memory::contains(self.memory, range.address, range.length)
    }
}

impl ChainBuffers {
    /// Walks the chain that starts at descriptor `head`, which is below the queue's size. `indirect`: INDIRECT_DESC was
    /// negotiated. Out of line, so that the loop has all registers.
    #[inline(never)]
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        queue: &Queue,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        waypoint!();
        self.ranges.clear();
        (self.consumed, self.readable) = (0, 0);
        let table = Table::new(memory, GuestAddress(queue.desc_table()), queue.size().into());
        let mut table = table.ok_or(ChainError::Table)?;
        let (mut index, mut nested, mut left) = (head, false, CHAIN_MAX);
        loop {
            left = left.checked_sub(1).ok_or(ChainError::Endless)?;
            let descriptor = table.read(index)?;
            index = descriptor.next();
            if descriptor.refers_to_indirect_table() {
                // §2.7.5.3.1: an indirect table contains no other one, and ends the chain. The walk continues inside.
                let entries = descriptor.len() / DESCRIPTOR_SIZE;
                let whole = descriptor.len().is_multiple_of(DESCRIPTOR_SIZE)
                    && (1..=CHAIN_MAX).contains(&entries);
                if !indirect || nested || descriptor.has_next() || !whole {
                    return Err(ChainError::Indirect);
                }
                table = Table::new(memory, descriptor.addr(), entries).ok_or(ChainError::Table)?;
                (index, nested) = (0, true);
                continue;
            }
            let range = GuestRange { address: descriptor.addr(), length: descriptor.len() };
            let is_writable = descriptor.is_write_only();
            // §2.7.4.2: readable buffers come first.
            if !is_writable && self.readable < self.ranges.len() {
                return Err(ChainError::Order);
            }
            if range.length > 0 {
                if !table.contains(&range) {
                    return Err(ChainError::Buffer);
                }
                self.ranges.push(range);
                self.readable += usize::from(!is_writable);
            }
            if !descriptor.has_next() {
                return Ok(());
            }
        }
    }

    /// What is left of the device-readable buffers.
    pub fn readable(&self) -> &[GuestRange] {
        &self.ranges[self.consumed..self.readable]
    }

    /// What is left of the device-writable buffers.
    pub fn writable(&self) -> &[GuestRange] {
        &self.ranges[self.readable..]
    }

    fn next_readable(&self) -> Option<&GuestRange> {
        if self.consumed == self.readable { None } else { self.ranges.get(self.consumed) }
    }

    /// Reads the next device-readable bytes as a value and consumes them. `None`: the chain has fewer.
    pub(crate) fn read<T: ByteValued>(&mut self, memory: &GuestMemory) -> Option<T> {
        let size = size_of::<T>() as u32;
        if self.next_readable()?.length < size {
            return self.read_split(memory);
        }
        let value = memory::load(memory, self.next_readable()?.address)?;
        self.consume(size);
        Some(value)
    }

    #[cold]
    #[inline(never)]
    fn read_split<T: ByteValued>(&mut self, memory: &GuestMemory) -> Option<T> {
        let mut value = T::zeroed();
        self.read_bytes(memory, value.as_mut_slice())?;
        Some(value)
    }

    /// Fills `bytes` with the next device-readable bytes and consumes them. `None`: the chain has fewer.
    pub(crate) fn read_bytes(&mut self, memory: &GuestMemory, bytes: &mut [u8]) -> Option<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let range = self.next_readable()?;
            let part = (bytes.len() - filled).min(range.length as usize);
            memory.read_slice(&mut bytes[filled..filled + part], range.address).ok()?;
            filled += part;
            self.consume(part as u32);
        }
        Some(())
    }

    /// Consumes the next `count` device-readable bytes, which are in one range.
    fn consume(&mut self, count: u32) {
        let range = &mut self.ranges[self.consumed];
        range.address = GuestAddress(range.address.0 + u64::from(count));
        range.length -= count;
        self.consumed += usize::from(range.length == 0);
    }

    /// Removes the last device-writable byte and returns its address. `None`: nothing is writable.
    pub(crate) fn take_last_writable(&mut self) -> Option<GuestAddress> {
        self.writable().last()?;
        let last = self.ranges.last_mut()?;
        last.length -= 1;
        let address = GuestAddress(last.address.0 + u64::from(last.length));
        if last.length == 0 {
            self.ranges.pop();
        }
        Some(address)
    }
}

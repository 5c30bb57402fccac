//! The guest's side, played by the test: memory, rings, requests, and the interrupt line.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::irq::InterruptLine;
use crate::virtio::device::ActiveQueue;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::spec::blk;

/// Bytes of guest memory, unless the test wants less.
pub(super) const MEMORY: u64 = 8 << 20;
/// Rings live below this address, buffers above it.
pub(super) const BUFFERS: u64 = 1 << 18;
const RING_STRIDE: u64 = 0x8000;
pub(super) use crate::virtio::spec::ring::{
    DESC_F_INDIRECT as INDIRECT, DESC_F_NEXT as NEXT, DESC_F_WRITE as WRITE,
};
/// What a status byte holds before the device writes it.
pub(super) const UNTOUCHED: u8 = 0xa5;

/// An interrupt line that counts.
#[derive(Default)]
pub(super) struct Line {
    count: Mutex<u32>,
    raised: Condvar,
}

impl InterruptLine for Line {
    fn pulse(&self) -> std::io::Result<()> {
        *self.count.lock().unwrap() += 1;
        self.raised.notify_all();
        Ok(())
    }
}

impl Line {
    pub(super) fn count(&self) -> u32 {
        *self.count.lock().unwrap()
    }

    /// Waits until the line was raised `count` times altogether.
    pub(super) fn wait(&self, count: u32) {
        drop(self.raised.wait_while(self.count.lock().unwrap(), |raised| *raised < count).unwrap());
    }
}

/// A buffer of a request: where, how long, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) writable: bool,
}

/// A request that was put on the ring.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub(super) head: u16,
    pub(super) data: Range<u64>,
    pub(super) status: u64,
}

/// One driver with its rings.
pub(super) struct Driver {
    pub(super) memory: GuestMemory,
    pub(super) line: Arc<Line>,
    pub(super) interrupt: Interrupt,
    rings: Vec<DriverRing>,
    next_buffer: u64,
    /// Where memory ends.
    end: u64,
}

struct DriverRing {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    available_index: u16,
    used_index: u16,
    kick: EventFd,
}

impl Driver {
    pub(super) fn new(queues: u16, size: u16) -> Self {
        Self::with_memory(queues, size, MEMORY)
    }

    /// As `new`, with that many bytes of memory.
    pub(super) fn with_memory(queues: u16, size: u16, bytes: u64) -> Self {
        let line = Arc::new(Line::default());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
        let rings = (0..queues)
            .map(|index| {
                let base = 0x1_0000 + u64::from(index) * RING_STRIDE;
                DriverRing {
                    size,
                    descriptors: base,
                    available: base + 0x4000,
                    used: base + 0x5000,
                    next_descriptor: 0,
                    available_index: 0,
                    used_index: 0,
                    kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap(),
                }
            })
            .collect();
        let interrupt = Interrupt::new(Arc::clone(&line) as Arc<dyn InterruptLine>).unwrap();
        Self { memory, end: bytes, interrupt, line, rings, next_buffer: BUFFERS }
    }

    /// Forgets everything that is on the ring, as a driver does around a reset.
    pub(super) fn reset_ring(&mut self, ring: usize) {
        let ring = &mut self.rings[ring];
        (ring.next_descriptor, ring.available_index, ring.used_index) = (0, 0, 0);
        let zeroes = [0; 0x2000];
        self.memory.write_slice(&zeroes, GuestAddress(ring.available)).unwrap();
    }

    /// The queue as the transport hands it to the device.
    pub(super) fn active(&self, index: u16) -> ActiveQueue {
        let ring = &self.rings[usize::from(index)];
        let mut queue = Queue::new(1024).unwrap();
        queue.try_set_size(ring.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(ring.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(ring.available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(ring.used)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue {
            index,
            queue,
            kick: Arc::new(ring.kick.try_clone().unwrap()),
            restored: false,
        }
    }

    pub(super) fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).unwrap();
    }

    /// Fresh memory for a buffer of `length` bytes.
    pub(super) fn allocate(&mut self, length: u64) -> u64 {
        // Wraps around when it reaches the end: tests keep fewer buffers alive than fit.
        if self.next_buffer + length > self.end {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer += length;
        address
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(range.start)).unwrap();
        bytes
    }

    /// A readable buffer with this content.
    pub(super) fn readable(&mut self, content: &[u8]) -> Buffer {
        let address = self.allocate(content.len() as u64);
        self.write(address, content);
        Buffer { address, length: content.len() as u32, writable: false }
    }

    /// A writable buffer, filled with `UNTOUCHED`.
    pub(super) fn writable(&mut self, length: u32) -> Buffer {
        let address = self.allocate(u64::from(length));
        self.write(address, &vec![UNTOUCHED; length as usize]);
        Buffer { address, length, writable: true }
    }

    pub(super) fn header(&mut self, request_type: u32, sector: u64) -> Buffer {
        let mut header = [0; blk::HEADER_SIZE];
        header[..4].copy_from_slice(&request_type.to_le_bytes());
        header[blk::HEADER_SECTOR..].copy_from_slice(&sector.to_le_bytes());
        self.readable(&header)
    }

    /// Writes one descriptor into the ring's table.
    pub(super) fn set_descriptor(&self, ring: usize, index: u16, descriptor: Descriptor) {
        let address = self.rings[ring].descriptors + 16 * u64::from(index);
        self.memory.write_obj(descriptor, GuestAddress(address)).unwrap();
    }

    /// Chains the buffers with direct descriptors and returns the head.
    pub(super) fn chain(&mut self, ring: usize, buffers: &[Buffer]) -> u16 {
        let size = self.rings[ring].size;
        let head = self.rings[ring].next_descriptor;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.rings[ring].next_descriptor;
            let next = (index + 1) % size;
            let more = if position + 1 < buffers.len() { NEXT } else { 0 };
            self.set_descriptor(ring, index, describe(buffer, more, next));
            self.rings[ring].next_descriptor = next;
        }
        head
    }

    /// Chains the buffers through an indirect table and returns the head.
    pub(super) fn indirect_chain(&mut self, ring: usize, buffers: &[Buffer]) -> u16 {
        self.mixed_chain(ring, buffers, 0)
    }

    /// Chains the first `direct` buffers, and the rest through an indirect table at the end.
    pub(super) fn mixed_chain(&mut self, ring: usize, buffers: &[Buffer], direct: usize) -> u16 {
        let (outside, inside) = buffers.split_at(direct);
        let table = self.allocate(16 * inside.len() as u64 + 16).next_multiple_of(16);
        for (position, buffer) in inside.iter().enumerate() {
            let more = if position + 1 < inside.len() { NEXT } else { 0 };
            let descriptor = describe(buffer, more, position as u16 + 1);
            self.memory.write_obj(descriptor, GuestAddress(table + 16 * position as u64)).unwrap();
        }
        let size = self.rings[ring].size;
        let head = self.rings[ring].next_descriptor;
        let mut index = head;
        for buffer in outside {
            self.set_descriptor(ring, index, describe(buffer, NEXT, (index + 1) % size));
            index = (index + 1) % size;
        }
        self.set_descriptor(
            ring,
            index,
            Descriptor::new(table, 16 * inside.len() as u32, INDIRECT, 0),
        );
        self.rings[ring].next_descriptor = (index + 1) % size;
        head
    }

    /// Makes a chain available.
    pub(super) fn publish(&mut self, ring: usize, head: u16) {
        let ring = &mut self.rings[ring];
        let slot = ring.available + 4 + 2 * u64::from(ring.available_index % ring.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available_index = ring.available_index.wrapping_add(1);
        self.memory
            .store(ring.available_index, GuestAddress(ring.available + 2), Ordering::Release)
            .unwrap();
    }

    /// Sends header, data and status as three buffers (two without data).
    pub(super) fn send(
        &mut self,
        ring: usize,
        request_type: u32,
        sector: u64,
        data: Option<Buffer>,
    ) -> Sent {
        let header = self.header(request_type, sector);
        let status = self.writable(1);
        let buffers: Vec<_> = [Some(header), data, Some(status)].into_iter().flatten().collect();
        let head = self.chain(ring, &buffers);
        self.publish(ring, head);
        let data = data.map_or(0..0, |data| data.address..data.address + u64::from(data.length));
        Sent { head, data, status: status.address }
    }

    pub(super) fn send_read(&mut self, ring: usize, sector: u64, length: u32) -> Sent {
        let data = self.writable(length);
        self.send(ring, blk::T_IN, sector, Some(data))
    }

    pub(super) fn send_write(&mut self, ring: usize, sector: u64, content: &[u8]) -> Sent {
        let data = self.readable(content);
        self.send(ring, blk::T_OUT, sector, Some(data))
    }

    pub(super) fn send_flush(&mut self, ring: usize) -> Sent {
        self.send(ring, blk::T_FLUSH, 0, None)
    }

    /// Used elements that the driver has not seen yet: descriptor and length.
    pub(super) fn used(&mut self, ring: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[ring];
        let index: u16 = self.memory.load(GuestAddress(ring.used + 2), Ordering::Acquire).unwrap();
        let mut elements = Vec::new();
        while ring.used_index != index {
            let element = ring.used + 4 + 8 * u64::from(ring.used_index % ring.size);
            let id: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
            elements.push((u16::try_from(id).unwrap(), length));
            ring.used_index = ring.used_index.wrapping_add(1);
        }
        elements
    }

    pub(super) fn status(&self, sent: &Sent) -> u8 {
        self.memory.read_obj(GuestAddress(sent.status)).unwrap()
    }

    pub(super) fn data(&self, sent: &Sent) -> Vec<u8> {
        self.read(sent.data.clone())
    }

    /// NO_INTERRUPT in the available ring's flags.
    pub(super) fn set_available_flags(&self, ring: usize, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.rings[ring].available)).unwrap();
    }

    /// With EVENT_IDX: interrupt once the used index passes `index`.
    pub(super) fn set_used_event(&self, ring: usize, index: u16) {
        let ring = &self.rings[ring];
        self.memory
            .write_obj(index, GuestAddress(ring.available + 4 + 2 * u64::from(ring.size)))
            .unwrap();
    }

    /// With EVENT_IDX: kick once the available index passes this.
    pub(super) fn available_event(&self, ring: usize) -> u16 {
        let ring = &self.rings[ring];
        self.memory.read_obj(GuestAddress(ring.used + 4 + 8 * u64::from(ring.size))).unwrap()
    }

    /// Makes the available index something else than the driver's own count.
    pub(super) fn set_available_index(&self, ring: usize, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.rings[ring].available + 2)).unwrap();
    }
}

/// A flush that waits in the descriptor table, to be made available by another thread or in the middle of something.
pub(super) struct Late {
    memory: GuestMemory,
    available: u64,
    size: u16,
    head: u16,
}

impl Driver {
    pub(super) fn late_flush(&mut self, ring: usize) -> Late {
        let header = self.header(blk::T_FLUSH, 0);
        let status = self.writable(1);
        let head = self.chain(ring, &[header, status]);
        let ring = &mut self.rings[ring];
        // The driver's own count stays behind; it sends nothing else on this ring.
        Late { memory: self.memory.clone(), available: ring.available, size: ring.size, head }
    }
}

impl Late {
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Makes it available once more.
    pub(super) fn publish(&mut self) {
        let index: u16 =
            self.memory.load(GuestAddress(self.available + 2), Ordering::Relaxed).unwrap();
        let slot = self.available + 4 + 2 * u64::from(index % self.size);
        self.memory.write_obj(self.head, GuestAddress(slot)).unwrap();
        self.memory
            .store(index.wrapping_add(1), GuestAddress(self.available + 2), Ordering::Release)
            .unwrap();
    }
}

pub(super) fn describe(buffer: &Buffer, flags: u16, next: u16) -> Descriptor {
    let direction = if buffer.writable { WRITE } else { 0 };
    Descriptor::new(buffer.address, buffer.length, direction | flags, next)
}

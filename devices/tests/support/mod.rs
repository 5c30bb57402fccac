//! A driver that keeps a queue busy without allocating anything: one fixed chain a slot, made available again and again.

#![allow(dead_code, reason = "each of the programs that share this file uses a part of it")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use devices::GuestMemory;
use devices::block::{BlockDevice, BlockHandle, BlockOptions};
use devices::disk::Disk;
use devices::irq::InterruptLine;
use devices::spawn::DiskThreads;
use devices::virtio::device::{Activation, ActiveQueue, VirtioDevice};
use devices::virtio::interrupt::Interrupt;
use devices::virtio::spec::blk;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
const HEADERS: u64 = 0xc000;
const STATUSES: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const SIZE: u16 = 256;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An interrupt line that counts.
#[derive(Default)]
struct Line(AtomicU64);

impl InterruptLine for Line {
    fn pulse(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A device at work for a driver that polls.
pub(crate) struct Load {
    device: BlockDevice,
    memory: GuestMemory,
    kick: EventFd,
    /// Kicks sent.
    pub(crate) kicks: u64,
    available: u16,
    used: u16,
}

impl Load {
    /// Starts a device on `disk` for up to 64 requests of up to `data` bytes each.
    pub(crate) fn new(disk: Arc<dyn Disk>, data: u32) -> Self {
        Self::with(disk, data, |_| {})
    }

    /// As `new`, with other options.
    pub(crate) fn with(
        disk: Arc<dyn Disk>,
        data: u32,
        change: impl FnOnce(&mut BlockOptions),
    ) -> Self {
        let mut options = BlockOptions::new("vda");
        change(&mut options);
        let bytes = DATA as usize + 64 * data as usize;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let (events, threads) = (Arc::new(|event| panic!("{event:?}")), DiskThreads::default());
        let mut device = BlockDevice::new(options, disk, &memory, events, &threads).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let interrupt = Interrupt::new(Arc::new(Line::default())).unwrap();
        let kick_of_queue = kick.try_clone().unwrap();
        let queues =
            vec![ActiveQueue { index: 0, queue, kick: Arc::new(kick_of_queue), restored: false }];
        let features = device.features();
        device.start(Activation { memory: memory.clone(), features, queues, interrupt }).unwrap();
        let mut load = Self { device, memory, kick, kicks: 0, available: 0, used: 0 };
        for slot in 0..64 {
            load.prepare(slot, data, false);
        }
        // A used event that is never reached: no interrupts.
        load.store(AVAILABLE + 4 + 2 * u64::from(SIZE), u16::MAX / 2);
        load
    }

    pub(crate) fn handle(&self) -> BlockHandle {
        self.device.handle()
    }

    /// Lays out the chain of `slot`, for a read or a write of `length` bytes.
    pub(crate) fn prepare(&mut self, slot: u16, length: u32, write: bool) {
        let at = u64::from(slot);
        let direction = if write { 0 } else { WRITE };
        let first = slot * 3;
        let chain = [
            Descriptor::new(HEADERS + 16 * at, 16, NEXT, first + 1),
            Descriptor::new(DATA + u64::from(length) * at, length, NEXT | direction, first + 2),
            Descriptor::new(STATUSES + at, 1, WRITE, 0),
        ];
        for (descriptor, index) in chain.into_iter().zip(u64::from(first)..) {
            self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * index)).unwrap();
        }
        let request_type = if write { blk::T_OUT } else { blk::T_IN };
        self.memory.write_obj(request_type, GuestAddress(HEADERS + 16 * at)).unwrap();
    }

    /// Puts the request of `slot`, at `sector`, on the ring.
    fn push(&mut self, slot: u16, sector: u64) {
        self.memory.write_obj(sector, GuestAddress(HEADERS + 16 * u64::from(slot) + 8)).unwrap();
        self.store(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE), slot * 3);
        self.available = self.available.wrapping_add(1);
    }

    /// Makes the `count` requests pushed last available, and kicks if the device wants to be.
    fn submit(&mut self, count: u16) {
        let old = self.available.wrapping_sub(count);
        self.memory.store(self.available, GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + 8 * u64::from(SIZE));
        // virtio 1.2 §2.7.10: did the index pass the event?
        if self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old) {
            self.kicks += 1;
            self.kick.write(1).unwrap();
        }
        // The used event stays half the index space ahead.
        self.store(AVAILABLE + 4 + 2 * u64::from(SIZE), self.used.wrapping_add(u16::MAX / 2));
    }

    /// The next answered request's slot, if there is one. Panics when it failed.
    fn poll(&mut self) -> Option<u16> {
        let index: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let head: u32 =
            self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(self.used % SIZE))).unwrap();
        self.used = self.used.wrapping_add(1);
        let slot = (head / 3) as u16;
        let status: u8 = self.memory.read_obj(GuestAddress(STATUSES + u64::from(slot))).unwrap();
        assert_eq!(status, blk::S_OK);
        Some(slot)
    }

    /// Keeps `depth` requests in flight until `count` are done; `sector` names the place of the next.
    pub(crate) fn run(&mut self, depth: u16, count: u64, mut sector: impl FnMut() -> u64) {
        let (mut sent, mut done) = (0, 0);
        self.send(0..depth, &mut sector);
        sent += u64::from(depth);
        while done < count {
            let mut batch = 0;
            while let Some(slot) = self.poll() {
                done += 1;
                if sent < count {
                    self.push(slot, sector());
                    (sent, batch) = (sent + 1, batch + 1);
                }
            }
            if batch > 0 {
                self.submit(batch);
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Sends a request for each of `slots`, and makes them available together.
    pub(crate) fn send(&mut self, slots: std::ops::Range<u16>, mut sector: impl FnMut() -> u64) {
        let count = slots.len() as u16;
        slots.for_each(|slot| self.push(slot, sector()));
        self.submit(count);
    }

    /// Waits for `count` answers.
    pub(crate) fn wait(&mut self, count: u16) {
        for _ in 0..count {
            while self.poll().is_none() {
                std::thread::yield_now();
            }
        }
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

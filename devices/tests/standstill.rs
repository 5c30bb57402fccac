//! A guest that asks for a tebibyte at once cannot hold up a pause, a reset or the end.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::block::{BlockDevice, BlockOptions};
use devices::disk::{self, Aio, OpenOptions};
use devices::irq::InterruptLine;
use devices::spawn::DiskThreads;
use devices::virtio::device::{Activation, ActiveQueue, VirtioDevice};
use devices::virtio::interrupt::Interrupt;
use devices::virtio::spec::{blk, ring};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const HEADER: u64 = 0x6000;
const STATUS: u64 = 0x6100;
/// One indirect table, which all requests share.
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const QUEUE_SIZE: u16 = 256;
/// Each request reads the same 16 MiB of memory 255 times: 4080 MiB.
const BUFFER: u32 = 16 << 20;
const BUFFERS: u16 = 255;

/// A standstill takes a small part of this, on the most loaded of hosts. All that the guest asks for takes minutes.
const BOUND: Duration = Duration::from_secs(60);

struct Line;

impl InterruptLine for Line {
    fn pulse(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A device whose guest has just posted 256 reads of 4080 MiB.
fn device_under_load(aio: Aio) -> (BlockDevice, tempfile::NamedTempFile) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(u64::from(BUFFER) * u64::from(BUFFERS)).unwrap();
    let disk = disk::open(&OpenOptions { aio, ..OpenOptions::new(image.path()) }).unwrap();
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), DATA as usize + BUFFER as usize)]).unwrap();
    let (options, threads) = (BlockOptions::new("vda"), DiskThreads::default());
    let mut device = BlockDevice::new(options, disk, &memory, Arc::new(|_| {}), &threads).unwrap();
    let write = |address: u64, descriptor| {
        memory.write_obj::<Descriptor>(descriptor, GuestAddress(address)).unwrap();
    };
    write(TABLE, Descriptor::new(HEADER, 16, ring::DESC_F_NEXT, 1));
    for index in 1..=BUFFERS {
        let flags = ring::DESC_F_NEXT | ring::DESC_F_WRITE;
        write(TABLE + 16 * u64::from(index), Descriptor::new(DATA, BUFFER, flags, index + 1));
    }
    let last = TABLE + 16 * u64::from(BUFFERS + 1);
    write(last, Descriptor::new(STATUS, 1, ring::DESC_F_WRITE, 0));
    memory.write_obj(blk::T_IN, GuestAddress(HEADER)).unwrap();
    for head in 0..QUEUE_SIZE {
        let length = 16 * (u32::from(BUFFERS) + 2);
        let descriptor = Descriptor::new(TABLE, length, ring::DESC_F_INDIRECT, 0);
        write(DESCRIPTORS + 16 * u64::from(head), descriptor);
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(head))).unwrap();
    }
    memory.write_obj(QUEUE_SIZE, GuestAddress(AVAILABLE + 2)).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let queues = vec![ActiveQueue { index: 0, queue, kick: Arc::new(kick), restored: false }];
    // Without SIZE_MAX a buffer may be as long as the driver likes.
    let features = device.features() & !blk::F_SIZE_MAX;
    let interrupt = Interrupt::new(Arc::new(Line)).unwrap();
    device.start(Activation { memory, features, queues, interrupt }).unwrap();
    (device, image)
}

#[test]
fn a_tebibyte_of_reads_holds_up_neither_pause_nor_reset() {
    for aio in [Aio::IoUring, Aio::Threads] {
        let (device, _image) = device_under_load(aio);
        let handle = device.handle();
        let begin = Instant::now();
        assert!(handle.pause().wait(BOUND), "{aio}: a pause waits for all requests");
        println!("{aio}: paused after {:?}", begin.elapsed());
        assert!(!handle.queues()[0].stopped.is_empty());

        let (mut device, _image) = device_under_load(aio);
        let begin = Instant::now();
        assert!(device.reset().wait(BOUND), "{aio}: a reset waits for all requests");
        println!("{aio}: reset after {:?}", begin.elapsed());
    }
}

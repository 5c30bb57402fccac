//! Plays the driver for one write, from the ring to the file: the program at the end of `docs/follow-one-write.md`.

#![expect(clippy::unwrap_used, reason = "an example that cannot run has nothing better to do")]

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

use devices::GuestMemory;
use devices::block::{BlockDevice, BlockOptions};
use devices::disk::{self, OpenOptions};
use devices::irq::InterruptLine;
use devices::spawn::DiskThreads;
use devices::virtio::device::{Activation, ActiveQueue, VirtioDevice};
use devices::virtio::interrupt::Interrupt;
use devices::virtio::spec::blk;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

// The three parts of a split queue (virtio 1.2 §2.7), and the request's three pieces.
const DESCRIPTORS: GuestAddress = GuestAddress(0x1000);
const AVAILABLE: GuestAddress = GuestAddress(0x2000);
const USED: GuestAddress = GuestAddress(0x3000);
const HEADER: GuestAddress = GuestAddress(0x4000);
const DATA: GuestAddress = GuestAddress(0x5000);
const STATUS: GuestAddress = GuestAddress(0x6000);
/// Descriptor flags (§2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An interrupt line that tells a waiting thread.
struct Line(mpsc::Sender<()>, AtomicU32);

impl InterruptLine for Line {
    fn pulse(&self) -> std::io::Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.send(()).map_err(std::io::Error::other)
    }
}

/// One write, and what there is to see of it.
pub(crate) fn follow() -> Vec<String> {
    let mut seen = Vec::new();

    // What `vmm` prepares: the image, the device, guest memory, an eventfd for kicks and a line for interrupts.
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = disk::open(&OpenOptions::new(image.path())).unwrap();
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (options, threads) = (BlockOptions::new("vda"), DiskThreads::default());
    let events = Arc::new(|event| eprintln!("{event:?}"));
    let mut device = BlockDevice::new(options, disk, &memory, events, &threads).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let (raised, interrupts) = mpsc::channel();
    let line = Arc::new(Line(raised, AtomicU32::new(0)));

    // What the transport does at DRIVER_OK.
    let mut queue = Queue::new(256).unwrap();
    queue.try_set_desc_table_address(DESCRIPTORS).unwrap();
    queue.try_set_avail_ring_address(AVAILABLE).unwrap();
    queue.try_set_used_ring_address(USED).unwrap();
    queue.set_ready(true);
    let kick_of_queue = kick.try_clone().unwrap();
    let queues =
        vec![ActiveQueue { index: 0, queue, kick: Arc::new(kick_of_queue), restored: false }];
    let interrupt = Interrupt::new(Arc::clone(&line) as Arc<dyn InterruptLine>).unwrap();
    device
        .start(Activation { memory: memory.clone(), features: blk::F_FLUSH, queues, interrupt })
        .unwrap();

    // The disk's thread answers once it has the queue: the kick will find it asleep.
    assert_eq!(device.handle().queues().len(), 1);

    // What a driver does: a request in three pieces, a chain of three descriptors, its head in the available ring.
    memory.write_obj(blk::T_OUT.to_le(), HEADER).unwrap();
    memory.write_obj(3_u64.to_le(), GuestAddress(HEADER.0 + blk::HEADER_SECTOR as u64)).unwrap();
    memory.write_slice(&[7; 512], DATA).unwrap();
    memory.write_obj(0xff_u8, STATUS).unwrap();
    let chain = [
        Descriptor::new(HEADER.0, blk::HEADER_SIZE as u32, NEXT, 1),
        Descriptor::new(DATA.0, 512, NEXT, 2),
        Descriptor::new(STATUS.0, 1, WRITE, 0),
    ];
    for (descriptor, index) in chain.into_iter().zip(0..) {
        memory.write_obj(descriptor, GuestAddress(DESCRIPTORS.0 + 16 * index)).unwrap();
    }
    memory.write_obj(0_u16.to_le(), GuestAddress(AVAILABLE.0 + 4)).unwrap();
    memory.store(1_u16.to_le(), GuestAddress(AVAILABLE.0 + 2), Ordering::Release).unwrap();
    seen.push(
        "driver: OUT at sector 3, 512 bytes; descriptors 0 -> 1 -> 2; available index 1".to_owned(),
    );
    tracing::trace!(target: "waypoint", "the driver kicks");
    kick.write(1).unwrap();

    // What it sees once the interrupt comes.
    interrupts.recv().unwrap();
    tracing::trace!(target: "waypoint", "the driver was interrupted");
    let index: u16 = memory.load(GuestAddress(USED.0 + 2), Ordering::Acquire).unwrap();
    let [head, length]: [u32; 2] = memory.read_obj(GuestAddress(USED.0 + 4)).unwrap();
    let status: u8 = memory.read_obj(STATUS).unwrap();
    seen.push(format!(
        "device: used index {index}: head {head}, {length} byte written, status {status}"
    ));
    seen.push(format!("line:   raised {} time", line.1.load(Ordering::Relaxed)));
    let mut sector = [0; 512];
    image.as_file().read_exact_at(&mut sector, 3 * 512).unwrap();
    seen.push(format!("file:   bytes 1536..2048 are all 7: {}", sector == [7; 512]));
    device.reset();
    seen
}

fn main() {
    follow().iter().for_each(|line| println!("{line}"));
}

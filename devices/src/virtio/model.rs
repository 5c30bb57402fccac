//! What driver and device share without a lock, in every order that the memory model allows: kick and interrupt suppression, and
//! the register page. `make model` runs this. Loom replaces the atomics, and plays each interleaving of two threads.
//!
//! What loom cannot see: the rings' entries and chains are ordinary memory, which the indices publish.
#![cfg(loom)]

use std::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release, SeqCst};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, AtomicU32, fence};
use loom::thread;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

pub(crate) use super::queue::memory::{load, store};
use super::queue::{SplitQueue, memory};
use super::registers::{CONFIG_SIZE, RegisterPage};
use super::spec::mmio::{CONFIG_OFFSET, INTERRUPT_USED_BUFFER, Register};
use super::spec::ring;
use crate::GuestMemory;
use crate::clock::Instant;

const SIZE: u16 = 4;
const AVAILABLE: u64 = 0x40;
const USED: u64 = 0x80;
/// Requests in a model: the second one meets a device that is about to sleep.
const REQUESTS: u16 = 2;
const STACK_WORDS: usize = 1 << 17;

loom::lazy_static! {
    /// The words of guest memory that are accessed atomically, by address.
    static ref WORDS: Vec<AtomicU16> = (0..0x60).map(|_| AtomicU16::new(0)).collect();
}

/// What stands for `queue::memory::load_atomic`.
pub(crate) fn load_atomic(
    memory: &GuestMemory,
    address: GuestAddress,
    order: Ordering,
) -> Option<u16> {
    memory::load_atomic::<u16>(memory, address, order)?;
    Some(word(address).load(order))
}

/// What stands for `queue::memory::store_atomic`.
pub(crate) fn store_atomic(
    memory: &GuestMemory,
    address: GuestAddress,
    value: u16,
    order: Ordering,
) -> Option<()> {
    word(address).store(value, order);
    memory::store_atomic(memory, address, value, order)
}

/// The word at `address`.
fn word(address: GuestAddress) -> &'static AtomicU16 {
    &WORDS[address.0 as usize / 2]
}

/// Plays each interleaving of `body` and the threads that it starts. A register page in a debug build takes more stack than loom
/// gives the first thread.
fn model(body: impl Fn() + Sync + Send + Clone + 'static) {
    loom::model(move || {
        let thread = thread::Builder::new().stack_size(STACK_WORDS).spawn(body.clone());
        thread.unwrap().join().unwrap();
    });
}

fn available_index() -> &'static AtomicU16 {
    word(GuestAddress(AVAILABLE + ring::IDX))
}

fn used_index() -> &'static AtomicU16 {
    word(GuestAddress(USED + ring::IDX))
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
}

fn queue(event_index: bool) -> SplitQueue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    SplitQueue::new(queue, event_index, false)
}

/// What one side waits for, as an eventfd counts it.
#[derive(Clone)]
struct Wake(Arc<AtomicU32>);

impl Wake {
    fn new() -> Self {
        Self(Arc::new(AtomicU32::new(0)))
    }

    fn wake(&self) {
        self.0.fetch_add(1, AcqRel);
    }

    fn count(&self) -> u32 {
        self.0.load(Acquire)
    }
}

/// The driver makes chain `number` available, and kicks if the device wants that (virtio 1.2 §2.7.13, §2.7.10).
fn submit(memory: &GuestMemory, number: u16, event_index: bool, kick: &Wake) {
    let entry = AVAILABLE + ring::ELEMENTS + ring::AVAILABLE_ELEMENT * u64::from(number % SIZE);
    memory::store(memory, GuestAddress(entry), number % SIZE).unwrap();
    available_index().store(number + 1, Release);
    fence(SeqCst);
    let wanted = if event_index {
        let event = word(GuestAddress(USED + ring::avail_event(SIZE))).load(Relaxed);
        (number + 1).wrapping_sub(event).wrapping_sub(1) < 1
    } else {
        word(GuestAddress(USED)).load(Relaxed) & ring::USED_F_NO_NOTIFY == 0
    };
    if wanted {
        kick.wake();
    }
}

/// As a worker serves a queue after a kick: until nothing is left and notifications are enabled.
fn serve(queue: &mut SplitQueue, memory: &GuestMemory) -> u16 {
    let mut served = 0;
    loop {
        queue.disable_notifications(memory).unwrap();
        for _ in 0..queue.available(memory).unwrap() {
            let chain = queue.pop(memory).unwrap();
            queue.complete(memory, chain, 0).unwrap();
            served += 1;
        }
        if !queue.enable_notifications(memory).unwrap() {
            return served;
        }
    }
}

fn no_kick_is_lost(event_index: bool) {
    let memory = memory();
    loom::model(move || {
        let kick = Wake::new();
        let driver = {
            let (kick, memory) = (kick.clone(), memory.clone());
            thread::spawn(move || {
                (0..REQUESTS).for_each(|number| submit(&memory, number, event_index, &kick));
            })
        };
        let mut queue = queue(event_index);
        let (mut served, mut seen) = (0, 0);
        // At the start, and after a kick.
        for _ in 0..2 {
            seen = kick.count();
            served += serve(&mut queue, &memory);
        }
        driver.join().unwrap();
        assert!(served == REQUESTS || kick.count() != seen, "the device sleeps, and chains wait");
    });
}

#[test]
fn no_kick_is_lost_with_flags() {
    no_kick_is_lost(false);
}

#[test]
fn no_kick_is_lost_with_event_indices() {
    no_kick_is_lost(true);
}

/// As Linux's interrupt handler: takes what is there, asks for the next interrupt, and looks once more.
fn handle(seen: &mut u16, event_index: bool) {
    loop {
        *seen = used_index().load(Acquire);
        if event_index {
            word(GuestAddress(AVAILABLE + ring::used_event(SIZE))).store(*seen, Relaxed);
        } else {
            word(GuestAddress(AVAILABLE)).store(0, Relaxed);
        }
        fence(SeqCst);
        if used_index().load(Acquire) == *seen {
            return;
        }
        if !event_index {
            word(GuestAddress(AVAILABLE)).store(ring::AVAIL_F_NO_INTERRUPT, Relaxed);
        }
    }
}

fn no_interrupt_is_lost(event_index: bool) {
    let memory = memory();
    loom::model(move || {
        let line = Wake::new();
        for number in 0..REQUESTS {
            submit(&memory, number, event_index, &Wake::new());
        }
        let device = {
            let (line, memory) = (line.clone(), memory.clone());
            thread::spawn(move || {
                let mut queue = queue(event_index);
                for _ in 0..REQUESTS {
                    let chain = queue.pop(&memory).unwrap();
                    queue.complete(&memory, chain, 0).unwrap();
                    queue.publish(&memory, Instant::now());
                    if queue.take_interrupt() {
                        line.wake();
                    }
                }
            })
        };
        let (mut seen, mut interrupts) = (0, 0);
        for _ in 0..2 {
            interrupts = line.count();
            handle(&mut seen, event_index);
        }
        device.join().unwrap();
        assert!(seen == REQUESTS || line.count() != interrupts, "the driver sleeps, answers wait");
    });
}

#[test]
fn no_interrupt_is_lost_with_flags() {
    no_interrupt_is_lost(false);
}

#[test]
fn no_interrupt_is_lost_with_event_indices() {
    no_interrupt_is_lost(true);
}

/// A driver that reads a field in two halves around a change finds out by the generation. If all of its attempt falls between two stores,
/// the interrupt that follows makes it read again.
#[test]
fn a_torn_configuration_is_noticed() {
    model(|| {
        let page = Arc::new(RegisterPage::default());
        let device = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                page.set_config(&[0xff; CONFIG_SIZE]);
                page.set(Register::InterruptStatus, 2);
            })
        };
        let half = |at: u64| {
            let mut data = [0; 4];
            page.read(CONFIG_OFFSET + at, &mut data);
            data
        };
        let attempt = || {
            let before = page.load(Register::ConfigGeneration);
            let halves = (half(0), half(4));
            (before == page.load(Register::ConfigGeneration)).then_some((before, halves))
        };
        if let Some((generation, (low, high))) = attempt() {
            assert!(low == high || generation % 2 == 1, "a torn field passed for a whole one");
        }
        device.join().unwrap();
        assert_eq!(attempt().unwrap(), (2, ([0xff; 4], [0xff; 4])));
    });
}

/// An acknowledgement clears the bit before the driver looks at the ring, so that what comes in between sets it again.
#[test]
fn an_acknowledged_event_was_seen() {
    model(|| {
        let (page, used) = (Arc::new(RegisterPage::default()), Arc::new(AtomicU16::new(0)));
        let device = {
            let (page, used) = (Arc::clone(&page), Arc::clone(&used));
            thread::spawn(move || {
                for index in 1..=REQUESTS {
                    used.store(index, Relaxed);
                    page.set(Register::InterruptStatus, INTERRUPT_USED_BUFFER);
                }
            })
        };
        let mut seen = 0;
        for _ in 0..2 {
            let status = page.load(Register::InterruptStatus);
            page.clear(Register::InterruptStatus, status);
            if status != 0 {
                seen = used.load(Relaxed);
                assert_ne!(seen, 0, "an interrupt for nothing");
            }
        }
        device.join().unwrap();
        let pending = page.load(Register::InterruptStatus) & INTERRUPT_USED_BUFFER != 0;
        assert!(seen == REQUESTS || pending, "the driver saw {seen}, and nothing is pending");
    });
}

/// Two disks share an edge-triggered line. The interrupt controller remembers one edge, and each time that the driver takes it, the
/// handlers of both disks read their status.
#[test]
fn no_interrupt_of_a_shared_line_is_lost() {
    model(|| {
        let pages = Arc::new([RegisterPage::default(), RegisterPage::default()]);
        let edge = Wake::new();
        let devices = [0, 1].map(|disk| {
            let (pages, edge) = (Arc::clone(&pages), edge.clone());
            thread::spawn(move || {
                pages[disk].set(Register::InterruptStatus, INTERRUPT_USED_BUFFER);
                edge.wake();
            })
        });
        let mut served = [false; 2];
        let mut interrupt = || {
            if edge.0.swap(0, AcqRel) != 0 {
                for (page, served) in pages.iter().zip(&mut served) {
                    let status = page.load(Register::InterruptStatus);
                    page.clear(Register::InterruptStatus, status);
                    *served |= status != 0;
                }
            }
        };
        interrupt();
        devices.into_iter().for_each(|device| device.join().unwrap());
        // What has come since the handlers began.
        interrupt();
        assert_eq!(served, [true; 2], "a disk was not served, and no edge is pending");
    });
}

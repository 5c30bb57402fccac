//! A thread that emits trace events allocates nothing for them, whether they are off, on, or lost.
//!
//! One test, alone in its process: the subscriber is the process's.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use tracing_subscriber::layer::{Layer as _, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

#[allow(dead_code, unreachable_pub, reason = "the program uses all of it")]
#[path = "../src/trace/mod.rs"]
mod trace;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[expect(unsafe_code, reason = "an allocator that counts")]
// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Debug)]
enum Kind {
    Read,
}

/// Emits what a request and an exit emit, and returns how often the thread allocated.
fn emit(times: u64) -> u64 {
    let before = ALLOCATIONS.get();
    for number in 0..times {
        let kind = Kind::Read;
        tracing::trace!(target: "virtio_queue_notify", queue = 0_u32);
        tracing::trace!(target: "virtio_blk_handle", req = number, ?kind, sector = Some(8_u64));
        tracing::trace!(target: "virtio_blk_req_complete", req = number, status = 0_u8);
        let data: &[u8] = &[1, 2, 3, 4];
        tracing::trace!(target: "kvm_run_exit", reason = "mmio_read", address = 1_u64, value = data);
        tracing::info!(target: "boot", "a phase whose name is longer than a text can be");
    }
    ALLOCATIONS.get() - before
}

#[test]
fn an_event_allocates_nothing() {
    let (trace, layer) =
        trace::Trace::new(&trace::TraceOptions::default(), Vec::new(), |line| panic!("{line}"));
    tracing_subscriber::registry().with(layer.with_filter(trace::IsOn)).init();
    // The first time each place is registered.
    emit(1);
    assert_eq!(emit(100), 0, "off");
    vmm::trace::set("*", true);
    emit(1);
    assert_eq!(emit(100), 0, "on");
    // More than the queue has places, while no thread empties it.
    assert_eq!(emit(5000), 0, "lost");
    vmm::trace::set("*", false);
    assert_eq!(emit(100), 0, "off again");
    drop(vmm::trace::take_writer().unwrap());
    drop(trace);
}

//! No way to the file allocates for a request: on the spot, through io_uring, on threads, or through a bounce buffer.
//!
//! One test, alone in its process: the allocations that it counts are the process's.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::GuestMemory;
use devices::disk::{
    self, Aio, CacheMode, Completion, Engine, EngineSetup, GuestRange, OpenOptions, OpenReason,
    Operation, Transfer,
};
use vm_memory::GuestAddress;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "an allocator that counts")]
// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
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

const DEPTH: u32 = 32;
const ROUNDS: u32 = 40;

/// Some rounds of `DEPTH` transfers each: two pieces of memory, the first of which starts at `skew` bytes.
fn rounds(engine: &mut dyn Engine, done: &mut Vec<Completion>, operation: Operation, skew: u64) {
    for round in 0..ROUNDS {
        for tag in 0..DEPTH {
            let base = u64::from(tag) * 16384 + skew;
            let piece = |at| GuestRange { address: GuestAddress(base + at), length: 2048 };
            let offset = u64::from((round * 7 + tag) % 64) * 4096;
            engine.submit(Transfer {
                tag,
                operation,
                offset,
                length: 4096,
                ranges: &[piece(0), piece(8192)],
            });
        }
        engine.commit();
        engine.wait_for_all(done);
        assert_eq!(done.len(), DEPTH as usize);
        for completion in done.drain(..) {
            completion.result.unwrap();
        }
    }
}

#[test]
fn steady_load_allocates_nothing() {
    for directory in [Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new("/dev/shm")] {
        let Ok(image) = tempfile::NamedTempFile::new_in(directory) else { continue };
        image.as_file().set_len(64 * 4096).unwrap();
        for (&aio, &cache) in
            Aio::ALL.iter().flat_map(|aio| CacheMode::ALL.iter().map(move |cache| (aio, cache)))
        {
            let disk = match disk::open(&OpenOptions {
                aio,
                cache,
                locking: false,
                ..OpenOptions::new(image.path())
            }) {
                Err(error) if matches!(error.objection(), Some(OpenReason::NoDirect)) => continue,
                result => result.unwrap(),
            };
            let memory =
                GuestMemory::from_ranges(&[(GuestAddress(0), DEPTH as usize * 16384 + 4096)])
                    .unwrap();
            let mut engine = disk.engine(EngineSetup::new(memory, DEPTH)).unwrap();
            let mut done = Vec::with_capacity(DEPTH as usize);
            for operation in [Operation::Read, Operation::Write { durable: !cache.writeback() }] {
                // Odd addresses are nothing to the page cache, and need a bounce buffer without it.
                for skew in [0, 1] {
                    // Lists grow to the size that they need, threads start, bounce buffers come into being.
                    rounds(&mut *engine, &mut done, operation, skew);
                    // What starts or grows late on a loaded machine does so once; what is a request's own comes back.
                    let none_is_allocated = (0..20).any(|_| {
                        let before = ALLOCATIONS.load(Ordering::Relaxed);
                        rounds(&mut *engine, &mut done, operation, skew);
                        ALLOCATIONS.load(Ordering::Relaxed) == before
                    });
                    let requests = ROUNDS * DEPTH;
                    assert!(
                        none_is_allocated,
                        "allocations for {requests} requests: {aio}, {cache}, {operation:?}, skew {skew}"
                    );
                }
            }
        }
    }
}

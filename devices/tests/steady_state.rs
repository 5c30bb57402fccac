//! Under steady load the path from ring to file allocates nothing, and hands many requests to the engine at a time.
//!
//! One test, alone in its process: the allocations that it counts are the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::block::Kind;
use devices::disk::{
    self, Aio, Completion, DeviceCommand, Disk, DiskError, DiskInfo, Engine, EngineSetup,
    GuestRange, OpenOptions, Transfer,
};

mod support;

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

/// A disk that counts batches on the way to the real one.
struct Counted {
    disk: Arc<dyn Disk>,
    commits: Arc<AtomicU64>,
}

struct CountedEngine {
    engine: Box<dyn Engine>,
    commits: Arc<AtomicU64>,
    submitted: bool,
}

impl Disk for Counted {
    fn info(&self) -> &DiskInfo {
        self.disk.info()
    }

    fn first_sector(&self) -> Option<[u8; 512]> {
        self.disk.first_sector()
    }

    fn allocated(&self) -> u64 {
        self.disk.allocated()
    }

    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn refresh_capacity(&self) -> std::io::Result<u64> {
        self.disk.refresh_capacity()
    }

    fn resize(&self, bytes: u64) -> std::io::Result<()> {
        self.disk.resize(bytes)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush()
    }

    fn engine(self: Arc<Self>, setup: EngineSetup) -> std::io::Result<Box<dyn Engine>> {
        let engine = Arc::clone(&self.disk).engine(setup)?;
        Ok(Box::new(CountedEngine { engine, commits: Arc::clone(&self.commits), submitted: false }))
    }
}

impl Engine for CountedEngine {
    fn submit(&mut self, transfer: Transfer<'_>) {
        self.submitted = true;
        self.engine.submit(transfer);
    }

    fn submit_scsi(&mut self, tag: u32, command: Arc<dyn DeviceCommand>, data: &[GuestRange]) {
        self.engine.submit_scsi(tag, command, data);
    }

    fn commit(&mut self) {
        self.commits.fetch_add(u64::from(std::mem::take(&mut self.submitted)), Ordering::Relaxed);
        self.engine.commit();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.engine.reap(done);
    }

    fn completion_fd(&self) -> Option<std::os::fd::RawFd> {
        self.engine.completion_fd()
    }

    fn wait_for_all(&mut self, done: &mut Vec<Completion>) {
        self.engine.wait_for_all(done);
    }
}

const ROUNDS: u64 = 500;
/// How often that many rounds are tried for one time without an allocation.
const WINDOWS: usize = 20;
const DEPTH: u16 = 32;

#[test]
fn steady_load_allocates_nothing_and_travels_in_batches() {
    // In memory: a write that a device holds up goes to a thread, and starting one allocates.
    let directory =
        ["/dev/shm", "."].into_iter().find(|place| std::path::Path::new(place).is_dir()).unwrap();
    let image = tempfile::NamedTempFile::new_in(directory).unwrap();
    image.as_file().set_len(16 << 20).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut options = OpenOptions::new(image.path());
        options.aio = aio;
        let commits = Arc::new(AtomicU64::new(0));
        let disk = Arc::new(Counted {
            disk: disk::open(&options).unwrap(),
            commits: Arc::clone(&commits),
        });
        let mut load = support::Load::new(disk, 4096);
        for write in [false, true] {
            (0..64).for_each(|slot| load.prepare(slot, 4096, write));
            // Sequential and scattered, so that both merged and single transfers are in it.
            let mut next = 0_u64;
            let mut sector = move || {
                next += 1;
                (if next % 64 < 32 { next } else { next * 7919 }) % 4096 * 8
            };
            let mut rounds = |load: &mut support::Load| {
                for _ in 0..ROUNDS {
                    load.send(0..DEPTH, &mut sector);
                    load.wait(DEPTH);
                }
            };
            // The first rounds let every list grow to the size that it needs. What starts late on a loaded machine, or is the test
            // program's own, allocates once; what is a request's own comes back each time.
            let mut turns = 0;
            let none_is_allocated = (0..WINDOWS).any(|_| {
                turns += ROUNDS;
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                rounds(&mut load);
                ALLOCATIONS.load(Ordering::Relaxed) == before
            });
            assert!(none_is_allocated, "{aio:?}: allocations for {ROUNDS} times {DEPTH} requests");
            let batches = commits.swap(0, Ordering::Relaxed);
            assert_eq!(batches, turns, "{aio:?}: more than one batch for {DEPTH} requests");
            let kind = if write { Kind::Write } else { Kind::Read };
            let stats = load.handle().stats();
            assert_eq!(stats.kind(kind).operations, turns * u64::from(DEPTH));
            assert_eq!(stats.kind(kind).bytes, turns * u64::from(DEPTH) * 4096);
        }
    }
}

//! What a request costs from ring to file and back, with no guest in the way: a driver in this process plays on real rings
//! against a real file, beside fio's io_uring engine on that file at the same depth.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use devices::disk::{self, OpenOptions};

use crate::counters::Counters;
use crate::process;
use crate::results::{Key, Results};
use crate::{FILE_SIZE, Options, fill};

#[path = "../../../../devices/tests/support/mod.rs"]
pub(crate) mod support;

pub(crate) const RATE: &str = "thousands a second";

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

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

struct Job {
    name: &'static str,
    block: u32,
    depth: u16,
    write: bool,
    random: bool,
    count: u64,
}

const fn job(
    name: &'static str,
    block: u32,
    depth: u16,
    write: bool,
    random: bool,
    count: u64,
) -> Job {
    Job { name, block, depth, write, random, count }
}

const JOBS: [Job; 6] = [
    job("4k random read, depth 1", 4096, 1, false, true, 100_000),
    job("4k random read, depth 32", 4096, 32, false, true, 300_000),
    job("4k random write, depth 1", 4096, 1, true, true, 100_000),
    job("4k random write, depth 32", 4096, 32, true, true, 300_000),
    job("128k read, depth 4", 131_072, 4, false, false, 30_000),
    job("128k write, depth 4", 131_072, 4, true, false, 30_000),
];

pub(crate) fn group(place: &str) -> String {
    format!("driver in process, file {place}")
}

/// On tmpfs io_uring hands every request to a thread of the kernel's (it cannot tell whether one would wait); the file on
/// disk lies in the page cache, where it answers at once.
pub(crate) fn run(options: &Options, results: &mut Results) {
    let on_disk = crate::results::directory();
    for (place, directory) in [("in memory", Path::new("/dev/shm")), ("on disk", &on_disk)] {
        let file = tempfile::NamedTempFile::new_in(directory).unwrap();
        fill(file.path());
        let group = group(place);
        for _ in 0..options.repetitions {
            for job in &JOBS {
                ours(&group, file.path(), job, results);
                results
                    .add(Key::new(&group, job.name, "fio's io_uring", RATE), fio(file.path(), job));
            }
        }
        for job in &JOBS {
            let rate = |system| {
                results
                    .get(&Key::new(&group, job.name, system, RATE))
                    .map_or(f64::NAN, |rate| rate.0)
            };
            let (ours, fios) = (rate("minivmm"), rate("fio's io_uring"));
            results.add(Key::new(&group, job.name, "minivmm", "ratio to fio"), ours / fios);
            results.add(
                Key::new(&group, job.name, "minivmm", "us added to fio's"),
                1e3 / ours - 1e3 / fios,
            );
        }
    }
}

/// Sectors in the job's order, without end.
fn sectors(job: &Job) -> impl FnMut() -> u64 {
    let mut at_random = random_sectors(0, job.block);
    let (random, block) = (job.random, u64::from(job.block));
    let mut next = 0;
    move || {
        if random {
            return at_random();
        }
        next += 1;
        next % (FILE_SIZE / block) * block / 512
    }
}

/// Sectors of blocks of so many bytes at random, without end.
pub(crate) fn random_sectors(seed: u64, block: u32) -> impl FnMut() -> u64 {
    let block = u64::from(block);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_add(seed);
    move || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (FILE_SIZE / block) * block / 512
    }
}

fn ours(group: &str, path: &Path, job: &Job, results: &mut Results) {
    let disk = disk::open(&OpenOptions::new(path)).unwrap();
    let mut load = support::Load::new(Arc::clone(&disk), job.block);
    (0..job.depth).for_each(|slot| load.prepare(slot, job.block, job.write));
    // The first requests let every list grow to the size that it needs.
    load.run(job.depth, job.count / 10, sectors(job));
    load.kicks = 0;
    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    let start = Instant::now();
    load.run(job.depth, job.count, sectors(job));
    let time = start.elapsed().as_secs_f64();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - allocations;

    // Once more, while the worker's system calls are counted.
    let mut workers = process::threads(std::process::id());
    workers.retain(|(_, name)| name.starts_with("disk-"));
    let counters = Counters::open(&workers);
    load.run(job.depth, job.count, sectors(job));
    let [.., calls] = counters.read();
    let count = job.count as f64;
    let mut add = |metric, value| results.add(Key::new(group, job.name, "minivmm", metric), value);
    add(RATE, count / time / 1e3);
    add("allocations a request", allocations as f64 / count);
    add("notifications a request", load.kicks as f64 / 2.0 / count);
    add("system calls a request", calls / count);
}

/// Thousands of requests a second through fio's io_uring engine.
fn fio(path: &Path, job: &Job) -> f64 {
    let direction = if job.write { "write" } else { "read" };
    let mut command = Command::new("fio");
    command.args([
        "--name=peer",
        "--ioengine=io_uring",
        "--time_based",
        "--runtime=500ms",
        "--output-format=json",
    ]);
    command.args(["--allow_file_create=0", "--norandommap", "--invalidate=0", "--gtod_reduce=1"]);
    command.arg(format!("--filename={}", path.display())).arg(format!("--size={FILE_SIZE}"));
    command.arg(format!("--rw={}{direction}", if job.random { "rand" } else { "" }));
    command.arg(format!("--bs={}", job.block)).arg(format!("--iodepth={}", job.depth));
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_slice(&output).unwrap_or_default();
    report["jobs"][0][direction]["iops"].as_f64().map_or(f64::NAN, |iops| iops / 1e3)
}

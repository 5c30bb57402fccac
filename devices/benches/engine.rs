//! The disk engines at native speed, beside fio's io_uring engine on the same file and at the same depth.
//!
//! `cargo bench -p devices --bench engine [-- WORD...]` runs the rows whose name contains every WORD. Repetitions of a
//! row are interleaved, so that a noisy machine is noisy to all. The table shows medians: thousands of requests a second,
//! their ratio to fio's where it is installed, and the microseconds of CPU that a request of ours costs in all threads.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark that cannot run has nothing better to do"
)]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::disk::{
    self, Aio, CacheMode, Disk, EngineSetup, GuestRange, OpenOptions, Operation, Transfer,
};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const FILE_SIZE: u64 = 256 << 20;
const REPETITIONS: usize = 5;
const DURATION: Duration = Duration::from_millis(500);

/// One workload.
struct Job {
    name: &'static str,
    write: bool,
    random: bool,
    block: u32,
    depth: u32,
}

const JOBS: &[Job] = &[
    Job { name: "4k-random-read-1", write: false, random: true, block: 4096, depth: 1 },
    Job { name: "4k-random-read-32", write: false, random: true, block: 4096, depth: 32 },
    Job { name: "4k-random-write-1", write: true, random: true, block: 4096, depth: 1 },
    Job { name: "4k-random-write-32", write: true, random: true, block: 4096, depth: 32 },
    Job { name: "128k-read-4", write: false, random: false, block: 128 << 10, depth: 4 },
    Job { name: "128k-write-4", write: true, random: false, block: 128 << 10, depth: 4 },
];

fn main() {
    let words: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let fio = Command::new("fio").arg("--version").output().is_ok();
    if !fio {
        println!("fio is not installed: no ratios");
    }
    println!(
        "{:38} {:>26}  {:>17}  {:>17}",
        "", "thousands a second", "ratio to fio", "us of CPU each"
    );
    println!(
        "{:38} {:>8} {:>8} {:>8}  {:>8} {:>8}  {:>8} {:>8}",
        "medians", "io_uring", "threads", "fio", "io_uring", "threads", "io_uring", "threads"
    );
    let on_disk = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for (place, directory, cache) in [
        ("memory", Path::new("/dev/shm"), CacheMode::Writeback),
        ("disk", on_disk, CacheMode::Writeback),
        ("disk", on_disk, CacheMode::None),
        ("disk", on_disk, CacheMode::Writethrough),
        ("disk", on_disk, CacheMode::DirectSync),
    ] {
        let Ok(image) = tempfile::NamedTempFile::new_in(directory) else { continue };
        for job in JOBS {
            let name = format!("{place}/{cache}/{}", job.name);
            // Without a write cache, reads are as with one.
            if !job.write && !cache.writeback() {
                continue;
            }
            if words.iter().all(|word| name.contains(word.as_str())) {
                fill(image.path());
                row(&name, image.path(), cache, job, fio);
            }
        }
    }
}

/// Real data everywhere: reading holes would cheat.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 3) as u8 | 1).collect();
    for _ in 0..FILE_SIZE >> 20 {
        std::io::Write::write_all(&mut file, &data).unwrap();
    }
    file.sync_all().unwrap();
}

fn row(name: &str, path: &Path, cache: CacheMode, job: &Job, fio: bool) {
    let mut rates = [const { Vec::new() }; 3];
    let mut costs = [const { Vec::new() }; 2];
    for _ in 0..REPETITIONS {
        for (i, aio) in [Aio::IoUring, Aio::Threads].into_iter().enumerate() {
            let options = OpenOptions { cache, aio, locking: false, ..OpenOptions::new(path) };
            match disk::open(&options) {
                Ok(disk) => {
                    let (rate, cost) = ours(disk, cache, job);
                    rates[i].push(rate);
                    costs[i].push(cost);
                }
                Err(error) => return println!("{name:<38} {error}"),
            }
        }
        if fio {
            rates[2].push(fios(path, cache, job));
        }
    }
    let [io_uring, threads, fio] = rates.map(median);
    let [io_uring_cost, threads_cost] = costs.map(median);
    let ratios = [io_uring / fio, threads / fio];
    println!(
        "{name:<38} {:>8.1} {:>8.1} {:>8.1}  {:>8.2} {:>8.2}  {io_uring_cost:>8.2} {threads_cost:>8.2}",
        io_uring / 1e3,
        threads / 1e3,
        fio / 1e3,
        ratios[0],
        ratios[1]
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Through an engine of ours, as a queue worker drives it: requests a second, and microseconds of CPU for each.
fn ours(disk: Arc<dyn Disk>, cache: CacheMode, job: &Job) -> (f64, f64) {
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), (job.block * job.depth) as usize)]).unwrap();
    let mut engine = disk.engine(EngineSetup::new(memory, job.depth)).unwrap();
    let epoll = Epoll::new().unwrap();
    if let Some(fd) = engine.completion_fd() {
        let events = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, fd, events).unwrap();
    }
    let operation =
        if job.write { Operation::Write { durable: !cache.writeback() } } else { Operation::Read };
    let blocks = FILE_SIZE / u64::from(job.block);
    let mut next = 0x9e37_79b9_7f4a_7c15_u64;
    let mut free: Vec<u32> = (0..job.depth).collect();
    let mut done = Vec::new();
    let mut count = 0_u64;
    let cpu = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let (start, cpu_start) = (Instant::now(), cpu());
    while start.elapsed() < DURATION {
        while let Some(tag) = free.pop() {
            next = if job.random {
                next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)
            } else {
                next + 1
            };
            let block = if job.random { (next >> 33) % blocks } else { next % blocks };
            engine.submit(Transfer {
                tag,
                operation,
                offset: block * u64::from(job.block),
                length: u64::from(job.block),
                ranges: &[GuestRange {
                    address: GuestAddress(u64::from(tag * job.block)),
                    length: job.block,
                }],
            });
        }
        engine.commit();
        engine.reap(&mut done);
        while done.is_empty() {
            // The kernel interrupts the wait when it makes an io_uring worker thread; that is no error.
            let _ = epoll.wait(-1, &mut [EpollEvent::default()]);
            engine.reap(&mut done);
        }
        for completion in done.drain(..) {
            completion.result.unwrap();
            free.push(completion.tag);
            count += 1;
        }
    }
    engine.wait_for_all(&mut done);
    (count as f64 / start.elapsed().as_secs_f64(), (cpu() - cpu_start) * 1e6 / count as f64)
}

/// Requests a second through fio's io_uring engine.
fn fios(path: &Path, cache: CacheMode, job: &Job) -> f64 {
    let direction = if job.write { "write" } else { "read" };
    let output = Command::new("fio")
        .args([
            "--name=peer",
            "--ioengine=io_uring",
            "--time_based",
            "--output-format=terse",
            "--allow_file_create=0",
        ])
        .args(["--norandommap", "--invalidate=0", "--gtod_reduce=1"])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--size={FILE_SIZE}"))
        .arg(format!("--rw={}{direction}", if job.random { "rand" } else { "" }))
        .arg(format!("--bs={}", job.block))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--direct={}", u8::from(cache.direct())))
        .arg(format!("--sync={}", if cache.writeback() { "none" } else { "dsync" }))
        .arg(format!("--runtime={}ms", DURATION.as_millis()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // Fields 8 and 49 of fio's terse format, version 3: read and write IOPS.
    let field = if job.write { 48 } else { 7 };
    let iops = text
        .lines()
        .find(|line| line.starts_with("3;"))
        .and_then(|line| line.split(';').nth(field)?.parse().ok());
    iops.unwrap_or_else(|| panic!("fio said {text}{}", String::from_utf8_lossy(&output.stderr)))
}

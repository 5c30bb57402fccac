//! What a request costs from ring to file and back, with no guest in the way: a driver in this process plays on real
//! rings against a real file, which lies in memory. Beside it, the same transfers as plain system calls.
//!
//! `cargo bench -p devices --bench queue`

#![expect(clippy::unwrap_used, reason = "what fails here fails the benchmark")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use devices::disk::{self, OpenOptions};

#[path = "../tests/support/mod.rs"]
mod support;

const FILE: u64 = 256 << 20;

struct Job {
    name: &'static str,
    block: u32,
    depth: u16,
    write: bool,
    sequential: bool,
    count: u64,
}

fn main() {
    let directory = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "." };
    let file = tempfile::NamedTempFile::new_in(directory).unwrap();
    let chunk = vec![0x5a; 1 << 20];
    (0..FILE >> 20).for_each(|n| file.as_file().write_all_at(&chunk, n << 20).unwrap());
    let job = |name, block, depth, write, sequential, count| Job { name, block, depth, write, sequential, count };
    let jobs = [
        job("4k random read, depth 1", 4096, 1, false, false, 100_000),
        job("4k random read, depth 32", 4096, 32, false, false, 400_000),
        job("4k random write, depth 1", 4096, 1, true, false, 100_000),
        job("4k random write, depth 32", 4096, 32, true, false, 400_000),
        job("4k sequential read, depth 32", 4096, 32, false, true, 400_000),
        job("4k sequential write, depth 32", 4096, 32, true, true, 400_000),
        job("128k sequential read, depth 4", 131_072, 4, false, true, 40_000),
        job("128k sequential write, depth 4", 131_072, 4, true, true, 40_000),
    ];
    println!(
        "{:32} {:>10} {:>14} {:>8} {:>12}",
        "thousands of requests a second", "device", "system calls", "ratio", "kicks/req"
    );
    for job in jobs {
        let mut best = (0.0_f64, 0.0_f64, 0.0_f64);
        for _ in 0..3 {
            let (device, kicks) = device(file.path(), &job);
            best = (best.0.max(device), best.1.max(plain(file.as_file(), &job)), kicks);
        }
        let (device, plain, kicks) = best;
        println!("{:32} {device:10.1} {plain:14.1} {:8.2} {kicks:12.2}", job.name, device / plain);
    }
}

/// Sectors in the job's order, without end.
fn sectors(job: &Job) -> impl FnMut() -> u64 {
    let blocks = FILE / u64::from(job.block);
    let (mut state, sequential, block) = (0x9e37_79b9_7f4a_7c15_u64, job.sequential, u64::from(job.block));
    let mut next = 0;
    move || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        next += 1;
        (if sequential { next } else { state }) % blocks * block / 512
    }
}

/// Thousands of requests a second through the device, and kicks a request.
fn device(path: &std::path::Path, job: &Job) -> (f64, f64) {
    let disk = disk::open(&OpenOptions::new(path)).unwrap();
    let mut load = support::Load::new(Arc::clone(&disk), job.block);
    (0..job.depth).for_each(|slot| load.prepare(slot, job.block, job.write));
    load.run(job.depth, job.count / 10, sectors(job));
    let start = Instant::now();
    load.kicks = 0;
    load.run(job.depth, job.count, sectors(job));
    (job.count as f64 / start.elapsed().as_secs_f64() / 1e3, load.kicks as f64 / job.count as f64)
}

/// Thousands of pread(2) or pwrite(2) a second.
fn plain(file: &File, job: &Job) -> f64 {
    let mut sector = sectors(job);
    let mut buffer = vec![0x5a; job.block as usize];
    let start = Instant::now();
    for _ in 0..job.count {
        let offset = sector() * 512;
        match job.write {
            true => file.write_all_at(&buffer, offset).unwrap(),
            false => file.read_exact_at(&mut buffer, offset).unwrap(),
        }
    }
    job.count as f64 / start.elapsed().as_secs_f64() / 1e3
}

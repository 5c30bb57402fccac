//! What a request costs at least on this machine: the limit that is printed beside what was measured. Also what the data of a saved
//! machine costs.
//!
//! A request at depth 1 needs a hand-over from the driver's CPU to the disk's and back, and one copy by the host's kernel.
//! With many in flight the hand-over is hidden behind other requests' copies, so that the copy alone remains. Neither
//! counts a single instruction of the monitor's own. Both are measured by two threads on two CPUs, with nothing else.

use std::fs::File;
use std::hint::spin_loop;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::FILE_SIZE;

const TURNS: u64 = 100_000;
/// Bytes that each copy is measured with.
const COPIED: u64 = 128 << 20;

/// A line of the cache, which CPUs hand to each other whole.
#[repr(align(64))]
struct Line(AtomicU64);

/// What driver and device share. `REQUEST`: the available ring, two lines of descriptors, the header. `ANSWER`: the status.
static LINES: [Line; 7] = [const { Line(AtomicU64::new(0)) }; 7];
const AVAILABLE_INDEX: usize = 0;
const REQUEST: std::ops::Range<usize> = 1..5;
const STATUS: usize = 5;
const USED_INDEX: usize = 6;

/// Seconds from the driver's store of an available index to its load of the used index that answers it. `None`: there is
/// only one CPU.
pub(crate) fn hand_over() -> Option<f64> {
    let allowed = sched_getaffinity(None).ok()?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let (ours, other) = (cpus.next()?, cpus.next()?);
    let start = LINES[USED_INDEX].0.load(Ordering::Relaxed);
    let device = std::thread::spawn(move || {
        pin(other);
        for turn in start + 1..=start + TURNS {
            wait(AVAILABLE_INDEX, turn);
            let sum: u64 = LINES[REQUEST].iter().map(|line| line.0.load(Ordering::Relaxed)).sum();
            LINES[STATUS].0.store(sum, Ordering::Relaxed);
            LINES[USED_INDEX].0.store(turn, Ordering::Release);
        }
    });
    pin(ours);
    let mut begin = Instant::now();
    for turn in start + 1..=start + TURNS {
        // The other thread has to start first.
        if turn == start + 2 {
            begin = Instant::now();
        }
        LINES[REQUEST].iter().for_each(|line| line.0.store(turn, Ordering::Relaxed));
        LINES[AVAILABLE_INDEX].0.store(turn, Ordering::Release);
        wait(USED_INDEX, turn);
        assert_eq!(LINES[STATUS].0.load(Ordering::Relaxed), turn * REQUEST.len() as u64);
    }
    let time = begin.elapsed().as_secs_f64();
    device.join().unwrap();
    let _ = sched_setaffinity(None, &allowed);
    Some(time / (TURNS - 1) as f64)
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).unwrap();
}

fn wait(line: usize, turn: u64) {
    while LINES[line].0.load(Ordering::Acquire) != turn {
        spin_loop();
    }
}

/// Seconds that one system call takes to move `block` bytes between memory and the file: blocks at random or in order, to
/// as many buffers in turn as there are requests in flight.
pub(crate) fn copy(path: &Path, block: u64, depth: usize, write: bool, random: bool) -> f64 {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut buffers = vec![vec![1_u8; block as usize]; depth];
    let (count, blocks) = (COPIED / block, FILE_SIZE / block);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let begin = Instant::now();
    for number in 0..count {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = (if random { state } else { number }) % blocks * block;
        let buffer = &mut buffers[number as usize % depth];
        if write {
            file.write_all_at(buffer, at).unwrap();
        } else {
            file.read_exact_at(buffer, at).unwrap();
        }
    }
    begin.elapsed().as_secs_f64() / count as f64
}

/// Milliseconds that it takes to write `bytes` to a new file in this directory, and to have them on the medium.
pub(crate) fn write_and_sync(directory: &Path, bytes: u64) -> f64 {
    const BLOCK: u64 = 2 << 20;
    let (path, block) = (directory.join("limit"), vec![1; BLOCK as usize]);
    let file = File::create(&path).unwrap();
    let begin = Instant::now();
    for at in (0..bytes).step_by(BLOCK as usize) {
        file.write_all_at(&block, at).unwrap();
    }
    file.sync_all().unwrap();
    let time = begin.elapsed();
    std::fs::remove_file(path).unwrap();
    time.as_secs_f64() * 1e3
}

//! The whole monitor at native speed: a guest that polls its disk at CPL 3, where even a KVM done in software does not slow
//! it down.

#![expect(unsafe_code, reason = "the time stamp counter has no safe wrapper")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use minivmm_tests::polling::{self, Job};
use rustix::process::{Pid, Signal, kill_process};

use crate::monitors::Monitor;
use crate::{FILE_SIZE, fill, median, places};

/// MiB.
const MEMORY: u32 = 64;

const fn job(write: bool, random: bool, block: u32, depth: u32, requests: u64) -> Job {
    Job { write, random, block, depth, requests }
}

const JOBS: [(&str, Job); 6] = [
    ("4k random read, depth 1", job(false, true, 4096, 1, 30_000)),
    ("4k random read, depth 32", job(false, true, 4096, 32, 150_000)),
    ("4k random write, depth 1", job(true, true, 4096, 1, 30_000)),
    ("4k random write, depth 32", job(true, true, 4096, 32, 150_000)),
    ("128k read, depth 4", job(false, false, 128 << 10, 4, 12_000)),
    ("128k write, depth 4", job(true, false, 128 << 10, 4, 12_000)),
];

/// One run of one monitor.
struct Run {
    /// Thousands of requests a second, and notifications a request, by job.
    jobs: Vec<(f64, f64)>,
    /// From exec to the guest's first instruction.
    to_guest: Duration,
    /// Peak resident memory, the guest's included.
    peak_kib: f64,
}

pub(crate) fn run(repetitions: usize) {
    let hz = tsc_hz();
    let monitors = Monitor::all();
    let directory = tempfile::tempdir().unwrap();
    for (place, on) in places() {
        let image = tempfile::NamedTempFile::new_in(&on).unwrap();
        fill(image.path());
        let mut runs: Vec<Vec<Run>> = monitors.iter().map(|_| Vec::new()).collect();
        let mut host: Vec<[f64; 2]> = Vec::new();
        for _ in 0..repetitions {
            for (monitor, runs) in monitors.iter().zip(&mut runs) {
                runs.push(once(*monitor, directory.path(), image.path(), hz));
            }
        }
        host.extend((0..repetitions.min(3)).filter_map(|_| fio(image.path())));
        table(place, &monitors, &runs, &host);
    }
}

fn table(place: &str, monitors: &[Monitor], runs: &[Vec<Run>], host: &[[f64; 2]]) {
    println!("\nFile in {place}: thousands of IOPS (spread; notifications a request)");
    print!("{:<28}", "");
    monitors.iter().for_each(|monitor| print!("{:>26}", monitor.name()));
    println!("{:>10}", "ratio");
    for (index, (name, _)) in JOBS.iter().enumerate() {
        print!("{name:<28}");
        let rows: Vec<_> =
            runs.iter().map(|runs| runs.iter().map(|run| run.jobs[index].0).collect::<Vec<_>>()).collect();
        for (row, runs) in rows.iter().zip(runs) {
            let ((median, spread), kicks) =
                (median(row), self::median(&runs.iter().map(|run| run.jobs[index].1).collect::<Vec<_>>()).0);
            print!("{:>26}", format!("{median:.1} (±{spread:.0}%; {kicks:.2})"));
        }
        let best = rows.iter().skip(1).map(|row| median(row).0).fold(f64::NAN, f64::max);
        println!("{:>10.2}", median(&rows[0]).0 / best);
    }
    print!("{:<28}", "exec to guest, ms");
    for runs in runs {
        let (median, spread) = median(&runs.iter().map(|run| run.to_guest.as_secs_f64() * 1e3).collect::<Vec<_>>());
        print!("{:>26}", format!("{median:.1} (±{spread:.0}%)"));
    }
    print!("\n{:<28}", "peak RSS, KiB");
    for runs in runs {
        print!("{:>26.0}", median(&runs.iter().map(|run| run.peak_kib).collect::<Vec<_>>()).0);
    }
    println!();
    for (engine, depth, at) in [("psync", 1, 0), ("io_uring", 32, 1)] {
        let (median, spread) = median(&host.iter().map(|host| host[at]).collect::<Vec<_>>());
        println!("the host's fio, {engine}, 4k random read, depth {depth}: {median:.0} (±{spread:.0}%)");
    }
}

fn once(monitor: Monitor, directory: &Path, image: &Path, hz: f64) -> Run {
    let kernel = directory.join("polling.elf");
    fs::write(&kernel, polling::kernel(monitor.windows(), &JOBS.map(|(_, job)| job), FILE_SIZE)).unwrap();
    let mut command = monitor.command(&kernel, image, MEMORY);
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut mark = [0];
    output.read_exact(&mut mark).unwrap_or_else(|why| panic!("{command:?}: {why}"));
    let to_guest = started.elapsed();
    let mut lines = output.lines().map(Result::unwrap);
    let mut jobs = Vec::new();
    for (_, job) in JOBS {
        let line = lines.next().unwrap_or_default();
        let numbers = line.split_once(' ').and_then(|(ticks, kicks)| Some((hexadecimal(ticks)?, hexadecimal(kicks)?)));
        let (ticks, kicks) = numbers.unwrap_or_else(|| panic!("{command:?}: {line:?}"));
        let requests = job.requests as f64;
        jobs.push((requests / (ticks / hz) / 1e3, kicks / requests));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib = peak.trim().trim_end_matches(" kB").parse().unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    Run { jobs, to_guest, peak_kib }
}

fn hexadecimal(text: &str) -> Option<f64> {
    u64::from_str_radix(text, 16).ok().map(|number| number as f64)
}

/// Ticks of the time stamp counter in a second.
fn tsc_hz() -> f64 {
    let now = || {
        // SAFETY: every x86-64 processor has RDTSC, and user space may use it (Linux leaves CR4.TSD clear).
        (Instant::now(), unsafe { core::arch::x86_64::_rdtsc() })
    };
    let (start, from) = now();
    std::thread::sleep(Duration::from_millis(200));
    let (end, to) = now();
    (to - from) as f64 / (end - start).as_secs_f64()
}

/// The host's own fio on the same file, 4k random reads, thousands of IOPS: psync at depth 1, io_uring at depth 32.
fn fio(image: &Path) -> Option<[f64; 2]> {
    let one = |engine: &str, depth: u32| {
        let mut command = Command::new("fio");
        command.args([
            "--name=host",
            "--rw=randread",
            "--bs=4k",
            "--time_based",
            "--runtime=1",
            "--output-format=json",
        ]);
        command.arg(format!("--ioengine={engine}")).arg(format!("--iodepth={depth}"));
        command.arg(format!("--filename={}", image.display()));
        let output = command.output().ok()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(report["jobs"][0]["read"]["iops"].as_f64()? / 1e3)
    };
    Some([one("psync", 1)?, one("io_uring", 32)?])
}

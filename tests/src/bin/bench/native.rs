//! The whole monitor at native speed: a guest that polls its disk at CPL 3, where even a KVM done in software does not slow
//! it down.

#![expect(unsafe_code, reason = "the time stamp counter has no safe wrapper")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use minivmm_tests::polling::{self, Job};

use crate::fio::{PERCENTILES, QUANTILES};
use crate::monitors::{DiskSetup, Monitor, Setup};
use crate::process::Process;
use crate::results::{Key, Results};
use crate::table::{self, Target};
use crate::{FILE_SIZE, Options, fill, limit};

/// MiB.
const MEMORY: u32 = 64;
/// How long a job may take, on the most loaded of machines.
const SILENCE: Duration = Duration::from_secs(60);

pub(crate) const IOPS: &str = "thousands of requests a second";

pub(crate) const fn job(write: bool, random: bool, block: u32, depth: u32, requests: u64) -> Job {
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

/// What minivmm has to reach with the file in memory.
pub(crate) fn target(row: &str) -> Option<Target> {
    Some(match row {
        "4k random read, depth 1" => Target::AtLeast(170.0),
        "4k random read, depth 32" => Target::AtLeast(600.0),
        "4k random write, depth 1" => Target::AtLeast(130.0),
        "4k random write, depth 32" => Target::AtLeast(520.0),
        "128k read, depth 4" => Target::AtLeast(55.0),
        "exec to the guest's first instruction" => Target::AtMost(15.0),
        "peak RSS with the guest's pages" => Target::AtMost(4052.0),
        _ => return None,
    })
}

pub(crate) fn group(place: &str) -> String {
    format!("polling guest, file {place}")
}

pub(crate) fn run(options: &Options, results: &mut Results) {
    let hz = tsc_hz();
    let on_disk = crate::results::directory();
    for (place, directory) in [("in memory", Path::new("/dev/shm")), ("on disk", &on_disk)] {
        if options.quick && place != "in memory" {
            continue;
        }
        let image = tempfile::NamedTempFile::new_in(directory).unwrap();
        fill(image.path());
        for _ in 0..options.repetitions {
            if place == "in memory" {
                boot_phases(image.path(), results);
            }
            for monitor in Monitor::all() {
                once(monitor, place, image.path(), hz, results);
            }
            limits(&group(place), image.path(), results);
            for (row, engine, depth) in [(JOBS[0].0, "psync", 1), (JOBS[1].0, "io_uring", 32)] {
                let (iops, latencies) = fio(image.path(), engine, depth);
                let metrics = [IOPS].into_iter().chain(QUANTILES);
                for (metric, value) in metrics.zip([iops].into_iter().chain(latencies)) {
                    results.add(Key::new(&group(place), row, "host's fio", metric), value);
                }
            }
        }
    }
}

/// What the host can do at best for each of the jobs, and what that consists of.
fn limits(group: &str, image: &Path, results: &mut Results) {
    let hand_over = limit::hand_over().unwrap_or(f64::NAN);
    let mut add = |row: &str, metric: &str, value| {
        results.add(Key::new(group, row, table::LIMIT, metric), value);
    };
    add("hand-over to another CPU and back", "ns", hand_over * 1e9);
    for (row, Job { write, random, block, depth, .. }) in JOBS {
        let copy = limit::copy(image, block.into(), depth as usize, write, random);
        // At greater depths one request is handed over while another's data is copied.
        let time = if depth == 1 { hand_over + copy } else { copy };
        add(row, IOPS, 1e-3 / time);
        add(row, "ns of the copy", copy * 1e9);
    }
}

/// Writes the kernel that does `jobs` to a file.
pub(crate) fn kernel(monitor: Monitor, directory: &Path, jobs: &[Job]) -> PathBuf {
    let kernel = directory.join("polling.elf");
    fs::write(&kernel, polling::kernel(monitor.windows(), jobs, FILE_SIZE)).unwrap();
    kernel
}

/// A monitor that runs this kernel.
pub(crate) fn command(monitor: Monitor, kernel: &Path, image: &Path, read_only: bool) -> Command {
    let disks = &[DiskSetup { path: image, serial: "test", read_only, direct: false }];
    monitor.command(&Setup { kernel, initrd: None, cmdline: "", memory: MEMORY, cpus: 1, disks })
}

/// Where minivmm's time to the guest goes, as it says itself.
fn boot_phases(image: &Path, results: &mut Results) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(Monitor::Minivmm, directory.path(), &JOBS.map(|(_, job)| job));
    let mut command = command(Monitor::Minivmm, &kernel, image, false);
    let process = Process::start_on_errors(command.arg("--boot-timing"));
    while let Ok((_, line)) = process.line(SILENCE) {
        // boot: PHASE  1.23 ms, 0.45 ms of CPU
        let Some(row) = line.split("boot: ").nth(1) else { continue };
        let (row, rest) = row.split_at(row.find("  ").unwrap_or(row.len()));
        let wall = rest
            .trim()
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(f64::NAN);
        results.add(Key::new(&group("in memory"), row, "minivmm", "ms of --boot-timing"), wall);
        if row == "first console byte" {
            return;
        }
    }
}

fn once(monitor: Monitor, place: &str, image: &Path, hz: f64, results: &mut Results) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(monitor, directory.path(), &JOBS.map(|(_, job)| job));
    let process = Process::start(&mut command(monitor, &kernel, image, false));
    let mut add = |row: &str, metric: &str, value| {
        results.add(Key::new(&group(place), row, &monitor.name(), metric), value);
    };
    let mut to_guest = Duration::ZERO;
    for (row, job) in JOBS {
        let Done { ticks, kicks, latencies, first } = Done::read(&process);
        to_guest = first.unwrap_or(to_guest);
        let requests = job.requests as f64;
        add(row, IOPS, requests / (ticks / hz) / 1e3);
        add(row, "notifications a request", kicks / requests);
        for (metric, latency) in QUANTILES.into_iter().zip(latencies) {
            add(row, metric, latency / hz * 1e6);
        }
    }
    add("exec to the guest's first instruction", "ms", to_guest.as_secs_f64() * 1e3);
    add("peak RSS with the guest's pages", "KiB", process.peak_kib());
}

/// What the guest prints when it has done a job.
pub(crate) struct Done {
    pub(crate) ticks: f64,
    kicks: f64,
    /// Of `polling::QUANTILES`, in TSC ticks: from when the guest makes a request to when it sees the answer.
    latencies: [f64; 3],
    /// When after exec the guest ran, with its first job.
    pub(crate) first: Option<Duration>,
}

impl Done {
    /// Waits for the next job.
    pub(crate) fn read(process: &Process) -> Self {
        let (time, line) = process.line(SILENCE).unwrap_or_else(|why| panic!("the guest: {why}"));
        // The first line begins with the guest's sign of life.
        let rest = line.strip_prefix('R');
        let numbers = rest.unwrap_or(&line).split_whitespace();
        let numbers: Vec<_> =
            numbers.map_while(|number| u64::from_str_radix(number, 16).ok()).collect();
        let [ticks, kicks, p50, p99, p999] = numbers[..] else {
            panic!("the guest printed {line:?}")
        };
        let latencies = [p50, p99, p999].map(|bucket| polling::bucket_ticks(bucket as u32));
        Self { ticks: ticks as f64, kicks: kicks as f64, latencies, first: rest.map(|_| time) }
    }
}

/// Ticks of the time stamp counter in a second.
pub(crate) fn tsc_hz() -> f64 {
    let now = || {
        // SAFETY: every x86-64 processor has RDTSC, and user space may use it (Linux leaves CR4.TSD clear).
        (Instant::now(), unsafe { core::arch::x86_64::_rdtsc() })
    };
    let (start, from) = now();
    std::thread::sleep(Duration::from_millis(200));
    let (end, to) = now();
    (to - from) as f64 / (end - start).as_secs_f64()
}

/// The host's own fio on the same file, 4k random reads: thousands a second, and microseconds of the quantiles.
fn fio(image: &Path, engine: &str, depth: u32) -> (f64, [f64; 3]) {
    let mut command = Command::new("fio");
    command.args([
        "--name=host",
        "--rw=randread",
        "--bs=4k",
        "--time_based",
        "--runtime=1",
        "--output-format=json",
        "--percentile_list=50:99:99.9",
    ]);
    command.arg(format!("--ioengine={engine}")).arg(format!("--iodepth={depth}"));
    command.arg(format!("--filename={}", image.display()));
    let output =
        command.stderr(Stdio::null()).output().map(|output| output.stdout).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_slice(&output).unwrap_or_default();
    let read = &report["jobs"][0]["read"];
    let thousandth =
        |value: &serde_json::Value| value.as_f64().map_or(f64::NAN, |value| value / 1e3);
    let percentiles = PERCENTILES.map(|name| thousandth(&read["clat_ns"]["percentile"][name]));
    (thousandth(&read["iops"]), percentiles)
}

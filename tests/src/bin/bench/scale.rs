//! Measures how throughput, the processor time of a request, memory and start change with the number of disks, and of virtual
//! machines. It runs on any /dev/kvm.
//!
//! All share the host's processors. One disk does not keep all of them busy. Once they are busy, throughput can at best stay
//! the same, and the table shows whether the processor time of a request grows.

use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use devices::disk::{self, OpenOptions};
use rustix::time::{ClockId, clock_gettime};

use crate::driver::{self, support::Load};
use crate::monitors::Monitor;
use crate::native::{self, Done, IOPS, job};
use crate::process::Process;
use crate::results::{Key, Results};
use crate::saved::memory;
use crate::{Options, fill};

/// The name of this part's results.
pub(crate) const PART: &str = "scale.json";
pub(crate) const DISKS_GROUP: &str = "many disks, driver in process";
pub(crate) const MACHINES_GROUP: &str = "many virtual machines, polling guests";
const DISKS: [usize; 5] = [1, 2, 4, 8, 16];
const LOADED: [usize; 5] = [1, 2, 4, 8, 16];
const STARTED: [usize; 3] = [1, 10, 100];
const BLOCK: u32 = 4096;
const DEPTH: u16 = 32;
/// Requests of all disks, or of all machines under load, together.
const REQUESTS: u64 = 400_000;
const CPU: &str = "CPU us a request";

pub(crate) fn run(options: &Options, results: &mut Results) {
    let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    fill(image.path());
    for _ in 0..options.repetitions {
        for count in DISKS {
            disks(count, image.path(), results);
        }
        for monitor in Monitor::all() {
            for count in LOADED {
                load(monitor, count, image.path(), results);
            }
            for count in STARTED {
                start(monitor, count, image.path(), results);
            }
        }
    }
}

/// `count` disks on one file, each with a driver's thread that keeps requests in flight.
fn disks(count: usize, image: &Path, results: &mut Results) {
    let each = REQUESTS / count as u64;
    let ready = Barrier::new(count + 1);
    let (began, cpu) = thread::scope(|scope| {
        for number in 0..count {
            let ready = &ready;
            scope.spawn(move || {
                let options = OpenOptions { read_only: true, ..OpenOptions::new(image) };
                let mut load = Load::new(disk::open(&options).unwrap(), BLOCK);
                ready.wait();
                load.run(DEPTH, each, driver::random_sectors(number as u64, BLOCK));
            });
        }
        ready.wait();
        (Instant::now(), cpu_seconds())
    });
    let (time, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let requests = (each * count as u64) as f64;
    let row = if count == 1 { "1 disk".to_owned() } else { format!("{count} disks") };
    let mut add = |metric, value| {
        results.add(Key::new(DISKS_GROUP, &row, "minivmm", metric), value);
    };
    add(driver::RATE, requests / time / 1e3);
    add(CPU, cpu / requests * 1e6);
}

/// Seconds of processor time that this process has used.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Starts `count` machines whose guests read from the same file. Each is stopped by SIGSTOP when its guest is done.
fn machines(
    monitor: Monitor,
    count: usize,
    requests_each: u64,
    image: &Path,
) -> (Vec<Process>, Moments) {
    let directory = tempfile::tempdir().unwrap();
    let jobs = [job(false, true, BLOCK, u32::from(DEPTH), requests_each)];
    let kernel = native::kernel(monitor, directory.path(), &jobs);
    let began = Instant::now();
    let mut machines: Vec<_> = (0..count)
        .map(|_| {
            let started = began.elapsed();
            (started, Process::start(&mut native::command(monitor, &kernel, image, true)))
        })
        .collect();
    let watch = |(started, process): &mut (Duration, Process)| {
        let first = Done::read(process).first.expect("the guest's first line");
        process.pause();
        (*started + first, began.elapsed())
    };
    let moments: Vec<_> = thread::scope(|scope| {
        let watches: Vec<_> =
            machines.iter_mut().map(|machine| scope.spawn(move || watch(machine))).collect();
        watches.into_iter().map(|watch| watch.join().unwrap()).collect()
    });
    let starts = || moments.iter().map(|(start, _)| *start);
    let moments = Moments {
        first_guest: starts().min().unwrap(),
        last_guest: starts().max().unwrap(),
        end: moments.iter().map(|(_, end)| *end).max().unwrap(),
    };
    (machines.into_iter().map(|(_, process)| process).collect(), moments)
}

/// Times since the first machine was started.
struct Moments {
    first_guest: Duration,
    last_guest: Duration,
    /// All guests have done their requests.
    end: Duration,
}

/// Throughput and processor time of `count` machines under load.
fn load(monitor: Monitor, count: usize, image: &Path, results: &mut Results) {
    let each = REQUESTS / count as u64;
    let (machines, moments) = machines(monitor, count, each, image);
    let requests = (each * count as u64) as f64;
    let cpu: f64 = machines.iter().map(|process| process.cpu().0).sum();
    let mut add = |metric, value| {
        results.add(Key::new(MACHINES_GROUP, &row(count), &monitor.name(), metric), value);
    };
    add(IOPS, requests / (moments.end - moments.first_guest).as_secs_f64() / 1e3);
    add(CPU, cpu / requests * 1e6);
}

/// How soon the last of `count` machines runs, and how much memory each has after 32 requests.
fn start(monitor: Monitor, count: usize, image: &Path, results: &mut Results) {
    let (machines, moments) = machines(monitor, count, DEPTH.into(), image);
    let mean = |of: &dyn Fn(&Process) -> f64| machines.iter().map(of).sum::<f64>() / count as f64;
    let mut add = |metric, value| {
        results.add(Key::new(MACHINES_GROUP, &row(count), &monitor.name(), metric), value);
    };
    add("ms to the last one's guest", moments.last_guest.as_secs_f64() * 1e3);
    add("KiB of its own, each", mean(&|process| memory(process).0));
    add("KiB with its share, each", mean(&|process| memory(process).1));
}

fn row(count: usize) -> String {
    if count == 1 { "1 machine".to_owned() } else { format!("{count} machines") }
}

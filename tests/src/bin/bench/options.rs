//! What the sandbox, `--trace` and `log-writes=` cost the guest that polls at native speed: without the sandbox, with every event off and
//! in each format, and with a log of writes in memory.
//!
//! The options take turns, and each repetition compares them with its own run without any. A worker that is traced is
//! faster than the thread that writes the file: how many events were lost belongs to the result.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use minivmm_tests::polling::Job;

use crate::monitors::Monitor;
use crate::native::{self, Done, IOPS, job};
use crate::process::Process;
use crate::results::{Key, Results};
use crate::{Options, fill};

pub(crate) const PART: &str = "options.json";
const GROUP: &str = "polling guest, options";
/// The run that the others are compared with, and the one whose disk has a log of writes.
const PLAIN: &str = "minivmm";
const LOG: &str = "log of writes";
const RATIO: &str = "ratio to no option";
const LOST: &str = "% of events lost";

const JOBS: [(&str, Job); 2] = [
    ("4k random read, depth 32", job(false, true, 4096, 32, 150_000)),
    ("4k random write, depth 32", job(true, true, 4096, 32, 150_000)),
];

/// What each run has beside the guest and its disk.
const RUNS: [(&str, &[&str]); 7] = [
    (PLAIN, &[]),
    (LOG, &[]),
    ("sandbox off", &["--sandbox=off"]),
    ("all events off", &["--trace=file=trace,format=json"]),
    ("text", &["--trace=file=trace,*"]),
    ("json", &["--trace=file=trace,*,format=json"]),
    ("perfetto", &["--trace=file=trace,*,format=perfetto"]),
];

pub(crate) fn run(options: &Options, results: &mut Results) {
    let hz = native::tsc_hz();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = memory.path().join("image");
    fill(&image);
    let logged = format!("{},log-writes={0}.log", image.display());
    let directory =
        tempfile::tempdir_in(crate::results::directory().canonicalize().unwrap()).unwrap();
    for _ in 0..options.repetitions {
        let mut plain = [f64::NAN; JOBS.len()];
        for (system, arguments) in RUNS {
            let jobs = JOBS.map(|(_, job)| job);
            let disk = if system == LOG { Path::new(&logged) } else { &image };
            let kernel = native::kernel(Monitor::Minivmm, directory.path(), &jobs);
            let mut command = native::command(Monitor::Minivmm, &kernel, disk, false);
            let process = Process::start(command.args(arguments).current_dir(directory.path()));
            for ((row, job), plain) in JOBS.iter().zip(&mut plain) {
                let rate = job.requests as f64 / (Done::read(&process).ticks / hz) / 1e3;
                if system == PLAIN {
                    *plain = rate;
                }
                let mut add = |metric: &str, value| {
                    results.add(Key::new(GROUP, row, system, metric), value);
                };
                add(IOPS, rate);
                add(RATIO, rate / *plain);
            }
            drop(process);
            if arguments.iter().any(|argument| argument.contains('*')) {
                let share = lost(&directory.path().join("trace"));
                results.add(Key::new(GROUP, "all jobs", system, LOST), share * 100.0);
            }
        }
    }
}

/// The share of events that the trace lacks, as it says itself.
fn lost(trace: &Path) -> f64 {
    let (mut written, mut lost) = (0.0, 0.0);
    for line in BufReader::new(File::open(trace).unwrap()).lines() {
        let line = line.unwrap();
        let count = ["events lost: ", "\"event\":\"lost\",\"count\":"]
            .iter()
            .find_map(|words| line.split_once(words))
            .map(|(_, rest)| rest.split(|at: char| !at.is_ascii_digit()).next().unwrap());
        match count {
            Some(count) => lost += count.parse::<f64>().unwrap(),
            // In the format for Perfetto arrows have lines of their own.
            None => {
                written += f64::from(!line.contains("\"ph\":") || line.contains("\"ph\":\"X\""))
            }
        }
    }
    lost / (written + lost)
}

//! What `--trace` costs the guest that polls at native speed: without the option, with every event off, and with each format.
//!
//! The ways of tracing take turns, and each repetition compares them with its own run without a trace. A worker that is traced is
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

pub(crate) const PART: &str = "tracing.json";
const GROUP: &str = "polling guest, traced";
const RATIO: &str = "ratio to no trace";
const LOST: &str = "% of events lost";

const JOBS: [(&str, Job); 2] = [
    ("4k random read, depth 32", job(false, true, 4096, 32, 150_000)),
    ("4k random write, depth 32", job(true, true, 4096, 32, 150_000)),
];

/// Each way of tracing, and what `--trace` says behind the file.
const WAYS: [(&str, Option<&str>); 5] = [
    ("minivmm", None),
    ("all events off", Some("format=json")),
    ("text", Some("*")),
    ("json", Some("*,format=json")),
    ("perfetto", Some("*,format=perfetto")),
];

pub(crate) fn run(options: &Options, results: &mut Results) {
    let hz = native::tsc_hz();
    let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    fill(image.path());
    let directory = tempfile::tempdir_in(crate::results::directory()).unwrap();
    let trace = directory.path().join("trace");
    for _ in 0..options.repetitions {
        let mut untraced = [f64::NAN; JOBS.len()];
        for (system, words) in WAYS {
            let jobs = JOBS.map(|(_, job)| job);
            let mut command =
                native::command(Monitor::Minivmm, directory.path(), image.path(), &jobs);
            if let Some(words) = words {
                command.arg("--trace").arg(format!("file={},{words}", trace.display()));
            }
            let process = Process::start(&mut command);
            for ((row, job), untraced) in JOBS.iter().zip(&mut untraced) {
                let rate = job.requests as f64 / (Done::read(&process).ticks / hz) / 1e3;
                if words.is_none() {
                    *untraced = rate;
                }
                let mut add = |metric: &str, value| {
                    results.add(Key::new(GROUP, row, system, metric), value);
                };
                add(IOPS, rate);
                add(RATIO, rate / *untraced);
            }
            drop(process);
            if words.is_some_and(|words| words.starts_with('*')) {
                let share = lost(&trace);
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

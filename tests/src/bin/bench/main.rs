//! The benchmarks of `make bench`: minivmm beside QEMU's microvm and the host itself, in one run on one file.
//!
//! - `bench driver`: the disk's rings and engine in this process, beside fio.
//! - `bench native`: a guest of our own that polls at native speed, on any /dev/kvm.
//! - `bench options`: the same guest without the sandbox, and with `--trace`, in each format.
//! - `bench saved`: a save, a restore, and what clones cost.
//! - `bench scale`: many disks, and many of these guests at once.
//! - `bench guests`: Linux and fio, on a CPU with hardware virtualization or in the lab.
//! - `bench clones`: many clones of a booted Linux at once, on the same.
//! - `bench report` shows what the others measured, and left in `target/bench`, as one table and a picture.
//! - `bench compare [FILE]` shows the last results beside earlier ones, and fails if ours are worse.
//!
//! `--quick` measures less, and once; `--repetitions=N` measures N times, all systems in turn. Another minivmm, whose path is
//! in MINIVMM_BEFORE, takes part as the system `before`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark reports by panicking"
)]

mod chart;
mod clones;
mod counters;
mod driver;
mod fio;
mod guests;
mod limit;
mod monitors;
mod native;
mod options;
mod process;
mod report;
mod results;
mod saved;
mod scale;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use results::Results;

/// Bytes of the file under test.
const FILE_SIZE: u64 = 256 << 20;

/// How much to measure.
struct Options {
    quick: bool,
    repetitions: usize,
}

impl Options {
    /// How long a job of fio runs.
    fn milliseconds(&self) -> u32 {
        if self.quick || std::env::var_os("MINIVMM_LAB").is_some() { 1000 } else { 2000 }
    }
}

fn main() -> ExitCode {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let quick = words.iter().any(|word| word == "--quick");
    let asked = words.iter().find_map(|word| word.strip_prefix("--repetitions=")?.parse().ok());
    words.retain(|word| !word.starts_with("--"));
    let repetitions = asked.unwrap_or(if quick { 1 } else { 3 });
    let options = Options { quick, repetitions };
    let save = |part: &str, run: fn(&Options, &mut Results)| {
        let mut results = Results::new();
        run(&options, &mut results);
        results.save(&results::directory().join(part));
    };
    match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["driver"] => save("driver.json", driver::run),
        ["native"] => save("native.json", native::run),
        ["options"] => save(options::PART, options::run),
        ["saved"] => save(saved::PART, saved::run),
        ["scale"] => save(scale::PART, scale::run),
        ["guests"] => save(guests::PART, guests::run),
        ["clones"] => save(clones::PART, clones::run),
        ["report"] => report::run(),
        ["compare"] => return report::compare(&results::directory().join("previous.json")),
        ["compare", path] => return report::compare(&PathBuf::from(path)),
        _ => panic!(
            "usage: bench driver|native|options|saved|scale|guests|clones|report|compare [FILE] [--quick] [--repetitions=N]"
        ),
    }
    ExitCode::SUCCESS
}

/// Real data everywhere: reading holes would cheat.
fn fill(path: &Path) {
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 3) as u8 | 1).collect();
    std::fs::write(path, data.repeat((FILE_SIZE >> 20) as usize)).unwrap();
}

//! The benchmarks of `make bench`: minivmm beside QEMU's microvm and the host itself, in one run on one file.
//!
//! `bench driver`: the disk's rings and engine in this process, beside fio. `bench native`: a guest of our own that polls at native speed, on any /dev/kvm. `bench guests`: Linux and fio, where the
//! processor virtualises, or in the lab. Each saves what it measured in `target/bench`. `bench report` shows all parts as
//! one and draws them; `bench compare [FILE]` holds them against an earlier run. `--quick`: less of everything, once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark reports by panicking")]

mod chart;
mod counters;
mod driver;
mod fio;
mod guests;
mod monitors;
mod native;
mod process;
mod report;
mod results;
mod table;

use std::path::{Path, PathBuf};

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

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let quick = words.iter().any(|word| word == "--quick");
    words.retain(|word| word != "--quick");
    let options = Options { quick, repetitions: if quick { 1 } else { 3 } };
    let save = |part: &str, run: fn(&Options, &mut Results)| {
        let mut results = Results::new();
        run(&options, &mut results);
        results.save(&results::directory().join(part));
    };
    match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["driver"] => save("driver.json", driver::run),
        ["native"] => save("native.json", native::run),
        ["guests"] => save(guests::PART, guests::run),
        ["report"] => report::run(),
        ["compare"] => report::compare(&results::directory().join("previous.json")),
        ["compare", path] => report::compare(&PathBuf::from(path)),
        _ => panic!("usage: bench driver|native|guests|report|compare [FILE] [--quick]"),
    }
}

/// Real data everywhere: reading holes would cheat.
fn fill(path: &Path) {
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 3) as u8 | 1).collect();
    std::fs::write(path, data.repeat((FILE_SIZE >> 20) as usize)).unwrap();
}

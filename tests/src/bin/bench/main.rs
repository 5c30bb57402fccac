//! The benchmarks of `make bench`: minivmm beside QEMU's microvm and the host itself, in one run on one file.
//!
//! `bench native [REPETITIONS]`: a guest of our own that polls at native speed, on any /dev/kvm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark reports by panicking")]

mod monitors;
mod native;

use std::path::{Path, PathBuf};

/// Bytes of the file under test.
const FILE_SIZE: u64 = 256 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let repetitions = arguments.get(1).map_or(5, |text| text.parse().expect("a number of repetitions"));
    match arguments.first().map(String::as_str) {
        Some("native") => native::run(repetitions),
        _ => panic!("usage: bench native [REPETITIONS]"),
    }
}

/// Where files under test go: one in memory, one on disk.
fn places() -> [(&'static str, PathBuf); 2] {
    let on_disk = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    [("memory", PathBuf::from("/dev/shm")), ("disk", on_disk)]
}

/// Real data everywhere: reading holes would cheat.
fn fill(path: &Path) {
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 3) as u8 | 1).collect();
    std::fs::write(path, data.repeat((FILE_SIZE >> 20) as usize)).unwrap();
}

/// The middle one, and half the distance between the extremes in percent of it.
fn median(values: &[f64]) -> (f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else { return (f64::NAN, f64::NAN) };
    let median = sorted[sorted.len() / 2];
    (median, (last - first) / 2.0 / median * 100.0)
}

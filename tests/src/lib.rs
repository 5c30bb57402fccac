//! Tests of the real binary: what it takes to run `minivmm` with a guest and to see what both do.
//!
//! Two kinds of guest:
//! - [`guest`]: a few hundred bytes of our own that poll and need no interrupts. They run on any /dev/kvm in
//!   milliseconds; the tests that use them belong to the binary's own package (`cli/tests`), so that `cargo test` always
//!   builds what they run.
//! - [`linux`]: `tests/guests`, by `make test-guests`.
//!
//! A harness reports by panicking; nothing here is part of minivmm.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by panicking"
)]

pub mod files;
pub mod gdb;
pub mod guest;
pub mod holdings;
pub mod host_disk;
pub mod image;
pub mod linux;
pub mod perfetto;
pub mod polling;
pub mod qmp;
pub mod random;
pub mod refusal;
pub mod session;
pub mod ten_lines;
pub mod transcript;
pub mod xml;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long anything that takes milliseconds may take before a test gives up, on the most loaded of machines.
pub const BOUND: Duration = Duration::from_secs(180);

/// The binary under test: `MINIVMM_BIN`, or the one that cargo put beside the running test.
pub fn binary() -> PathBuf {
    let path = std::env::var_os("MINIVMM_BIN").map_or_else(beside_this_test, PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: build it first with `cargo build -p minivmm` (in the same profile), or name it in MINIVMM_BIN",
        path.display()
    );
    path
}

/// Tests are in `target/PROFILE/deps`, binaries in `target/PROFILE`.
fn beside_this_test() -> PathBuf {
    let program = std::env::current_exe().expect("a running program has a path");
    let directory = program.ancestors().skip(1).find(|directory| !directory.ends_with("deps"));
    directory.expect("a program is in a directory").join("minivmm")
}

/// How many runs a test of random moments makes: `short` in CI, `whole` under `make soak` (`MINIVMM_SOAK=1`).
pub fn runs(short: u32, whole: u32) -> u32 {
    if std::env::var_os("MINIVMM_SOAK").is_some() { whole } else { short }
}

/// How long a test that has no end of its own goes on: `short` in CI, what `make soak T=1h` says otherwise.
pub fn soak_time(short: Duration) -> Duration {
    let Ok(text) = std::env::var("MINIVMM_SOAK_TIME") else { return short };
    let digits = text.trim_end_matches(['s', 'm', 'h']);
    let unit = match &text[digits.len()..] {
        "h" => 3600,
        "m" => 60,
        _ => 1,
    };
    let number: u64 = digits.parse().unwrap_or_else(|_| panic!("{text}: write 90s, 10m or 1h"));
    Duration::from_secs(number * unit)
}

/// `minivmm ARGUMENTS...`, yet to be started.
pub fn minivmm<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments);
    command
}

/// A small guest, entered through PVH, yet to be started: in `directory`, which gets its kernel image.
pub fn small_guest(directory: &Path, program: guest::Program) -> Command {
    std::fs::write(directory.join("guest.elf"), image::pvh(program)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "32M"]);
    command.current_dir(directory);
    command
}

/// Standard error without the warning that this CPU has no hardware virtualization, which every test may see.
pub fn unexpected_lines(errors: &str) -> Vec<&str> {
    errors
        .lines()
        .filter(|line| !line.contains("does not support hardware virtualization"))
        .collect()
}

/// Reports that the calling test is skipped, and why. The caller returns after it.
///
/// libtest knows no skipped tests, counts this one as passed and shows no output of it. The report therefore goes past
/// libtest's capture, straight to standard error, on a line of its own that starts with `skipped: `: `.ci/run` counts
/// those lines, and takes them off the number of passed tests. A test prints at most one.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    // With one test thread, libtest runs tests on the main thread, and has printed the test's name already.
    let test = thread.name().unwrap_or("main");
    // One write, so that lines of tests that run at the same time do not mix.
    let _ = std::io::stderr().write_all(format!("\nskipped: {test}: {reason}\n").as_bytes());
}

/// Whether the CPU has hardware virtualization, emulated or not. Without, KVM interprets guests and does not know every instruction.
pub fn has_hardware_virtualization() -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpu.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag))
}

/// Whether guests can run here. Reports the test as skipped when they cannot: it then returns early.
pub fn kvm_is_usable() -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            skip(&format!("cannot open /dev/kvm: {error}"));
            false
        }
    }
}

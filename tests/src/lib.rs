//! Tests of the real binary: what it takes to run `minivmm` with a guest and to see what both do.
//!
//! Two kinds of guest:
//! - [`guest`]: a few hundred bytes of our own that poll and need no interrupts. They run on any /dev/kvm in
//!   milliseconds; the tests that use them belong to the binary's own package (`cli/tests`), so that `cargo test` always
//!   builds what they run.
//! - [`linux`]: `tests/guests`, by `make test-guests`.
//!
//! A harness reports by panicking; nothing here is part of minivmm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]

pub mod files;
pub mod guest;
pub mod image;
pub mod linux;
pub mod polling;
pub mod qmp;
pub mod session;
pub mod transcript;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long anything that takes milliseconds may take before a test gives up, on the most loaded of machines.
pub const BOUND: Duration = Duration::from_secs(60);

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

/// The lines that a user who knows the machine would not expect: all of standard error but the warning that this
/// processor lends no virtualisation.
pub fn unexpected_lines(errors: &str) -> Vec<&str> {
    errors.lines().filter(|line| !line.contains("lends no virtualisation")).collect()
}

/// Whether guests can run here. Says so when they cannot: the test then returns early.
pub fn kvm_is_usable() -> bool {
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        println!("skipped: /dev/kvm cannot be opened here");
    }
    usable
}

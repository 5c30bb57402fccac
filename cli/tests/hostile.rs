//! Guests that only mean harm: whatever they do without end, the process stays as large as it was and can be ended.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use rustix::process::Signal;
use tempfile::tempdir;

/// Most that resident memory and the address space may grow by: what allocators and the guest's own 32 MiB of memory touch late.
const GROWTH_KIB: u64 = 4096;

/// What the process has of the host. All of it can be read by an ordinary user, to whom `/proc/PID/fd` and `maps` of a confined
/// process are closed: it is not dumpable.
struct Holdings {
    descriptors: u64,
    threads: usize,
    resident_kib: u64,
    address_space_kib: u64,
}

impl Holdings {
    fn of(session: &Session) -> Self {
        let process = Path::new("/proc").join(session.id().to_string());
        let status = fs::read_to_string(process.join("status")).unwrap();
        let kib = |field| {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Self {
            // The size of this directory is the number of descriptors (Linux 6.2).
            descriptors: fs::metadata(process.join("fd")).unwrap().len(),
            threads: fs::read_dir(process.join("task")).unwrap().count(),
            resident_kib: kib("VmRSS:"),
            address_space_kib: kib("VmSize:"),
        }
    }

    fn assert_same(&self, session: &Session, what: &str) {
        let now = Self::of(session);
        assert_eq!((now.descriptors, now.threads), (self.descriptors, self.threads), "{what}");
        for (now, before) in
            [(now.resident_kib, self.resident_kib), (now.address_space_kib, self.address_space_kib)]
        {
            let grown = now.saturating_sub(before);
            assert!(grown < GROWTH_KIB, "{what}: grown by {grown} KiB");
        }
    }
}

/// Each reset of the driver once cost an io_uring, descriptors and threads, which a confined process cannot make.
#[test]
fn a_driver_that_resets_without_end_makes_nothing_on_the_host() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    for aio in ["io_uring", "threads"] {
        let disk = format!("disk.img,num-queues=2,aio={aio}");
        let mut command = small_guest(directory.path(), Program::ResetStorm);
        let session = Session::start(command.args(["--disk", &disk]));
        session.output.expect_bytes(100, BOUND).unwrap();
        let before = Holdings::of(&session);
        session.output.expect_bytes(1100, BOUND).unwrap();
        before.assert_same(&session, aio);
        session.signal(Signal::TERM);
        let ended = session.wait(BOUND).must_be(0);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    }
}

/// Rounds of the guest that does everything wrong: 2,048 accesses each.
const ROUNDS: usize = 12;
/// Lines that a guest may cause: each kind of message comes 10 times, and then once a second at most.
const LINES_MAX: usize = 400;

/// Registers of any width, rings that name themselves, the hole, devices and the end of RAM, ports: the disk works again after
/// a reset each time, control clients are answered, and nothing grows.
#[test]
fn a_guest_that_does_everything_wrong_hurts_itself_alone() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    for options in ["", ",aio=threads,werror=stop,rerror=stop"] {
        let mut command = small_guest(directory.path(), Program::Chaos);
        let disk = format!("--disk=disk.img,num-queues=2{options}");
        command.args([&disk, "--qmp", "unix:qmp", "--debug-exit"]);
        let session = Session::start(&mut command);
        session.output.expect_bytes(ROUNDS / 4, BOUND).unwrap();
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        let before = Holdings::of(&session);
        session.output.expect_bytes(ROUNDS, BOUND).unwrap();
        before.assert_same(&session, options);
        assert_eq!(qmp.query("query-status")["status"], "running", "{options}");
        session.signal(Signal::TERM);
        // 4: the guest did not choose a status, by which it would report a step that failed.
        let ended = session.wait(BOUND).must_be(4);
        let lines = ended.errors.lines().count();
        assert!(lines < LINES_MAX, "{options}: {lines} lines");
    }
}

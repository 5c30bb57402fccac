//! Guests that only mean harm: whatever they do without end, the process stays as large as it was and can be ended.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::time::Instant;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{Program, words};
use minivmm_tests::holdings::Holdings;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use rustix::process::Signal;
use tempfile::tempdir;

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
        let before = Holdings::of(session.id());
        session.output.expect_bytes(1100, BOUND).unwrap();
        before.assert_same(session.id(), aio);
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
        let before = Holdings::of(session.id());
        session.output.expect_bytes(ROUNDS, BOUND).unwrap();
        before.assert_same(session.id(), options);
        assert_eq!(qmp.query("query-status")["status"], "running", "{options}");
        session.signal(Signal::TERM);
        // 4: the guest did not choose a status, by which it would report a step that failed.
        let ended = session.wait(BOUND).must_be(4);
        let lines = ended.errors.lines().count();
        assert!(lines < LINES_MAX, "{options}: {lines} lines");
    }
}

/// Sectors that the honest vCPU of [`Program::BesideChaos`] writes.
const HONEST_SECTORS: usize = 64;

/// What one vCPU does to its disk is nothing to the other one, which has a disk of its own: all that it writes comes back, and is
/// in the image. The process does not grow.
#[test]
fn a_hostile_vcpu_hurts_no_honest_one() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let honest_output = directory.path().join("honest");
    let honest_rounds = || fs::metadata(&honest_output).map_or(0, |file| file.len());
    for name in ["disk.img", "honest.img"] {
        sparse(&directory.path().join(name), 1 << 20);
    }
    let mut command = small_guest(directory.path(), Program::BesideChaos);
    command.args(["--cpus", "2", "--qmp", "unix:qmp", "--debug-exit", "--console", "stdio"]);
    command.args(["--console", "file:honest", "--disk", "disk.img", "--disk", "honest.img"]);
    let session = Session::start(&mut command);
    if let Err(error) = session.output.expect_bytes(ROUNDS / 4, BOUND) {
        panic!("{error}: {}", session.wait(BOUND));
    }
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let before = Holdings::of(session.id());
    session.output.expect_bytes(ROUNDS, BOUND).unwrap();
    let deadline = Instant::now() + BOUND;
    while honest_rounds() < 2 * HONEST_SECTORS as u64 {
        assert!(Instant::now() < deadline, "{} honest rounds", honest_rounds());
        std::thread::yield_now();
    }
    before.assert_same(session.id(), "beside an honest vCPU");
    qmp.query("stop");
    let image = fs::read(directory.path().join("honest.img")).unwrap();
    for (sector, bytes) in image.chunks(512).take(HONEST_SECTORS).enumerate() {
        let first = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert!(bytes == words(first, 128), "sector {sector}");
        // The words count up from 128 times the round.
        assert_eq!((first % 128, first as usize / 128 % HONEST_SECTORS), (0, sector));
    }
    qmp.query("cont");
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(4);
    let lines = ended.errors.lines().count();
    assert!(lines < LINES_MAX, "{lines} lines");
}

//! The ways a machine ends, each with its exit status, and no more words than are needed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, DISK_SECTORS, Program, words};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use rustix::process::Signal;
use tempfile::tempdir;

#[test]
fn by_the_guest_or_the_clock() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let table: &[(Program, &[&str], i32, &str)] = &[
        (Program::PowerOff, &[], 0, ""),
        (Program::Reset, &[], 0, ""),
        (Program::ResetI8042, &[], 0, ""),
        (Program::Panic, &[], 3, "the guest panicked (it said so at the pvpanic port)"),
        (Program::TripleFault, &[], 3, "the guest panicked (triple fault)"),
        (Program::RebootTripleFault, &[], 0, ""),
        (Program::RebootBios, &[], 0, ""),
        (Program::Init, &[], 0, ""),
        (Program::Init, &["--cpus", "2"], 0, ""),
        (Program::Exit, &["--debug-exit"], guest::SUCCESS, ""),
        (Program::Unmapped, &["--debug-exit"], guest::SUCCESS, ""),
        (
            Program::PowerOff,
            &["--debug-exit"],
            4,
            "--debug-exit: the guest ended without writing a byte",
        ),
        (
            Program::Reset,
            &["--debug-exit"],
            4,
            "--debug-exit: the guest ended without writing a byte",
        ),
        (Program::Panic, &["--debug-exit"], 3, "the guest panicked"),
        // The port is closed unless asked for.
        (Program::Exit, &["--timeout", "200ms"], 124, "--timeout"),
        (Program::Spin, &["--timeout", "200ms"], 124, "--timeout"),
        (Program::Spin, &["--timeout", "200ms", "--cpus", "4"], 124, "--timeout"),
    ];
    for (program, options, status, says) in table {
        let ended = Session::start(small_guest(directory.path(), *program).args(*options))
            .wait(BOUND)
            .must_be(*status);
        let lines = unexpected_lines(&ended.errors);
        match lines[..] {
            [] => assert!(says.is_empty(), "{program:?} says nothing"),
            [line] => assert!(!says.is_empty() && line.contains(says), "{program:?}: {line}"),
            _ => panic!("{program:?}: more than one line: {lines:?}"),
        }
    }
}

/// As under `2>&1 | head`, and under `2>&1 | less`.
#[test]
fn messages_without_a_reader_do_not_delay_the_end() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (reader, gone) = std::io::pipe().unwrap();
    drop(reader);
    let (_reader, mut full) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&full, 4096).unwrap();
    full.write_all(&[b'x'; 4096]).unwrap();
    let table: &[(Program, &[&str], i32)] = &[
        (Program::PowerOff, &["--verbose"], 0),
        (Program::PowerOff, &["--console", "pty", "--boot-timing"], 0),
        (Program::PowerOff, &["--cpus", "0"], 2),
        (Program::Panic, &[], 3),
        (Program::Spin, &["--timeout", "200ms"], 124),
    ];
    for (stderr, pty) in [(gone, true), (full, false)] {
        for (program, options, status) in table {
            // The pty's name is a line that its user waits for.
            if !pty && options.contains(&"pty") {
                continue;
            }
            let mut command = small_guest(directory.path(), *program);
            command
                .args(*options)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(stderr.try_clone().unwrap());
            let mut child = command.spawn().unwrap();
            let deadline = Instant::now() + BOUND;
            let ended = loop {
                match child.try_wait().unwrap() {
                    Some(ended) => break ended,
                    None if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                    None => {
                        child.kill().unwrap();
                        panic!("{program:?} {options:?}: it does not end");
                    }
                }
            };
            assert_eq!(ended.code(), Some(*status), "{program:?} {options:?}");
        }
    }
}

/// As `halt -f` does: without a word the user would wait for the end of a machine that only looks alive.
#[test]
fn a_guest_that_halted_for_good_is_reported_once_until_a_reset() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Halt);
    let session = Session::start(command.args(["--cpus", "2", "--qmp", "unix:socket"]));
    let mut qmp = Qmp::connect(&directory.path().join("socket"));
    let line =
        "the guest has halted for good: every vCPU waits with interrupts disabled; end the VM";
    session.expect_error(line, BOUND);
    qmp.query("system_reset");
    session.expect_error(line, BOUND);
    assert_eq!(qmp.query("query-status")["status"], "running");
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(0);
    assert_eq!(ended.errors.matches(line).count(), 2, "{ended}");
}

#[test]
fn by_a_signal() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for (signal, status) in [
        (Signal::TERM, 0),
        (Signal::INT, 0),
        (Signal::HUP, 0),
        (Signal::QUIT, 0),
        (Signal::KILL, 128 + 9),
    ] {
        let session = Session::start(&mut small_guest(directory.path(), Program::Echo));
        session.expect("ready\n", BOUND);
        session.signal(signal);
        let ended = session.wait(BOUND).must_be(status);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    }
}

/// A program that waits for the guest's byte must not take the VM's end for the guest's success.
#[test]
fn by_a_signal_instead_of_the_guests_byte() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let mut command = small_guest(directory.path(), Program::Echo);
        let session = Session::start(command.arg("--debug-exit"));
        session.expect("ready\n", BOUND);
        session.signal(signal);
        let ended = session.wait(BOUND).must_be(4);
        let lines = unexpected_lines(&ended.errors);
        assert!(
            matches!(lines[..], [line] if line.contains("--debug-exit: a signal ended the VM")),
            "{ended}"
        );
    }
}

/// What the guest was told is written is in the image, whatever moment the end comes at; and the image can be used again
/// at once.
#[test]
fn by_a_signal_while_the_guest_writes() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    for (signal, status, acknowledged) in [(Signal::TERM, 0, 50), (Signal::KILL, 128 + 9, 75)] {
        sparse(&image, 64 << 20);
        let mut command = small_guest(directory.path(), Program::DiskLoad);
        let session = Session::start(command.args(["--disk", "disk.img"]));
        session.output.expect_bytes(acknowledged, BOUND).unwrap();
        session.signal(signal);
        let ended = session.wait(BOUND).must_be(status);
        let content = fs::read(&image).unwrap();
        let dots = u32::try_from(ended.output.len()).unwrap();
        for sector in 0..dots {
            let at = sector as usize * 512;
            assert!(
                content[at..at + 512] == words(sector, 128),
                "sector {sector} of {dots} is not in the image"
            );
        }
    }
}

#[test]
fn a_disk_of_the_same_name_can_be_used_right_after() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), DISK_SECTORS * 512);
    for _ in 0..3 {
        let options = ["--disk", "disk.img", "--debug-exit"];
        let ended = Session::start(small_guest(directory.path(), Program::DiskLoad).args(options))
            .wait(BOUND);
        assert_eq!(ended.must_be(guest::SUCCESS).output.len(), DISK_SECTORS as usize);
    }
}

/// As systemd's `Type=notify` waits for it.
#[test]
fn a_service_manager_is_told_when_the_guest_runs() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind(directory.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    let mut command = small_guest(directory.path(), Program::PowerOff);
    let session = Session::start(command.env("NOTIFY_SOCKET", "notify"));
    let mut message = [0; 64];
    let length = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1");
    session.wait(BOUND).must_be(0);
}

//! The ways a machine ends, each with its exit status, and no more words than are needed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, DISK_SECTORS, Program, words};
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
        (Program::Exit, &["--debug-exit"], guest::SUCCESS, ""),
        (Program::Unmapped, &["--debug-exit"], guest::SUCCESS, ""),
        // The port is closed unless asked for.
        (Program::Exit, &["--timeout", "200ms"], 124, "--timeout"),
        (Program::Spin, &["--timeout", "200ms"], 124, "--timeout"),
        (Program::Spin, &["--timeout", "200ms", "--cpus", "4"], 124, "--timeout"),
    ];
    for (program, options, status, says) in table {
        let ended = Session::start(small_guest(directory.path(), *program).args(*options)).wait(BOUND).must_be(*status);
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
fn nobody_reads_what_is_said() {
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
            command.args(*options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.try_clone().unwrap());
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

#[test]
fn by_a_signal() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for (signal, status) in
        [(Signal::TERM, 0), (Signal::INT, 0), (Signal::HUP, 0), (Signal::QUIT, 0), (Signal::KILL, 128 + 9)]
    {
        let session = Session::start(&mut small_guest(directory.path(), Program::Echo));
        session.expect("ready\n", BOUND);
        session.signal(signal);
        let ended = session.wait(BOUND).must_be(status);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
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
        let session = Session::start(small_guest(directory.path(), Program::DiskLoad).args([
            "--disk",
            "disk.img",
            "--debug-exit",
        ]));
        session.output.expect_bytes(acknowledged, BOUND).unwrap();
        session.signal(signal);
        let ended = session.wait(BOUND).must_be(status);
        let content = fs::read(&image).unwrap();
        let dots = u32::try_from(ended.output.len()).unwrap();
        for sector in 0..dots {
            let at = sector as usize * 512;
            assert!(content[at..at + 512] == words(sector, 128), "sector {sector} of {dots} is not in the image");
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
        let ended = Session::start(small_guest(directory.path(), Program::DiskLoad).args(options)).wait(BOUND);
        assert_eq!(ended.must_be(guest::SUCCESS).output.len(), DISK_SECTORS as usize);
    }
}

//! `--exec` without Linux: a small guest that speaks as the script in a Linux guest does, and guests that end without a status.
//! What a real shell does is in `tests/tests/guests/exec.rs`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{JOB_ROUNDS, Program};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest};
use rustix::process::Signal;
use tempfile::tempdir;

fn exec(directory: &Path, program: Program) -> Command {
    sparse(&directory.join("root.img"), 1 << 20);
    let mut command = small_guest(directory, program);
    command.args(["--disk", "root.img", "--exec", "true", "--console", "none"]);
    command
}

/// More than any buffer on the way holds, for a reader that begins late.
#[test]
fn every_byte_of_the_output_arrives_however_slow_the_reader() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let session = Session::start_on(exec(directory.path(), Program::Job).stdout(writer));
    let mut begin = [0; 1];
    std::io::Read::read_exact(&mut reader, &mut begin).unwrap();
    let mut output = begin.to_vec();
    std::io::Read::read_to_end(&mut reader, &mut output).unwrap();
    session.wait(BOUND).must_be(7);
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(output.len(), 256 * JOB_ROUNDS);
    assert!(output.chunks(256).all(|chunk| chunk == all), "the output differs");
}

#[test]
fn output_without_a_reader_or_room_is_an_error() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Session::start_on(exec(directory.path(), Program::Job).stdout(writer)).wait(BOUND);
    let ended = ended.must_be(1);
    assert!(ended.errors.contains("cannot write the command's output: Broken pipe"), "{ended}");

    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = Session::start_on(exec(directory.path(), Program::Job).stdout(full)).wait(BOUND);
    let ended = ended.must_be(1);
    assert!(ended.errors.contains("write the command's output: No space left"), "{ended}");
}

#[test]
fn an_end_without_a_status_is_no_success() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let table: &[(Program, i32, &str)] = &[
        (
            Program::PowerOff,
            4,
            "--exec: the guest powered off before the command's status was known",
        ),
        (Program::Reset, 4, "--exec: the guest rebooted before the command's status was known"),
        (Program::Panic, 3, "the guest panicked"),
        (Program::TripleFault, 3, "the guest panicked"),
        (Program::Spin, 124, "--timeout"),
        // The debug-exit port is closed.
        (Program::Exit, 124, "--timeout"),
    ];
    for (program, status, says) in table {
        let mut command = exec(directory.path(), *program);
        if *status == 124 {
            command.args(["--timeout", "1s"]);
        }
        let ended = Session::start(&mut command).wait(BOUND).must_be(*status);
        assert!(ended.errors.contains(says), "{program:?}: {ended}");
        let hint =
            "--exec: the guest did not start the command: its root file system needs /bin/sh";
        assert!(ended.errors.contains(hint), "{program:?}: {ended}");
    }
}

#[test]
fn an_end_by_a_user_is_no_success() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for signal in [Some(Signal::TERM), Some(Signal::INT), None] {
        let mut command = exec(directory.path(), Program::Spin);
        let session = Session::start(command.args(["--qmp", "unix:qmp"]));
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        match signal {
            Some(signal) => session.signal(signal),
            None => drop(qmp.execute("quit", serde_json::json!({}))),
        }
        let ended = session.wait(BOUND).must_be(4);
        let says = "--exec: the VM was ended before the command's status was known";
        assert!(ended.errors.contains(says), "{ended}");
    }
}

/// A second console is the guest's second serial port, apart from the first.
#[test]
fn the_second_console_is_the_second_serial_port() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::SecondPort);
    command.args(["--debug-exit", "--console", "stdio", "--console", "file:second"]);
    let mut session = Session::start(&mut command);
    session.expect("ready\n", BOUND);
    session.send("x\x04");
    let ended = session.wait(BOUND).must_be(minivmm_tests::guest::SUCCESS);
    assert_eq!(ended.output, b"ready\nx");
    assert_eq!(fs::read(directory.path().join("second")).unwrap(), b"second\n");
}

/// The guest sees a copy of the directory; nothing is written to the directory, and no file is left behind.
#[test]
fn a_directory_becomes_a_disk() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir_all(at("-dir/sub")).unwrap();
    fs::create_dir(at("tmp")).unwrap();
    fs::write(at("-dir/sub/file"), "content").unwrap();
    fs::write(at("-dir/large"), vec![7; 3 << 20]).unwrap();
    for n in 0..2000 {
        fs::write(at(&format!("-dir/sub/small-{n}")), [n as u8]).unwrap();
    }
    for (options, read_only) in [("", true), (",snapshot=on", false)] {
        let mut command = small_guest(directory.path(), Program::Spin);
        // Confined, the process is not dumpable: only root could look at its image.
        command.args([&format!("--disk=-dir{options}"), "--qmp", "unix:qmp", "--sandbox", "off"]);
        let session = Session::start(command.env("TMPDIR", at("tmp")));
        let mut qmp = Qmp::connect(&at("qmp"));
        let disk = &qmp.query("query-block")[0];
        assert_eq!(disk["inserted"]["ro"], read_only, "{disk:#}");
        let number = disk["inserted"]["file"].as_str().unwrap().rsplit('/').next().unwrap();
        let image = format!("/proc/{}/fd/{number}", session.id());
        for (file, content) in [("/sub/file", "content"), ("/sub/small-65", "A")] {
            let shown =
                Command::new("debugfs").args(["-R", &format!("cat {file}"), &image]).output();
            assert_eq!(String::from_utf8_lossy(&shown.unwrap().stdout), content, "{file}");
        }
        let checked = Command::new("e2fsck").args(["-fn", &image]).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        let mut save = minivmm_tests::minivmm(["ctl", "qmp", "save", "saved"]);
        let saved = Session::start(save.current_dir(directory.path())).wait(BOUND).must_be(1);
        let why =
            if read_only { "has no path that another" } else { "snapshot=on writes to a file" };
        assert!(saved.errors.contains(why), "{saved}");
        session.signal(Signal::TERM);
        let ended = session.wait(BOUND).must_be(0);
        assert!(ended.errors.contains("minivmm: --disk -dir: made an ext4 image of "), "{ended}");
        assert_eq!(fs::read_dir(at("tmp")).unwrap().count(), 0, "a file is left behind");
    }
}

#[test]
fn a_directory_that_cannot_become_a_disk_is_refused() {
    let directory = tempdir().unwrap();
    fs::create_dir(directory.path().join("dir")).unwrap();
    let table: &[(&str, &str, i32, &str)] = &[
        (
            "dir,format=qcow2",
            "/tmp",
            2,
            "--disk dir: a directory becomes an ext4 image; leave out format=qcow2",
        ),
        (
            "dir",
            "/no/such",
            1,
            "--disk dir: cannot make an image in /no/such (set TMPDIR to a directory with space): No such file",
        ),
    ];
    for (disk, temporary, status, says) in table {
        let mut command = small_guest(directory.path(), Program::PowerOff);
        command.args(["--disk", disk]).env("TMPDIR", temporary);
        let ended = Session::start(&mut command).wait(BOUND).must_be(*status);
        assert!(ended.errors.starts_with(&format!("minivmm: {says}")), "{ended}");
        assert_eq!(ended.errors.lines().count(), 1, "{ended}");
    }
}

/// The output and the status belong to the process that began the command.
#[test]
fn a_machine_that_runs_a_command_cannot_be_saved() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = exec(directory.path(), Program::Spin);
    let _session = Session::start(command.args(["--qmp", "unix:qmp"]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let refused = qmp.execute("migrate", serde_json::json!({ "uri": "file:saved" })).unwrap_err();
    assert_eq!(refused.1, "a machine that runs --exec cannot be saved");
    assert!(!directory.path().join("saved").exists());
}

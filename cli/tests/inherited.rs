//! What a parent process can leave behind: signal masks and dispositions, closed descriptors, a umask, limits, a working
//! directory that is gone. In each case the VM runs, ends and leaves its files as it always does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest};
use rustix::process::Signal;
use tempfile::tempdir;

/// minivmm behind a shell that leaves something behind and then runs it by `exec "$@"`.
fn child_of(shell: &str, directory: &Path, program: Program) -> Command {
    let vm = small_guest(directory, program);
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh"]).arg(vm.get_program());
    command.args(["--kernel".into(), directory.join("guest.elf")]);
    command.args(["--memory", "32M"]).current_dir(directory);
    command
}

/// A guest that never leaves the vCPU by itself ends at once when the user wants it to.
#[test]
fn signals_end_the_vm_whatever_the_parent_blocked_or_ignored() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join("socket");
    for (shell, signal) in [
        ("exec env --block-signal \"$@\"", Signal::TERM),
        ("exec env --block-signal \"$@\"", Signal::INT),
        ("exec env --ignore-signal \"$@\"", Signal::TERM),
        ("exec env --ignore-signal --block-signal \"$@\"", Signal::QUIT),
        ("exec env --default-signal \"$@\"", Signal::HUP),
        ("trap '' INT QUIT; exec \"$@\"", Signal::INT),
    ] {
        let mut command = child_of(shell, directory.path(), Program::Spin);
        let session = Session::start(command.args(["--cpus", "2", "--qmp", "unix:socket"]));
        // The guest runs, and its vCPUs can be taken out of it.
        let mut qmp = Qmp::connect(&socket);
        qmp.query("stop");
        qmp.query("cont");
        session.signal(signal);
        // A vCPU that cannot be taken out of the guest makes it 1.
        session.wait(BOUND).must_be(0);
    }
}

/// Sends the signal of this number, which may be one without a name (SIGRTMIN+3 and others).
fn send(session: &Session, signal: i32) {
    let sent = Command::new("kill").args([format!("-{signal}"), session.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Each signal that Linux has, by its number (signal(7)): no default action ends a VM without its disks having been flushed.
#[test]
fn every_signal_ends_the_vm_cleanly_or_does_nothing_unless_it_means_a_crash() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let start = |shell| {
        let mut command = child_of(shell, directory.path(), Program::Echo);
        let mut session = Session::start(&mut command);
        session.expect("ready\n", BOUND);
        session.send("x");
        session.expect("x", BOUND);
        session
    };
    // The last three stand for those from SIGRTMIN to SIGRTMAX.
    let ends = [1, 2, 3, 10, 12, 14, 15, 16, 24, 26, 27, 30, 34, 37, 64];
    for signal in ends {
        let session = start("exec \"$@\"");
        send(&session, signal);
        let ended = session.wait(BOUND);
        assert_eq!(ended.code(), 0, "signal {signal}: {ended}");
        let line = format!("minivmm: signal {signal} ended the VM; `kill -l {signal}` names it");
        let is_known = [1, 2, 3, 15].contains(&signal);
        assert!(ended.errors.contains(&line) != is_known, "signal {signal}: {ended}");
    }
    // The kernel's own: at the hard limit it would kill the VM.
    let ended = start("ulimit -t 2; exec \"$@\"").wait(BOUND);
    assert_eq!(ended.code(), 0, "{ended}");
    assert!(ended.errors.contains("signal 24 ended the VM"), "{ended}");
    // What the parent ignores stays ignored, but for the signals by which users end a VM.
    let mut session = start("exec env --ignore-signal \"$@\"");
    let always = [2, 3, 15];
    for signal in [13, 17, 18, 23, 25, 28, 29].into_iter().chain(ends) {
        if !always.contains(&signal) {
            send(&session, signal);
        }
    }
    session.send("still here");
    session.expect("still here", BOUND);
    send(&session, 15);
    session.wait(BOUND).must_be(0);
    // Crashes: systemd's watchdog sends SIGABRT for a core dump. (Rust's library handles SIGBUS and SIGSEGV.)
    for signal in [4, 5, 6, 8, 31] {
        let session = start("ulimit -c 0; exec \"$@\"");
        send(&session, signal);
        session.wait(BOUND).must_be(128 + signal);
    }
}

/// nohup keeps its promise: the terminal's end is not the VM's.
#[test]
fn an_ignored_hangup_stays_ignored() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = child_of("trap '' HUP; exec \"$@\"", directory.path(), Program::Echo);
    let mut session = Session::start(command.arg("--debug-exit"));
    session.expect("ready\n", BOUND);
    session.signal(Signal::HUP);
    session.send("still here");
    session.expect("still here", BOUND);
    session.send([4]);
    session.wait(BOUND).must_be(guest::SUCCESS);
}

/// What is printed must not land in a file that got the number of a standard descriptor; and a VM whose home is gone, or that
/// starts with few descriptors, works.
#[test]
fn the_guest_runs_and_its_disk_holds_what_it_wrote() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let written: Vec<u8> =
        (0..guest::DISK_SECTORS as u32).flat_map(|sector| guest::words(sector, 128)).collect();
    for shell in [
        "exec \"$@\" <&-",
        "exec \"$@\" >&-",
        "exec \"$@\" 2>&-",
        "exec \"$@\" <&- >&- 2>&-",
        "exec \"$@\" </dev/null >/dev/full 2>/dev/full",
        "mkdir gone && cd gone && rmdir ../gone && exec \"$@\"",
        "cd / && exec \"$@\"",
        "ulimit -S -n 20; exec \"$@\"",
        "ulimit -S -s 64; exec \"$@\"",
        "umask 777; exec \"$@\"",
        "exec env -i \"$@\"",
    ] {
        sparse(&image, guest::DISK_SECTORS * 512);
        let mut command = child_of(shell, directory.path(), Program::DiskLoad);
        command.args(["--debug-exit", "--verbose", "--cpus", "8", "--disk"]).arg(&image);
        Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS);
        assert!(fs::read(&image).unwrap() == written, "{shell}: the image has other content");
    }
}

#[test]
fn a_stack_that_is_too_small_is_said_in_one_line() {
    let directory = tempdir().unwrap();
    for kibibytes in [64, 128] {
        let shell = format!("ulimit -s {kibibytes}; exec \"$@\"");
        let mut command = child_of(&shell, directory.path(), Program::Exit);
        let ended = Session::start(&mut command).wait(BOUND).must_be(1);
        assert_eq!(
            ended.errors,
            "minivmm: the stack is too small; set the limit on it (`ulimit -s`) to 256 KiB or more\n"
        );
    }
}

/// A limit on the size of files holds for what a command prints, too.
#[test]
fn output_beyond_the_limit_on_files_is_an_error() {
    let directory = tempdir().unwrap();
    let mut command =
        child_of("ulimit -f 1; exec \"$1\" --help >out", directory.path(), Program::Exit);
    let ended = Session::start(&mut command).wait(BOUND).must_be(1);
    assert_eq!(ended.errors, "minivmm: standard output: File too large (os error 27)\n");
}

#[test]
fn new_files_are_private_with_every_umask() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for umask in ["0", "22", "777"] {
        let shell = format!("umask {umask}; exec \"$@\"");
        let mut command = child_of(&shell, directory.path(), Program::Spin);
        let session =
            Session::start(command.args(["--console", "file:log", "--qmp", "unix:socket"]));
        let mut qmp = Qmp::connect(&directory.path().join("socket"));
        for name in ["log", "socket"] {
            let mode = fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name} with umask {umask}");
        }
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
        fs::remove_file(directory.path().join("log")).unwrap();
    }
}

//! A host that is short of something, for a while or for good: the VM waits, says so once, goes on, and can always be ended.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_tests::guest::{self, Program};
use minivmm_tests::refusal::{Call, ask, refuse, supervise};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, skip, small_guest, unexpected_lines};
use rustix::process::Signal;
use tempfile::tempdir;

/// The request of ioctl(2) that runs a vCPU.
const KVM_RUN: u32 = 0xae80;

/// minivmm behind a shell that changes a limit first.
fn limited(shell: &str, directory: &Path, program: Program) -> Command {
    let vm = small_guest(directory, program);
    let mut command = Command::new("bash");
    command.args(["-c", &format!("{shell}; exec \"$@\""), "bash"]).arg(vm.get_program());
    command.args(vm.get_args()).current_dir(directory);
    command
}

/// Any process of a user can use up the queue of real-time signals; the vCPUs leave the guest all the same.
#[test]
fn the_vm_ends_without_room_for_queued_signals() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = limited("ulimit -i 0", directory.path(), Program::EarlyEcho);
    let session = Session::start(command.args(["--cpus", "4"]));
    session.expect("early\n", BOUND);
    session.signal(Signal::TERM);
    // A vCPU that no signal reaches makes it 1.
    session.wait(BOUND).must_be(0);
}

/// What Linux 6.13 and later do while no task is left: KVM_RUN fails with EAGAIN, again and again.
#[test]
fn a_vcpu_that_kvm_cannot_run_is_said_once_and_can_be_ended() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Spin);
    let run = Call { number: libc::SYS_ioctl as u32, request: Some(KVM_RUN) };
    let session = Session::start(refuse(command.args(["--cpus", "2"]), run, libc::EAGAIN));
    session.expect_error("KVM_RUN: EAGAIN", BOUND);
    let cpu_time = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", session.id())).unwrap();
        let after_name = stat.rsplit(')').next().unwrap();
        let ticks = after_name.split_whitespace().skip(11).take(2);
        ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let (before, watched) = (cpu_time(), Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    // Ticks are hundredths of a second.
    let used = (cpu_time() - before) as f64 / 100.0 / watched.elapsed().as_secs_f64();
    assert!(used < 0.3, "it uses {used} of a CPU while it waits");
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(0);
    let lines = unexpected_lines(&ended.errors);
    assert_eq!(lines.len(), 1, "{ended}");
}

/// KVM_RUN fails with EAGAIN also when the guest wakes a vCPU that it has not started, as Linux does that stops the others after a panic.
#[test]
fn an_nmi_to_vcpus_that_wait_to_be_started_is_no_shortage() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Wake);
    let session = Session::start(command.args(["--debug-exit", "--cpus", "3"]));
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert_eq!(unexpected_lines(&ended.errors), [""; 0], "{ended}");
}

/// The host allows tasks again: the guest goes on.
#[test]
fn a_guest_goes_on_when_kvm_can_run_it_again() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Exit);
    let run = Call { number: libc::SYS_ioctl as u32, request: Some(KVM_RUN) };
    let session = Session::start(ask(command.arg("--debug-exit"), run));
    supervise(session.id(), libc::EAGAIN, 40);
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    let lines = unexpected_lines(&ended.errors);
    assert!(matches!(lines[..], [line] if line.contains("KVM_RUN: EAGAIN")), "{ended}");
}

#[test]
fn the_limit_on_open_files_is_raised() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = limited("ulimit -S -n 40", directory.path(), Program::EarlyEcho);
    let session = Session::start(&mut command);
    session.expect("early\n", BOUND);
    let limits = fs::read_to_string(format!("/proc/{}/limits", session.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[3], words[4], "{line}");
}

/// A full disk behind the console's file: the guest goes on, and what it prints later is not lost with what came before.
#[test]
fn a_console_that_fails_for_a_while_ends_nothing() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let options = ["--debug-exit", "--console", "file:/dev/full"];
    let mut command = small_guest(directory.path(), Program::Chatter);
    let ended = Session::start(command.args(options)).wait(BOUND).must_be(guest::SUCCESS);
    let lines = unexpected_lines(&ended.errors);
    assert!(lines.len() == 1 && lines[0].contains("the console cannot be written"), "{ended}");
}

/// Log rotation that copies and truncates the file: what follows begins at its start.
#[test]
fn a_console_log_can_be_truncated_and_has_a_limit() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let log = directory.path().join("log");
    let options =
        ["--debug-exit", "--console", "file:log,max=1000", "--qmp", "unix:qmp", "--paused"];
    let mut command = small_guest(directory.path(), Program::Chatter);
    let session = Session::start(command.args(options));
    let mut qmp = minivmm_tests::qmp::Qmp::connect(&directory.path().join("qmp"));
    File::options().append(true).open(&log).unwrap();
    fs::write(&log, "rotated\n").unwrap();
    qmp.query("cont");
    session.wait(BOUND).must_be(guest::SUCCESS);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.starts_with("rotated\nfifteen letters\n"), "{text}");
    assert!(text.len() < 1100 && text.contains("max= is reached"), "{text}");
}

/// imago logs each table that it gives up after a failed write, in its own words and without a limit.
#[test]
fn writes_that_fail_without_end_leave_a_few_lines() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "disk.img", "2M"];
    let mut qemu_img = Command::new("qemu-img");
    if !qemu_img.args(create).current_dir(directory.path()).status().is_ok_and(|it| it.success()) {
        return skip("no qemu-img here (Debian: qemu-utils)");
    }
    let mut command = limited("ulimit -f 200", directory.path(), Program::DiskLoad);
    let options = ["--debug-exit", "--disk", "disk.img,format=qcow2,werror=ignore"];
    let began = Instant::now();
    let ended = Session::start(command.args(options)).wait(BOUND);
    let lines = unexpected_lines(&ended.errors);
    assert!(lines.iter().any(|line| line.contains("File too large")), "{ended}");
    // One a second while the guest writes, and the result of the end.
    assert!(lines.len() as u64 <= began.elapsed().as_secs() + 4, "{ended}");
}

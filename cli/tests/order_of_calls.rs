//! What only a moment within the start, or another clock of the host, would show: strace(1) lists the system calls of a run, in
//! their order.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, skip, small_guest};
use tempfile::tempdir;

/// The calls of a VM with every kind of timer and socket, from its start to its end. `None`: no strace here.
fn calls(directory: &Path) -> Option<Vec<String>> {
    calls_with(directory, &[], &[])
}

/// The same of a VM with more options, which programs of the words `before` start.
fn calls_with(directory: &Path, before: &[&str], options: &[&str]) -> Option<Vec<String>> {
    if Command::new("strace").arg("-V").output().is_err() {
        skip("no strace here (Debian: strace)");
        return None;
    }
    sparse(&directory.join("disk.img"), 1 << 20);
    let vm = small_guest(directory, Program::DiskLoad);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o", "trace"]).args(before).arg(vm.get_program()).args(vm.get_args());
    strace.args(["--disk", "disk.img,throttling.iops-total=50", "--timeout", "10m"]);
    strace.args(["--qmp", "unix:qmp", "--console", "stdio", "--console", "unix:console"]);
    strace.args(options);
    let session = Session::start(strace.current_dir(directory));
    // More than the limit lets through at once.
    session.output.expect_bytes(10, BOUND).unwrap();
    Qmp::connect(&directory.join("qmp")).query("quit");
    session.wait(BOUND).must_be(0);
    let trace = fs::read_to_string(directory.join("trace")).unwrap();
    let calls = trace.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim()));
    // If another thread makes a call meanwhile, strace prints this one in two lines. The first has the arguments.
    Some(calls.map(|call| call.replace(" <unfinished ...>", ")")).collect())
}

/// Where the first call is that has all of `parts`.
#[track_caller]
fn position(calls: &[String], parts: &[&str]) -> usize {
    let found = calls.iter().position(|call| parts.iter().all(|part| call.contains(part)));
    found.unwrap_or_else(|| panic!("no {parts:?}"))
}

#[test]
fn no_wait_depends_on_the_hosts_wall_clock() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let Some(calls) = calls(directory.path()) else { return };
    let timers = calls.iter().filter(|call| call.starts_with("timerfd_create("));
    assert!(timers.clone().count() >= 3, "{calls:#?}");
    assert!(timers.clone().all(|call| call.contains("CLOCK_MONOTONIC")), "{timers:#?}");
    for call in &calls {
        let waits = ["futex(", "clock_nanosleep(", "timer_create(", "setitimer(", "alarm("];
        // Joining a thread names the clock, but no time.
        let has_limit = !call.contains(", NULL, FUTEX_BITSET_MATCH_ANY");
        let is_by_wall_clock =
            call.contains("CLOCK_REALTIME") && has_limit || call.contains("ITIMER_REAL");
        let waits = waits.iter().any(|name| call.starts_with(name));
        assert!(!(waits && is_by_wall_clock), "{call}");
    }
}

/// The limit covers what the files make of the start. Before that, `main` reads from each once, to see that its storage answers.
#[test]
fn the_time_limit_runs_before_any_file_is_opened() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let Some(calls) = calls(directory.path()) else { return };
    let armed = position(&calls, &["timerfd_settime(", "tv_sec=600"]);
    let opened = position(&calls, &["open", "/dev/kvm"]);
    assert!(armed < opened, "{} before {}", calls[opened], calls[armed]);
    for file in ["guest.elf", "disk.img"] {
        let opened = |call: &&String| call.contains("open") && call.contains(file);
        let before: Vec<_> = calls[..armed].iter().filter(opened).collect();
        assert!(before.len() == 1 && before[0].contains("O_RDONLY|O_NONBLOCK"), "{before:#?}");
        assert!(calls[armed..].iter().any(|call| opened(&call)), "{file} is not opened later");
    }
}

/// Between bind(2) and a later chmod(2), other users could connect.
#[test]
fn a_socket_is_private_before_it_has_a_name() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let Some(calls) = calls(directory.path()) else { return };
    for name in ["qmp", "console"] {
        let bind = position(&calls, &["bind(", &format!("\"{name}\"")]);
        let descriptor = calls[bind].trim_start_matches("bind(").split(',').next().unwrap();
        let (private, close) =
            (format!("fchmod({descriptor}, 0600"), format!("close({descriptor})"));
        let before = calls[..bind].iter().rev();
        let is_private = before
            .take_while(|call| !call.starts_with(&close))
            .any(|call| call.starts_with(&private));
        assert!(is_private, "{name}: {}", calls[bind]);
        assert!(!calls.iter().any(|call| call.starts_with("chmod(")));
    }
}

/// The kernel makes a process dumpable or not when its IDs change, as `fs.suid_dumpable` says, and forgets the signal that the process asked for
/// at its parent's end.
#[test]
fn what_the_kernel_resets_with_the_ids_is_set_after_them() {
    if !kvm_is_usable() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip("only root becomes another user");
    }
    let directory = tempdir().unwrap();
    let before = ["setpriv", "--pdeathsig", "TERM"];
    let user = ["--user", "1234:2345"];
    let Some(calls) = calls_with(directory.path(), &before, &user) else { return };
    let last = |part: &str| calls.iter().rposition(|call| call.contains(part)).unwrap();
    let not_dumpable = position(&calls, &["prctl(PR_SET_DUMPABLE, SUID_DUMP_DISABLE)"]);
    assert!(last("setresuid") < not_dumpable, "{calls:#?}");
    assert!(last("setresuid") < last("prctl(PR_SET_PDEATHSIG, SIGTERM)"), "{calls:#?}");
    // All threads are confined by then but the main one, which is the last.
    assert!(not_dumpable < last("SECCOMP_SET_MODE_FILTER"), "{calls:#?}");
}

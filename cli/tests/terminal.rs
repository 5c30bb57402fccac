//! The user's terminal: raw while the guest has it, and as it was on every way out.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::guest::{self, Program};
use minivmm_tests::session::{Session, Terminal};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest, unexpected_lines};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tempfile::tempdir;

/// A way out: what is done to the running VM, and the status that must follow.
type WayOut = (&'static str, fn(&mut Session), i32);

const WAYS_OUT: &[WayOut] = &[
    ("Ctrl-A x", |vm| vm.send(b"\x01x"), 0),
    ("the guest's end", |vm| vm.send([4]), guest::SUCCESS),
    ("SIGTERM", |vm| vm.signal(Signal::TERM), 4),
    ("SIGINT", |vm| vm.signal(Signal::INT), 4),
    ("SIGHUP", |vm| vm.signal(Signal::HUP), 4),
    ("a crash by SIGSEGV", |vm| vm.signal(Signal::SEGV), 128 + 11),
    ("a crash by SIGBUS", |vm| vm.signal(Signal::BUS), 128 + 7),
    ("SIGABRT", |vm| vm.signal(Signal::ABORT), 128 + 6),
    ("SIGQUIT", |vm| vm.signal(Signal::QUIT), 4),
    ("SIGUSR1", |vm| vm.signal(Signal::USR1), 4),
    ("SIGUSR2", |vm| vm.signal(Signal::USR2), 4),
    ("SIGALRM", |vm| vm.signal(Signal::ALARM), 4),
    ("SIGXCPU", |vm| vm.signal(Signal::XCPU), 4),
    ("SIGSYS", |vm| vm.signal(Signal::SYS), 128 + 31),
];

#[test]
fn it_is_restored_on_every_way_out() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for (name, leave, status) in WAYS_OUT {
        let (mut vm, terminal, before) = start(directory.path());
        vm.expect("ready", BOUND);
        assert_ne!(terminal.settings(), before, "{name}: it is not raw while the guest runs");
        leave(&mut vm);
        vm.wait(BOUND).must_be(*status);
        assert_eq!(terminal.settings(), before, "{name}");
    }
}

fn start(directory: &std::path::Path) -> (Session, Terminal, String) {
    let mut command = small_guest(directory, Program::Echo);
    Session::start_on_terminal(command.arg("--debug-exit"))
}

#[test]
fn keys_go_to_the_guest_but_for_ctrl_a() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (mut vm, ..) = start(directory.path());
    vm.expect("ready", BOUND);
    // Ctrl-C is the guest's, and comes back from it as one byte; so does a doubled Ctrl-A.
    vm.send(b"a\x03b\x01\x01c");
    vm.expect("a\x03b\x01c", BOUND);
    vm.send(b"\x01h");
    let help = vm.expect("send Ctrl-A to the guest", BOUND);
    assert!(help.contains("Ctrl-A x"), "{help}");
    vm.send([4]);
    vm.wait(BOUND).must_be(guest::SUCCESS);
}

/// As under a shell, which takes the terminal while the VM is stopped, and continues it by `fg`.
#[test]
fn it_is_raw_again_after_a_stop() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (mut vm, terminal, before) = start(directory.path());
    vm.expect("ready", BOUND);
    let raw = terminal.settings();
    for _ in 0..3 {
        vm.signal(Signal::STOP);
        terminal.make_cooked();
        assert_eq!(terminal.settings(), before);
        vm.signal(Signal::CONT);
        let deadline = Instant::now() + BOUND;
        while terminal.settings() != raw {
            assert!(Instant::now() < deadline, "it never becomes raw again");
            thread::sleep(Duration::from_millis(5));
        }
    }
    // Ctrl-C is the guest's.
    vm.send(b"\x03after");
    vm.expect("\x03after", BOUND);
    vm.send([4]);
    vm.wait(BOUND).must_be(guest::SUCCESS);
    assert_eq!(terminal.settings(), before);
}

/// The way out is open also when the guest has stopped reading what is typed.
#[test]
fn a_guest_that_does_not_listen_can_be_left() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Spin);
    let (mut vm, terminal, before) = Session::start_on_terminal(&mut command);
    let deadline = Instant::now() + BOUND;
    while terminal.settings() == before {
        assert!(Instant::now() < deadline, "it never becomes raw");
        thread::sleep(Duration::from_millis(5));
    }
    vm.send([b'?'; 1000]);
    vm.send(b"\x01x");
    vm.wait(BOUND).must_be(0);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn bad_arguments_do_not_touch_it() {
    let directory = tempdir().unwrap();
    let mut command = minivmm(["--kernel", "missing"]);
    let (vm, terminal, before) = Session::start_on_terminal(command.current_dir(directory.path()));
    vm.wait(BOUND).must_be(2);
    assert_eq!(terminal.settings(), before);
}

/// As when a connection drops: the kernel tells the session's leader alone, and if that is make(1), it waits for the VM.
#[test]
fn a_terminal_that_hangs_up_ends_the_vm() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for program in [Program::Echo, Program::Spin] {
        let (mut user, terminal) = Terminal::new();
        let before = terminal.settings();
        let mut command = small_guest(directory.path(), program);
        let vm = Session::start_on(command.stdin(terminal.file()).stdout(Stdio::null()));
        // It holds the terminal open.
        drop(command);
        let deadline = Instant::now() + BOUND;
        while terminal.settings() == before {
            assert!(Instant::now() < deadline, "it never becomes raw");
            thread::sleep(Duration::from_millis(5));
        }
        // What is typed and not read is of no use, however much it is.
        (0..50).for_each(|_| user.write_all(&[b'?'; 100]).unwrap());
        drop((user, terminal));
        let ended = vm.wait(BOUND).must_be(0);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    }
}

/// `&` of a shell with job control and `timeout` start a program in the background of the terminal, whose settings and input are
/// not its own there. The kernel stops a program that touches them, again after each SIGCONT, so that SIGTERM never ends it.
#[test]
fn in_its_background_a_vm_runs_and_can_be_ended() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let vm = small_guest(directory.path(), Program::Echo);
    let shell = "set -m; \"$@\" & read line; kill -STOP %1; kill -CONT %1; \
                 read line; kill -TERM %1; kill -CONT %1; wait %1; echo \"status $?\"";
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait", "sh", "-c", shell, "sh"]).arg(vm.get_program());
    command.args(vm.get_args()).arg("--debug-exit").current_dir(directory.path());
    let (mut session, terminal, before) = Session::start_on_terminal(&mut command);
    session.expect("ready", BOUND);
    assert_eq!(terminal.settings(), before, "the shell's");
    // Each is the shell's, though the VM is told of it, too.
    session.send("a line\n");
    session.send("another one\n");
    session.expect("status 4", BOUND);
    assert_eq!(terminal.settings(), before);
    session.wait(BOUND).must_be(0);
}

/// What was typed meanwhile is the shell's, and is not the end of the VM's input.
#[test]
fn from_the_background_a_vm_comes_back() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let vm = small_guest(directory.path(), Program::Echo);
    let shell = "set -m; \"$@\" & read line; fg %1; echo \"status $?\"";
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait", "sh", "-c", shell, "sh"]).arg(vm.get_program());
    command.args(vm.get_args()).arg("--debug-exit").current_dir(directory.path());
    let (mut session, terminal, before) = Session::start_on_terminal(&mut command);
    session.expect("ready", BOUND);
    session.send("a line\n");
    let deadline = Instant::now() + BOUND;
    while terminal.settings() == before {
        assert!(Instant::now() < deadline, "it never becomes raw");
        thread::sleep(Duration::from_millis(5));
    }
    session.send("the guest's");
    session.expect("the guest's", BOUND);
    session.send([4]);
    session.expect(&format!("status {}", guest::SUCCESS), BOUND);
    session.wait(BOUND).must_be(0);
}

/// A terminal whose other side is alive and reads nothing, such as that of a connection whose network is dead, has room for a part
/// of a message: the main thread once waited there for the rest, and no signal ended the VM.
#[test]
fn a_message_to_a_terminal_without_a_reader_holds_up_no_end() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (_master, slave) = terminal_with_little_room();
    let mut command = small_guest(directory.path(), Program::Echo);
    let vm = Session::start_with_errors_elsewhere(command.arg("--debug-exit").stderr(slave));
    vm.expect("ready", BOUND);
    vm.signal(Signal::TERM);
    vm.wait(BOUND).must_be(4);
}

/// Both sides of a terminal that takes fewer bytes than a message has, and then no more.
fn terminal_with_little_room() -> (File, File) {
    let (mut master, terminal) = Terminal::new();
    let slave = terminal.file();
    let mut filler = File::options();
    let filler = filler.write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    let mut filler = filler.open(format!("/proc/self/fd/{}", slave.as_raw_fd())).unwrap();
    let is_ready = |milliseconds: i64| {
        let mut ready = [PollFd::new(&slave, PollFlags::OUT)];
        let bound = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        poll(&mut ready, Some(&bound)).unwrap() > 0
    };
    // The kernel moves bytes from one side to the other a little later.
    let mut fill = |limit: usize| {
        let mut filled = 0;
        while filled < limit && (filler.write(b"x").is_ok() || is_ready(5)) {
            filled += 1;
        }
        filled
    };
    let mut make_room = || {
        while !is_ready(1) {
            master.read_exact(&mut [0]).unwrap();
        }
    };
    fill(usize::MAX);
    make_room();
    let room = fill(usize::MAX);
    make_room();
    fill(room - 20);
    make_room();
    (master, slave)
}

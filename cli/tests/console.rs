//! The serial console: where it can be, and that nothing is lost on the way, in either direction.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, CHATTER, Program};
use minivmm_tests::session::Session;
use minivmm_tests::transcript::Transcript;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use tempfile::tempdir;

/// `^D`, by which the echoing guest ends.
const END: u8 = 4;

/// The exit status of a VM with `--debug-exit` that a signal ends.
const NO_BYTE: i32 = 4;

fn vm(directory: &Path, program: Program, console: &str) -> Command {
    let mut command = small_guest(directory, program);
    command.args(["--debug-exit", "--console", console]);
    command
}

/// 10 KiB that a person might paste: every line is different.
fn pasted() -> Vec<u8> {
    let lines = (0..).map(|line| format!("line {line} of the text\n"));
    lines.flat_map(String::into_bytes).take(10 << 10).collect()
}

#[test]
fn pasted_input_arrives_whole() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let input = [&pasted()[..], &[END]].concat();
    let expected = [b"ready\n", &pasted()[..]].concat();

    // From a pipe, sent before the guest could have read any of it.
    let mut session = Session::start(&mut vm(directory.path(), Program::Echo, "stdio"));
    session.send(&input);
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert!(ended.output == expected, "from a pipe: {ended}");

    // From a file, which is always readable; to a file.
    let file = |name: &str| directory.path().join(name);
    fs::write(file("input"), &input).unwrap();
    let mut command = vm(directory.path(), Program::Echo, "stdio");
    command.stdin(File::open(file("input")).unwrap()).stdout(File::create(file("output")).unwrap());
    Session::start_on(&mut command).wait(BOUND).must_be(guest::SUCCESS);
    assert!(fs::read(file("output")).unwrap() == expected, "from a file");
}

#[test]
fn a_guest_outlives_the_end_of_its_input() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut session = Session::start(&mut vm(directory.path(), Program::Echo, "stdio"));
    session.close_input();
    session.expect("ready\n", BOUND);
    session.signal(rustix::process::Signal::TERM);
    session.wait(BOUND).must_be(NO_BYTE);
}

/// A reader that has stopped stops nothing else: the guest goes on to its end.
#[test]
fn a_blocked_output_does_not_stall_the_guest() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (_unread, full) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&full, 4096).unwrap();
    let mut command = vm(directory.path(), Program::Chatter, "stdio");
    command.stdin(Stdio::null()).stdout(full);
    Session::start_on(&mut command).wait(BOUND).must_be(guest::SUCCESS);
}

/// A reader that went away is no reason to end, let alone to die of SIGPIPE.
#[test]
fn a_closed_output_does_not_end_the_guest() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (reader, output) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = vm(directory.path(), Program::Chatter, "stdio");
    command.stdin(Stdio::null()).stdout(output);
    Session::start_on(&mut command).wait(BOUND).must_be(guest::SUCCESS);
}

#[test]
fn a_file_gets_everything_and_nowhere_gets_nothing() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let log = directory.path().join("log");
    fs::write(&log, "something longer than what is to come ".repeat(1000)).unwrap();
    let run = |console| {
        let ended =
            Session::start(&mut vm(directory.path(), Program::Chatter, console)).wait(BOUND);
        assert!(ended.must_be(guest::SUCCESS).output.is_empty());
    };
    run("file:log");
    assert_eq!(fs::read_to_string(&log).unwrap(), CHATTER.repeat(1024));
    run("file:/dev/null");
    run("none");
}

#[test]
fn a_pseudo_terminal_that_people_come_to_and_leave() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = Session::start(&mut vm(directory.path(), Program::Echo, "pty"));
    let said = session.expect_error("/dev/pts/", BOUND) + &session.expect_error("\n", BOUND);
    let name = said[said.find("/dev/pts/").unwrap()..].trim();

    // Raw: nothing is echoed by the terminal, no newline becomes two characters.
    let open = || File::options().read(true).write(true).open(name).unwrap();
    let mut terminal = open();
    let output = Transcript::of(open());
    terminal.write_all(b"one\r\n").unwrap();
    assert_eq!(output.expect_bytes(11, BOUND).unwrap(), b"ready\none\r\n");
    drop(terminal);

    open().write_all(&[END]).unwrap();
    session.wait(BOUND).must_be(guest::SUCCESS);
}

/// Connects as soon as there is something to connect to.
fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + BOUND;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_socket_keeps_early_output_for_the_first_client_and_takes_another_one_later() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join("socket");
    // A dead process left its socket behind: it is replaced.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let session = Session::start(&mut vm(directory.path(), Program::EarlyEcho, "unix:socket"));
    // Only after the line is printed does the guest report this.
    session.expect_error("crash kernel", BOUND);

    let mut first = connect(&socket);
    let output = Transcript::of(first.try_clone().unwrap());
    output.expect("early\n", BOUND).unwrap();
    first.write_all(&pasted()).unwrap();
    let text = output.expect_bytes(6 + pasted().len(), BOUND).unwrap();
    assert!(text[6..] == pasted(), "{}", String::from_utf8_lossy(&text));
    first.shutdown(std::net::Shutdown::Both).unwrap();
    drop(first);

    let mut second = connect(&socket);
    let output = Transcript::of(second.try_clone().unwrap());
    second.write_all(b"again").unwrap();
    output.expect("again", BOUND).unwrap();
    // One client at a time: a third one waits for its turn.
    let mut third = connect(&socket);
    third.write_all(b"third").unwrap();
    second.write_all(b"still here").unwrap();
    output.expect("still here", BOUND).unwrap();
    second.shutdown(std::net::Shutdown::Both).unwrap();
    drop(second);
    Transcript::of(third.try_clone().unwrap()).expect("third", BOUND).unwrap();
    third.write_all(&[END]).unwrap();

    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert_eq!(unexpected_lines(&ended.errors).len(), 1, "{ended}");
    assert!(!socket.exists(), "the socket is left behind");
}

/// Also where the guest does not read what the last client sent.
#[test]
fn a_socket_takes_another_client_though_the_guest_is_deaf() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join("socket");
    sparse(&directory.path().join("disk.img"), 1 << 30);
    let mut command = vm(directory.path(), Program::DiskLoad, "unix:socket");
    let session = Session::start(command.args(["--disk", "disk.img,throttling.iops-total=100"]));
    for _ in 0..3 {
        let mut client = connect(&socket);
        client.write_all(&pasted()).unwrap();
        Transcript::of(client.try_clone().unwrap()).expect("..", BOUND).unwrap();
        client.shutdown(std::net::Shutdown::Both).unwrap();
    }
    session.signal(rustix::process::Signal::TERM);
    session.wait(BOUND).must_be(NO_BYTE);
}

//! The machine ends and stops whatever its guest and its host's disks do: the largest requests that a guest can post, a
//! reset in the middle of them, a disk that does not answer.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{Program, words};
use minivmm_tests::host_disk::HostDisk;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, skip, small_guest, unexpected_lines};
use rustix::process::Signal;
use serde_json::json;
use tempfile::tempdir;

/// A guest whose disk is larger than one of its requests.
fn flood(directory: &Path, program: Program) -> Command {
    sparse(&directory.join("disk.img"), 8 << 30);
    let mut command = small_guest(directory, program);
    command.args(["--disk", "disk.img"]);
    command
}

#[test]
fn the_largest_requests_of_a_guest_hold_up_no_end() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for program in [Program::Flood, Program::FloodReset] {
        for aio in ["io_uring", "threads"] {
            for (signal, status) in [(Signal::TERM, 0), (Signal::INT, 0)] {
                let disk = format!("disk.img,aio={aio}");
                sparse(&directory.path().join("disk.img"), 8 << 30);
                let mut command = small_guest(directory.path(), program);
                let session = Session::start(command.args(["--disk", &disk]));
                session.expect("ready\n", BOUND);
                let asked = Instant::now();
                session.signal(signal);
                let ended = session.wait(BOUND).must_be(status);
                println!("{program:?} {aio} {signal:?}: ended after {:?}", asked.elapsed());
                assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
            }
        }
        let mut command = flood(directory.path(), program);
        Session::start(command.args(["--timeout", "500ms"])).wait(BOUND).must_be(124);
    }
}

/// timeout(1) sends its signal to the process, and then to its group.
#[test]
fn a_signal_that_comes_twice_at_once_is_one() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = Session::start(&mut flood(directory.path(), Program::Flood));
    session.expect("ready\n", BOUND);
    for signal in [Signal::STOP, Signal::TERM, Signal::INT, Signal::CONT] {
        session.signal(signal);
    }
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

#[test]
fn the_largest_requests_of_a_guest_hold_up_no_stop_and_go_on_after_it() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for program in [Program::Flood, Program::FloodReset] {
        let mut command = flood(directory.path(), program);
        let session = Session::start(command.args(["--qmp", "unix:qmp"]));
        session.expect("ready\n", BOUND);
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        for _ in 0..5 {
            let asked = Instant::now();
            qmp.execute("stop", json!({})).unwrap();
            println!("{program:?}: stopped after {:?}", asked.elapsed());
            assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "paused");
            qmp.execute("cont", json!({})).unwrap();
        }
        if program == Program::FloodReset {
            session.expect("reset\n", BOUND);
        }
        qmp.execute("quit", json!({})).unwrap();
        session.wait(BOUND).must_be(0);
    }
}

/// A guest that writes sector after sector to a disk that stops answering.
fn on_a_hung_disk(options: &[&str]) -> Option<(HostDisk, Session, tempfile::TempDir)> {
    let disk = HostDisk::mount(8 << 20)?;
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads");
    command.args(["--qmp", "unix:qmp", "--disk"]).arg(option).args(options);
    let session = Session::start(&mut command);
    session.output.expect_bytes(3, BOUND).unwrap();
    disk.hang();
    disk.wait_until_held();
    Some((disk, session, directory))
}

/// Whether all that is left of the program are threads that the kernel cannot end yet.
fn main_thread_has_ended(session: &Session) -> bool {
    // `PID (NAME) STATE ...` (proc(5)).
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", session.id())).unwrap();
    stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
}

fn wait_for_the_main_thread(session: &Session) {
    let deadline = Instant::now() + BOUND;
    while !main_thread_has_ended(session) {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::yield_now();
    }
}

#[test]
fn a_disk_that_does_not_answer_holds_up_no_end() {
    if !kvm_is_usable() {
        return;
    }
    // One signal ends it after its time-out, two end it a second after the first.
    for (signals, timeout) in
        [(&[Signal::TERM][..], "1s"), (&[Signal::INT], "1s"), (&[Signal::TERM, Signal::INT], "1h")]
    {
        let options = ["--stop-timeout", timeout];
        let Some((disk, session, _directory)) = on_a_hung_disk(&options) else { return };
        let asked = Instant::now();
        for signal in signals {
            session.signal(*signal);
        }
        wait_for_the_main_thread(&session);
        println!("{signals:?}: ended after {:?}", asked.elapsed());
        // The kernel keeps what is left of the process until the file system has answered.
        disk.serve();
        let ended = session.wait(BOUND).must_be(1);
        let lines = unexpected_lines(&ended.errors);
        assert!(lines.iter().any(|line| line.contains("slow")), "the disk is not named: {ended}");
    }
}

/// A client that asks for something else meanwhile does not move the deadline of the end: it is answered.
#[test]
fn an_end_with_a_disk_that_does_not_answer_is_put_off_by_no_client() {
    if !kvm_is_usable() {
        return;
    }
    let Some((disk, session, directory)) = on_a_hung_disk(&["--stop-timeout", "20s"]) else {
        return;
    };
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    session.signal(Signal::TERM);
    qmp.event("SHUTDOWN");
    qmp.query("stop");
    for command in ["cont", "system_reset"] {
        let (_, error) = qmp.execute(command, json!({})).unwrap_err();
        assert!(error.contains("the VM is ending"), "{command}: {error}");
    }
    session.signal(Signal::TERM);
    wait_for_the_main_thread(&session);
    disk.serve();
    session.wait(BOUND).must_be(1);
}

/// Nothing has been made yet that would have to be cleaned up.
#[test]
fn a_start_on_storage_that_does_not_answer_can_be_ended() {
    if !kvm_is_usable() {
        return;
    }
    for option in ["--kernel", "--initrd", "--disk"] {
        let Some(disk) = HostDisk::mount(1 << 20) else { return };
        let directory = tempdir().unwrap();
        let mut command = small_guest(directory.path(), Program::Echo);
        if option == "--kernel" {
            command = minivmm(["--memory", "32M"]);
        }
        disk.hang();
        let session = Session::start(command.arg(option).arg(disk.path()));
        disk.wait_until_held();
        session.signal(Signal::TERM);
        // Closing the file waits for this file system, too.
        disk.serve();
        session.wait(BOUND).must_be(128 + 15);
    }
}

/// The user's key asks again as a signal does.
#[test]
fn the_key_that_quits_ends_soon_when_it_is_typed_again() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(8 << 20) else { return };
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads");
    command.args(["--stop-timeout", "1h"]);
    let (mut session, terminal, before) =
        Session::start_on_terminal(command.arg("--disk").arg(option));
    session.output.expect_bytes(3, BOUND).unwrap();
    disk.hang();
    disk.wait_until_held();
    session.send(b"\x01x\x01x");
    wait_for_the_main_thread(&session);
    disk.serve();
    let ended = session.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("disk slow"), "{ended}");
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_disk_that_does_not_answer_fails_a_stop_and_the_machine_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let Some((disk, session, directory)) = on_a_hung_disk(&["--stop-timeout", "1s"]) else {
        return;
    };
    let path = directory.path().join("qmp");
    let mut qmp = Qmp::connect(&path);
    let (_, error) = qmp.execute("stop", json!({})).unwrap_err();
    assert!(error.contains("slow"), "the disk is not named: {error}");
    let mut other = Qmp::connect(&path);
    assert_eq!(other.execute("query-status", json!({})).unwrap()["status"], "running");
    disk.serve();
    let dots = session.output.expect_bytes(20, BOUND).unwrap();
    assert!(dots.iter().all(|byte| *byte == b'.'));
    qmp.execute("stop", json!({})).unwrap();
    assert_eq!(other.execute("query-status", json!({})).unwrap()["status"], "paused");
    qmp.execute("quit", json!({})).unwrap();
    session.wait(BOUND).must_be(0);
}

fn qemu_img(directory: &Path, arguments: &[&str]) -> bool {
    let status = Command::new("qemu-img").args(arguments).current_dir(directory).status();
    status.is_ok_and(|status| status.success())
}

/// What a guest was told is written is in the image even if another part of the end fails: here a disk whose flush the host
/// does not finish.
#[test]
fn a_disk_is_flushed_though_another_one_hangs() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    if !qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "disk.img", "64M"]) {
        return skip("no qemu-img here (Debian: qemu-utils)");
    }
    let Some(slow) = HostDisk::mount(1 << 20) else { return };
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    command.args(["--disk", "disk.img,format=qcow2", "--stop-timeout", "20s", "--disk"]);
    let mut option = slow.path().into_os_string();
    option.push(",id=slow,aio=threads");
    let session = Session::start(command.arg(option));
    session.output.expect_bytes(20, BOUND).unwrap();
    slow.hang();
    session.signal(Signal::TERM);
    wait_for_the_main_thread(&session);
    slow.serve();
    let ended = session.wait(BOUND).must_be(1);
    let lines = unexpected_lines(&ended.errors);
    assert!(matches!(lines[..], [line] if line.contains("disk slow")), "{ended}");
    assert!(qemu_img(directory.path(), &["check", "-q", "disk.img"]));
    assert!(qemu_img(directory.path(), &["convert", "-O", "raw", "disk.img", "disk.raw"]));
    let content = std::fs::read(directory.path().join("disk.raw")).unwrap();
    for (sector, bytes) in content.chunks(512).take(ended.output.len()).enumerate() {
        assert!(bytes == words(sector as u32, 128), "sector {sector} of {}", ended.output.len());
    }
}

/// A resize waits for the host on a thread of its own.
#[test]
fn other_clients_are_answered_while_the_host_keeps_a_resize() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    if !qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "base", "64M"]) {
        return skip("no qemu-img here (Debian: qemu-utils)");
    }
    let Some(slow) = HostDisk::mount(1 << 20) else { return };
    let image = std::fs::read(directory.path().join("base")).unwrap();
    let mut file = std::fs::File::options().write(true).open(slow.path()).unwrap();
    file.write_all(&image).unwrap();
    drop(file);
    let mut command = small_guest(directory.path(), Program::Spin);
    let mut option = slow.path().into_os_string();
    option.push(",id=slow,format=qcow2");
    let session = Session::start(command.args(["--qmp", "unix:qmp", "--disk"]).arg(option));
    let path = directory.path().join("qmp");
    let (mut waiting, mut other) = (Qmp::connect(&path), Qmp::connect(&path));
    slow.hang();
    let resize =
        json!({ "execute": "block_resize", "arguments": { "device": "slow", "size": 128 << 20 } });
    waiting.stream().write_all(resize.to_string().as_bytes()).unwrap();
    slow.wait_until_held();
    assert_eq!(other.query("query-status")["status"], "running");
    slow.serve();
    let answer = waiting.receive().unwrap();
    assert!(answer["return"].is_object(), "{answer}");
    other.query("quit");
    session.wait(BOUND).must_be(0);
}

/// As many vCPUs as would take longer than the bound if each had the deadline to itself.
#[test]
fn many_vcpus_at_a_disk_that_does_not_answer_share_one_deadline() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(1 << 20) else { return };
    const CPUS: u8 = 32;
    let timeout = Duration::from_secs(8);
    assert!(timeout * CPUS.into() > BOUND);
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Crowd);
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads,num-queues=1");
    command.args(["--qmp", "unix:qmp", "--cpus", &CPUS.to_string(), "--disk"]).arg(option);
    command.args(["--stop-timeout", &format!("{}s", timeout.as_secs())]);
    let mut session = Session::start(&mut command);
    session.expect("ready\n", BOUND);
    disk.hang();
    session.send(b"w");
    disk.wait_until_held();
    session.send([CPUS - 1]);
    session.expect("all here\n", BOUND);
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let (_, error) = qmp.execute("stop", json!({})).unwrap_err();
    assert!(error.contains("disk slow"), "{error}");
    assert_eq!(qmp.query("query-status")["status"], "running");
    let asked = Instant::now();
    session.signal(Signal::TERM);
    while !main_thread_has_ended(&session) && asked.elapsed() < BOUND {
        std::thread::yield_now();
    }
    assert!(main_thread_has_ended(&session), "each vCPU has a deadline of its own");
    disk.serve();
    let ended = session.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("disk slow"), "{ended}");
}

/// Each of them waits for the reset outside of the device's lock, and goes on when the host answers.
#[test]
fn vcpus_that_wait_for_a_reset_leave_it_for_a_stop_and_come_back() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Crowd);
    let mut option = disk.path().into_os_string();
    option.push(",aio=threads,num-queues=1");
    command.args(["--cpus", "4", "--qmp", "unix:qmp", "--stop-timeout", "1h", "--disk"]);
    let mut session = Session::start(command.arg(option));
    session.expect("ready\n", BOUND);
    disk.hang();
    session.send(b"w");
    disk.wait_until_held();
    session.send([3]);
    session.expect("all here\n", BOUND);
    let path = directory.path().join("qmp");
    let (mut qmp, mut other) = (Qmp::connect(&path), Qmp::connect(&path));
    qmp.stream().write_all(br#"{ "execute": "stop" }"#).unwrap();
    // Answered after the stop has begun: it waits for the disk.
    assert_eq!(other.query("query-status")["status"], "running");
    disk.serve();
    assert!(qmp.receive().unwrap()["event"] == "STOP");
    assert!(qmp.receive().unwrap()["return"].is_object());
    other.query("cont");
    session.expect("reset\n", BOUND);
    other.query("quit");
    session.wait(BOUND).must_be(0);
}

//! What a running VM has given up, thread by thread, and what still works then.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use serde_json::json;
use tempfile::tempdir;

/// Each thread's name, and the fields of its status. A thread may have ended since the directory was read, as `registers` does.
fn threads(id: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap();
    let status = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).ok()?;
        Some((field(&status, "Name").to_owned(), status))
    };
    tasks.filter_map(status).collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
    line.split_once(':').unwrap().1.trim()
}

fn start(directory: &std::path::Path, options: &[&str]) -> Session {
    sparse(&directory.join("disk.img"), 1 << 20);
    let mut command = small_guest(directory, Program::Echo);
    let disk = "disk.img,num-queues=2";
    command.args(["--disk", disk, "--cpus", "2", "--qmp", "unix:qmp", "--debug-exit"]);
    let session = Session::start(command.args(options));
    session.expect("ready\n", BOUND);
    session
}

#[test]
fn every_thread_of_a_running_vm_is_confined() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut session = start(directory.path(), &["--trace", "file=trace"]);
    let confined = threads(session.id());
    let names: Vec<_> = confined.iter().map(|(name, _)| name.as_str()).collect();
    for kind in ["minivmm", "vcpu-0", "vcpu-1", "disk-vda-0", "disk-io-0", "console", "trace"] {
        assert!(names.contains(&kind), "{names:?}");
    }
    assert!(!names.contains(&"save"), "a thread that could fork, and was not asked for: {names:?}");
    for (name, status) in &confined {
        let rights = ["NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapInh"];
        let rights = rights.map(|right| field(status, right));
        let none = "0000000000000000";
        assert_eq!(rights, ["1", "2", none, none, none], "{name}");
    }
    session.send("\x04");
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

#[test]
fn root_hands_the_vm_to_another_user() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let user = ["--user", "1234:2345"];
    if !rustix::process::geteuid().is_root() {
        sparse(&directory.path().join("disk.img"), 1 << 20);
        let mut command = small_guest(directory.path(), Program::Echo);
        let ended = Session::start(command.args(user)).wait(BOUND).must_be(2);
        assert!(ended.errors.contains("--user 1234:2345: "), "{ended}");
        return;
    }
    let mut session = start(directory.path(), &user);
    for (name, status) in threads(session.id()) {
        let ids = ["Uid", "Gid", "Groups", "CapEff"].map(|name| field(&status, name));
        let expected = ["1234\t1234\t1234\t1234", "2345\t2345\t2345\t2345", "", "0000000000000000"];
        assert_eq!(ids, expected, "{name}");
    }
    session.send("\x04");
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

#[test]
fn it_can_be_switched_off() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let mut session = start(directory.path(), &["--sandbox", "off"]);
    for (name, status) in threads(session.id()) {
        for right in ["NoNewPrivs", "Seccomp", "CapEff"] {
            assert_eq!(field(&status, right), field(&ours, right), "{name}: {right}");
        }
    }
    session.send("\x04");
    session.wait(BOUND).must_be(guest::SUCCESS);
}

#[test]
fn with_log_the_guest_runs_too() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut session = start(directory.path(), &["--sandbox", "log"]);
    assert!(threads(session.id()).iter().all(|(_, status)| field(status, "Seccomp") == "2"));
    session.send("\x04");
    session.wait(BOUND).must_be(guest::SUCCESS);
}

/// A client asks for what the process has given up: that is refused, and ends nothing.
#[test]
fn a_save_to_a_directory_that_was_not_given_is_refused() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    fs::create_dir(directory.path().join("saves")).unwrap();
    let target = format!("file:{}/saved", directory.path().display());
    for (options, why) in [
        (&[][..], "start the VM with --save-directory"),
        (&["--save-directory", "saves"][..], "may save to"),
    ] {
        let mut session = start(directory.path(), options);
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        let (class, text) = qmp.execute("migrate", json!({ "uri": target })).unwrap_err();
        assert!(class == "GenericError" && text.contains(why), "{class}: {text}");
        assert_eq!(qmp.query("query-status")["status"], "running");
        session.send("\x04");
        session.wait(BOUND).must_be(guest::SUCCESS);
    }
    assert!(!directory.path().join("saved").exists());
}

//! A machine is saved in one process and goes on in another, with its disks, its console and its memory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod background;
mod dumps;
mod files;
mod hosts;
mod increments;
mod moments;
mod storage;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use minivmm_tests::files::{allocated, sparse};
use minivmm_tests::guest::{CHATTER, Program, SUCCESS, words};
use minivmm_tests::host_disk::HostDisk;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, runs, skip, small_guest, unexpected_lines};
use rustix::process::Signal;
use serde_json::json;
use tempfile::{TempDir, tempdir};

const SECTORS: u64 = 4096;

/// A guest with the disk `disk.img` (`keys` follow its path) and the control socket `qmp`.
fn guest(directory: &Path, program: Program, keys: &str) -> Command {
    sparse(&directory.join("disk.img"), SECTORS * 512);
    let mut command = small_guest(directory, program);
    command.args(["--debug-exit", "--disk", &format!("disk.img{keys}"), "--qmp", "unix:qmp"]);
    command
}

/// A guest that fills its disk, and may be saved to `directory`.
fn source(directory: &Path) -> Session {
    Session::start(guest(directory, Program::DiskLoad, "").args(["--save-directory", "."]))
}

/// As the user who saved it would: with the paths that the file names.
fn restore(directory: &Path, options: &str) -> Command {
    let mut command = minivmm(["--incoming", &format!("file:saved,paths=saved{options}")]);
    command.current_dir(directory);
    command
}

fn ctl(directory: &Path, arguments: &[&str]) -> Session {
    let mut command = minivmm([&["ctl", "qmp"], arguments].concat());
    Session::start(command.current_dir(directory))
}

/// The statuses of a save, up to its end.
fn statuses(qmp: &mut Qmp) -> Vec<String> {
    statuses_until(qmp, "")
}

/// The statuses of a save, up to this one or its end.
fn statuses_until(qmp: &mut Qmp, awaited: &str) -> Vec<String> {
    let mut statuses = Vec::new();
    loop {
        let events = std::mem::take(&mut qmp.events);
        let migration = events.iter().filter(|event| event["event"] == "MIGRATION");
        statuses
            .extend(migration.map(|event| event["data"]["status"].as_str().unwrap().to_owned()));
        match statuses.last().map(String::as_str) {
            Some("completed" | "failed" | "cancelled") => return statuses,
            Some(status) if status == awaited => return statuses,
            _ => {
                let event = qmp.receive().expect("an event");
                qmp.events.push(event);
            }
        }
    }
}

/// Every sector has the words that the guest wrote.
fn assert_complete(directory: &Path) {
    let content = std::fs::read(directory.join("disk.img")).unwrap();
    for (sector, bytes) in content.chunks(512).enumerate() {
        assert_eq!(bytes, words(sector as u32, 128), "sector {sector}");
    }
}

/// A machine saved in the middle of its writes, whose process has ended.
fn saved_machine() -> Option<TempDir> {
    if !kvm_is_usable() {
        return None;
    }
    let directory = tempdir().unwrap();
    let session = source(directory.path());
    session.output.expect_bytes(100, BOUND).unwrap();
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    Some(directory)
}

#[test]
fn a_guest_goes_on_in_another_process() {
    for options in ["", ",map=off", ",map=on"] {
        let Some(directory) = saved_machine() else { return };
        let ended = Session::start(&mut restore(directory.path(), options)).wait(BOUND);
        let ended = ended.must_be(SUCCESS);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
        assert!(ended.output.iter().all(|byte| *byte == b'.'), "{ended}");
        assert_complete(directory.path());
    }
}

#[test]
fn a_save_stops_the_guest_and_cont_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = source(directory.path());
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    qmp.enable_migration_events();
    assert_eq!(qmp.query("query-migrate"), json!({}));
    for round in 0..3 {
        session.output.expect_bytes(10, BOUND).unwrap();
        let path = directory.path().join(format!("saved{round}"));
        qmp.execute("migrate", json!({ "uri": format!("file:{}", path.display()) })).unwrap();
        assert_eq!(statuses(&mut qmp), ["setup", "active", "completed"]);
        assert_eq!(qmp.query("query-status"), json!({ "running": false, "status": "postmigrate" }));
        let info = qmp.query("query-migrate");
        assert_eq!((&info["status"], &info["ram"]["remaining"]), (&json!("completed"), &json!(0)));
        assert_eq!(info["ram"]["total"], 32 << 20);
        qmp.query("cont");
        qmp.event("RESUME");
    }
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// The guest's code is in pages of the kernel's file, most of which it never touches.
#[test]
fn a_guest_needs_its_kernels_file_only_for_a_reset() {
    let Some(directory) = saved_machine() else { return };
    fs::remove_file(directory.path().join("guest.elf")).unwrap();
    let mut command = restore(directory.path(), "");
    let session =
        Session::start(command.args(["--qmp", "unix:qmp2", "--save-directory", ".", "--paused"]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp2"));
    let (_, why) = qmp.execute("system_reset", json!({})).unwrap_err();
    assert!(why.contains("restore it again with --kernel FILE"), "{why}");
    qmp.query("cont");
    let ended = session.wait(BOUND).must_be(SUCCESS);
    assert!(ended.errors.contains("cannot be reset: --kernel"), "{ended}");
    assert_complete(directory.path());
}

/// Memory that is mapped from the file would come back with the file's content.
#[test]
fn a_reset_leaves_nothing_of_a_restored_machine() {
    if !kvm_is_usable() {
        return;
    }
    for options in [",map=on", ",map=off"] {
        let directory = tempdir().unwrap();
        let session = Session::start(&mut guest(directory.path(), Program::Reborn, ""));
        session.expect("ready\n..", BOUND);
        ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);
        let mut command = restore(directory.path(), options);
        let session = Session::start(command.args(["--qmp", "unix:qmp"]));
        session.output.expect_bytes(3, BOUND).unwrap();
        ctl(directory.path(), &["reset"]).wait(BOUND).must_be(0);
        session.expect("ready\n..", BOUND);
        session.wait(BOUND).must_be(SUCCESS);
    }
}

/// Each generation is saved from memory that is mapped from the file of the one before.
#[test]
fn generations_follow_each_other() {
    let Some(directory) = saved_machine() else { return };
    for _ in 0..5 {
        let mut command = restore(directory.path(), ",map=on");
        let session = Session::start(command.args(["--qmp", "unix:qmp"]));
        session.output.expect_bytes(10, BOUND).unwrap();
        ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);
    }
    Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// The VM is confined and opens no file: `ctl` hands one over.
#[test]
fn a_file_that_is_no_saved_machine_is_not_replaced() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = guest(directory.path(), Program::DiskLoad, "");
    let session = Session::start(command.arg("--paused"));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let kernel = fs::read(directory.path().join("guest.elf")).unwrap();
    for target in ["disk.img", "guest.elf", ".", "none/saved"] {
        let refused = ctl(directory.path(), &["save", target]).wait(BOUND).must_be(1);
        assert!(refused.errors.contains(&format!("save: {target}: ")), "{refused}");
        assert_eq!(refused.errors.lines().count(), 1, "{refused}");
    }
    assert_eq!(fs::read(directory.path().join("guest.elf")).unwrap(), kernel);
    for (command, arguments, why) in [
        ("getfd", json!({ "fdname": "file" }), "No file descriptor supplied via SCM_RIGHTS"),
        ("migrate", json!({ "uri": "fd:file" }), "File descriptor named 'file' not found"),
        ("closefd", json!({ "fdname": "file" }), "File descriptor named 'file' not found"),
    ] {
        assert_eq!(qmp.execute(command, arguments).unwrap_err().1, why);
    }
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
    assert!(!directory.path().join("saved").exists());
}

/// Exit status 2, and one line with `expected` in it.
#[track_caller]
fn assert_refused(ended: &Ended, expected: &str) {
    assert!(ended.code() == 2 && ended.errors.lines().count() == 1, "{ended}");
    assert!(ended.errors.contains(expected), "no `{expected}`: {ended}");
}

#[test]
fn a_client_names_the_file_later() {
    let Some(directory) = saved_machine() else { return };
    let mut command =
        minivmm(["--incoming", "defer,map=off", "--qmp", "unix:qmp", "--save-directory", "."]);
    command.args(["--disk", "disk.img"]);
    let session = Session::start(command.current_dir(directory.path()));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    assert_eq!(qmp.query("query-status"), json!({ "running": false, "status": "inmigrate" }));
    let file =
        |name: &str| json!({ "uri": format!("file:{}", directory.path().join(name).display()) });
    let (_, why) = qmp.execute("migrate-incoming", file("disk.img")).unwrap_err();
    assert!(why.contains("it is not a saved machine"), "{why}");
    let (_, why) = qmp.execute("stop", json!({})).unwrap_err();
    assert!(why.contains("there is no machine yet"), "{why}");
    qmp.execute("migrate-incoming", file("saved")).unwrap();
    assert_eq!(qmp.query("query-status")["status"], "running");
    // It can be saved again.
    qmp.execute("migrate", file("again")).unwrap();
    qmp.event("STOP");
    while qmp.query("query-migrate")["status"] == "active" {}
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

#[test]
fn an_image_that_was_changed_is_refused() {
    let Some(directory) = saved_machine() else { return };
    let at = |name: &str| directory.path().join(name);
    let run = |options: &str, more: &[&str]| {
        Session::start(restore(directory.path(), options).args(more)).wait(BOUND)
    };
    let original = fs::read(at("disk.img")).unwrap();
    fs::copy(at("disk.img"), at("copy.img")).unwrap();
    fs::rename(at("disk.img"), at("moved.img")).unwrap();
    assert_refused(&run("", &[]), "disk.img: no such file");
    assert_refused(&run("", &["--disk", "copy.img"]), "its size or time of modification");
    assert_refused(&run("", &["--disk", "moved.img,id=b"]), "no such disk; its disks are vda");
    fs::write(at("short.img"), [0; 512]).unwrap();
    assert_refused(&run("", &["--disk", "short.img"]), "it has 512 bytes and had");
    assert_refused(&run("", &["--memory", "64M"]), "--incoming: cannot be given with --memory");
    // What was refused has not been touched.
    assert_eq!(fs::read(at("moved.img")).unwrap(), original);
    run("", &["--disk", "moved.img"]).must_be(SUCCESS);
    run(",disks=unchecked", &["--disk", "copy.img"]).must_be(SUCCESS);
    fs::rename(at("copy.img"), at("disk.img")).unwrap();
    assert_complete(directory.path());
}

#[test]
fn a_mapped_file_cannot_be_changed_under_its_guest() {
    let Some(directory) = saved_machine() else { return };
    let mut command = restore(directory.path(), ",map=on");
    let session = Session::start(command.args(["--qmp", "unix:qmp", "--save-directory", "."]));
    session.output.expect_bytes(3, BOUND).unwrap();
    // Waits until the guest has its own copy.
    fs::write(directory.path().join("saved"), "something else").unwrap();
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

#[test]
fn a_kill_in_a_save_leaves_the_target_as_it_was_or_whole() {
    if !kvm_is_usable() {
        return;
    }
    let mut moment = 7;
    for _ in 0..runs(12, 200) {
        let directory = tempdir().unwrap();
        let session = source(directory.path());
        let saved = directory.path().join("saved");
        fs::write(&saved, "the file of before").unwrap();
        session.output.expect_bytes(3, BOUND).unwrap();
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        qmp.execute("migrate", json!({ "uri": format!("file:{}", saved.display()) })).unwrap();
        moment = moment * 75 % 65_537;
        std::thread::sleep(Duration::from_micros(moment));
        session.signal(Signal::KILL);
        session.wait(BOUND).must_be(128 + 9);
        if fs::read(&saved).unwrap() != b"the file of before" {
            let mut command = restore(directory.path(), ",map=off,disks=unchecked");
            Session::start(&mut command).wait(BOUND).must_be(SUCCESS);
        }
    }
}

fn names(directory: &Path) -> BTreeSet<OsString> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn a_host_without_space_fails_a_save_and_the_guest_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    // The largest file that it may write has 16 MiB (in units of 1 KiB); its memory has 32.
    let mut guest = guest(directory.path(), Program::DiskLoad, "");
    guest.args(["--save-directory", "."]);
    let mut command = Command::new("bash");
    command.args(["-c", "ulimit -f 16384; exec \"$@\"", "bash"]).arg(guest.get_program());
    command.args(guest.get_args()).current_dir(directory.path());
    let session = Session::start(&mut command);
    session.output.expect_bytes(3, BOUND).unwrap();
    let before = names(directory.path());
    let ended = ctl(directory.path(), &["save", "saved"]).wait(BOUND).must_be(1);
    assert!(ended.errors.contains("fd:ctl: File too large"), "{ended}");
    assert_eq!(names(directory.path()), before, "something is left of the save");
    // The same into a file that the VM makes itself.
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let path = directory.path().join("saved");
    assert_eq!(fails(&mut qmp, &format!("file:{}", path.display())), "File too large");
    assert_eq!(names(directory.path()), before, "something is left of the save");
    let ended = ctl(directory.path(), &["save", "disk.img"]).wait(BOUND).must_be(1);
    assert!(ended.errors.contains("it exists and is no saved machine"), "{ended}");
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// Saves to `uri`, which fails. Returns the last of the causes.
fn fails(qmp: &mut Qmp, uri: &str) -> String {
    qmp.enable_migration_events();
    qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    assert_eq!(statuses(qmp), ["setup", "active", "failed"]);
    let why = qmp.query("query-migrate")["error-desc"].as_str().unwrap().to_owned();
    let last = why.rsplit(": ").next().unwrap();
    last.split(" (").next().unwrap().to_owned()
}

#[test]
fn an_error_of_the_file_fails_a_save_and_the_guest_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    for (errno, text) in
        [(libc::EIO, "Input/output error"), (libc::ENOSPC, "No space left on device")]
    {
        let Some(disk) = HostDisk::mount(0) else { return };
        let directory = tempdir().unwrap();
        let session = source(directory.path());
        session.output.expect_bytes(3, BOUND).unwrap();
        let file = fs::File::options().read(true).write(true).open(disk.path()).unwrap();
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        disk.fail(errno);
        qmp.hand_over("broken", &file);
        assert_eq!(fails(&mut qmp, "fd:broken"), text);
        // It ran before, and does so again.
        assert_eq!(qmp.query("query-status")["status"], "running");
        let dots = session.output.expect_bytes(0, BOUND).unwrap().len();
        session.output.expect_bytes(dots + 3, BOUND).unwrap();
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
    }
}

/// A save waits for the disks no longer than a stop does. For their flush see `storage`.
#[test]
fn a_disk_that_does_not_answer_fails_a_save_and_the_guest_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads");
    command
        .args([
            "--debug-exit",
            "--stop-timeout",
            "1s",
            "--qmp",
            "unix:qmp",
            "--save-directory",
            ".",
            "--disk",
        ])
        .arg(option);
    let session = Session::start(&mut command);
    session.output.expect_bytes(3, BOUND).unwrap();
    disk.hang();
    disk.wait_until_held();
    let ended = ctl(directory.path(), &["save", "saved"]).wait(BOUND).must_be(1);
    assert!(ended.errors.contains("disk slow: the host has not finished"), "{ended}");
    assert!(!directory.path().join("saved").exists());
    disk.serve();
    session.wait(BOUND).must_be(SUCCESS);
}

fn limited(command: &Command, directory: &Path) -> Command {
    // What reaches past the limit, in units of 512 bytes, fails with EFBIG (setrlimit(2)).
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -S -f 64; exec \"$@\"", "sh"]).arg(command.get_program());
    limited.args(command.get_args()).current_dir(directory);
    limited
}

/// Requests that the error policy holds are part of the machine: they begin again where it is restored.
#[test]
fn stopped_requests_travel() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut guest = guest(directory.path(), Program::DiskLoad, ",werror=stop");
    guest.args(["--save-directory", "."]);
    let session = Session::start(&mut limited(&guest, directory.path()));
    let mut qmp = Qmp::connect(&at("qmp"));
    qmp.event("STOP");
    assert_eq!(qmp.query("query-status")["status"], "io-error");
    // For the file of the save. The guest's request stays stopped.
    let pid = rustix::process::Pid::from_raw(i32::try_from(session.id()).unwrap());
    let none = rustix::process::Rlimit { current: None, maximum: None };
    rustix::process::prlimit(pid, rustix::process::Resource::Fsize, none).unwrap();
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    assert!(fs::read(at("disk.img")).unwrap()[64 * 512..].iter().all(|byte| *byte == 0));

    // Where there is still no space it stops again.
    let mut command = restore(directory.path(), "");
    let full = Session::start(&mut limited(
        command.args(["--qmp", "unix:full", "--save-directory", "."]),
        directory.path(),
    ));
    let mut qmp = Qmp::connect(&at("full"));
    assert_eq!(qmp.query("query-status")["status"], "io-error");
    qmp.query("cont");
    qmp.event("BLOCK_IO_ERROR");
    qmp.event("STOP");
    qmp.query("quit");
    full.wait(BOUND).must_be(0);

    let mut command = restore(directory.path(), "");
    let session = Session::start(command.args(["--qmp", "unix:qmp", "--save-directory", "."]));
    let mut qmp = Qmp::connect(&at("qmp"));
    assert_eq!(qmp.query("query-status")["status"], "io-error");
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

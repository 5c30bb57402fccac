//! A save while the host does not answer: for the flush of a disk, or for the file. The guest waits meanwhile, but not without a bound.

use std::fs::File;
use std::io::Write;

use super::*;

/// A guest that writes to a disk `slow` on this storage, and is stopped. No request is with the host.
fn stopped(disk: &HostDisk, directory: &Path, stop_timeout: &str) -> (Session, Qmp) {
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads");
    let mut command = small_guest(directory, Program::DiskLoad);
    command.args(["--stop-timeout", stop_timeout, "--qmp", "unix:qmp", "--save-directory", "."]);
    let session = Session::start(command.arg("--disk").arg(option));
    session.output.expect_bytes(3, BOUND).unwrap();
    let mut qmp = Qmp::connect(&directory.join("qmp"));
    qmp.enable_migration_events();
    qmp.query("stop");
    (session, qmp)
}

fn save(qmp: &mut Qmp, directory: &Path) {
    let uri = format!("file:{}", directory.join("saved").display());
    qmp.execute("migrate", json!({ "uri": uri })).unwrap();
}

#[test]
fn a_flush_that_the_host_does_not_finish_fails_a_save_and_the_guest_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let (session, mut qmp) = stopped(&disk, directory.path(), "1s");
    disk.hang();
    save(&mut qmp, directory.path());
    assert_eq!(statuses(&mut qmp), ["setup", "active", "failed"]);
    let error = qmp.query("query-migrate")["error-desc"].take();
    assert!(error.as_str().unwrap().contains("disk slow"), "{error}");
    assert_eq!(qmp.query("query-status")["status"], "paused");
    assert!(!directory.path().join("saved").exists());
    disk.serve();
    qmp.query("cont");
    session.output.expect_bytes(3, BOUND).unwrap();
    save(&mut qmp, directory.path());
    assert_eq!(statuses(&mut qmp), ["setup", "active", "completed"]);
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

#[test]
fn a_save_that_waits_for_a_flush_is_canceled_at_once() {
    if !kvm_is_usable() {
        return;
    }
    let Some(disk) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let (session, mut qmp) = stopped(&disk, directory.path(), "1h");
    disk.hang();
    save(&mut qmp, directory.path());
    disk.wait_until_held();
    qmp.query("migrate_cancel");
    assert_eq!(statuses(&mut qmp), ["setup", "active", "cancelling", "cancelled"]);
    disk.serve();
    qmp.query("cont");
    session.output.expect_bytes(3, BOUND).unwrap();
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// A guest whose save to a file on this storage has begun, and waits for the host.
fn saving(file: &HostDisk, directory: &Path, stop_timeout: &str) -> (Session, Qmp) {
    let mut command = guest(directory, Program::DiskLoad, "");
    let session = Session::start(command.args(["--stop-timeout", stop_timeout]));
    session.output.expect_bytes(3, BOUND).unwrap();
    let mut qmp = Qmp::connect(&directory.join("qmp"));
    qmp.enable_migration_events();
    file.hang();
    let target = File::options().read(true).write(true).open(file.path()).unwrap();
    qmp.hand_over("target", &target);
    qmp.execute("migrate", json!({ "uri": "fd:target" })).unwrap();
    file.wait_until_held();
    (session, qmp)
}

/// The thread that writes the file waits for the host for longer than that. A reset does not need it.
#[test]
fn a_save_to_a_file_that_does_not_answer_is_canceled_and_the_guest_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let Some(file) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let (session, mut qmp) = saving(&file, directory.path(), "1h");
    qmp.query("migrate_cancel");
    assert_eq!(statuses(&mut qmp).last().unwrap(), "cancelled");
    assert_eq!(qmp.query("query-status")["status"], "running");
    session.output.expect_bytes(20, BOUND).unwrap();
    qmp.query("system_reset");
    qmp.query("quit");
    file.serve();
    session.wait(BOUND).must_be(0);
}

/// The save may take longer than `--stop-timeout`, which is for the reset.
#[test]
fn a_reset_that_waits_for_a_long_save_has_its_time_afterwards() {
    if !kvm_is_usable() {
        return;
    }
    let Some(file) = HostDisk::mount(1 << 20) else { return };
    let directory = tempdir().unwrap();
    let (session, mut qmp) = saving(&file, directory.path(), "1s");
    let mut other = Qmp::connect(&directory.path().join("qmp"));
    other.stream().write_all(br#"{ "execute": "system_reset" }"#).unwrap();
    while qmp.query("query-migrate")["total-time"].as_u64().unwrap() < 1500 {
        std::thread::yield_now();
    }
    file.serve();
    other.event("RESET");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

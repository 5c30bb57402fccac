//! `fault=` of a disk, and the commands that change its rules while the guest runs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::time::Instant;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::{Qmp, SOCKET, start};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;

/// A guest that writes sector after sector, a dot for each, to a disk with these keys.
fn writer(directory: &Path, keys: &str, options: &[&str]) -> (Session, Qmp) {
    sparse(&directory.join("disk.img"), 1 << 30);
    let disk = format!("disk.img,id=data,{keys}");
    start(directory, Program::DiskLoad, &[&["--disk", &disk], options].concat())
}

fn add(qmp: &mut Qmp, rule: &str) -> Value {
    qmp.execute("x-minivmm-fault-add", json!({"device": "data", "rule": rule})).unwrap()
}

fn remove(qmp: &mut Qmp, id: Option<u64>) {
    let mut arguments = json!({"device": "data"});
    if let Some(id) = id {
        arguments["id"] = id.into();
    }
    qmp.execute("x-minivmm-fault-remove", arguments).unwrap();
}

/// Waits until the rule at this place has hit a request.
fn wait_for_a_hit(qmp: &mut Qmp, place: usize) {
    let deadline = Instant::now() + BOUND;
    while qmp.query("x-minivmm-query-faults")[0]["rules"][place]["hits"] == 0 {
        assert!(Instant::now() < deadline, "no request is hit");
    }
}

fn status(qmp: &mut Qmp) -> Value {
    qmp.query("query-status")["status"].take()
}

#[test]
fn a_request_that_hangs_fails_a_stop_and_a_reset_and_the_machine_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (session, mut qmp) = writer(directory.path(), "fault=none", &["--stop-timeout", "3s"]);
    session.output.expect_bytes(3, BOUND).unwrap();
    assert_eq!(add(&mut qmp, "hang"), json!({"id": 1}));
    wait_for_a_hit(&mut qmp, 0);
    for command in ["stop", "system_reset"] {
        let (_, error) = qmp.execute(command, json!({})).unwrap_err();
        assert!(error.contains("disk data"), "{command}: {error}");
        assert_eq!(status(&mut qmp), "running");
    }
    remove(&mut qmp, Some(1));
    // More than were on their way when it hung.
    session.output.expect_bytes(2000, BOUND).unwrap();
    qmp.query("stop");
    assert_eq!(status(&mut qmp), "paused");
    assert_eq!(qmp.query("x-minivmm-query-faults"), json!([{"device": "data", "rules": []}]));
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

#[test]
fn a_request_that_hangs_holds_up_no_end() {
    if !kvm_is_usable() {
        return;
    }
    for (signals, timeout) in [(&[Signal::TERM][..], "1s"), (&[Signal::TERM, Signal::INT], "1h")] {
        let directory = tempdir().unwrap();
        let (session, mut qmp) =
            writer(directory.path(), "fault=hang:n=5", &["--stop-timeout", timeout]);
        wait_for_a_hit(&mut qmp, 0);
        signals.iter().for_each(|signal| session.signal(*signal));
        let ended = session.wait(BOUND).must_be(1);
        assert!(ended.errors.contains("disk data"), "{ended}");
    }
}

/// A machine that is reset in part cannot go on.
#[test]
fn a_disk_that_does_not_finish_its_reset_ends_the_vm_and_is_named() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (session, mut qmp) =
        writer(directory.path(), "fault=hang:flush", &["--stop-timeout", "1s"]);
    session.output.expect_bytes(3, BOUND).unwrap();
    let (_, error) = qmp.execute("system_reset", json!({})).unwrap_err();
    assert_eq!(error, "the VM is ending");
    let ended = session.wait(BOUND).must_be(1);
    let line = "minivmm: the VM ended: disk data: the host has not finished its requests after 1.0s; check the storage behind it";
    assert!(ended.errors.lines().any(|printed| printed == line), "{ended}");
}

#[test]
fn delays_are_counted_and_end_with_their_rule_or_for_a_standstill() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (session, mut qmp) = writer(directory.path(), "fault=delay:ms=1", &[]);
    session.output.expect_bytes(20, BOUND).unwrap();
    qmp.query("stop");
    let faults = qmp.query("x-minivmm-query-faults");
    let rule = &faults[0]["rules"][0];
    assert_eq!((&rule["id"], &rule["rule"]), (&json!(1), &json!("delay:ms=1")));
    assert!(rule["hits"].as_u64().unwrap() >= 20 && rule["hits"] == rule["seen"], "{rule}");
    qmp.query("cont");
    remove(&mut qmp, None);
    let delay = |qmp: &mut Qmp| {
        remove(qmp, None);
        // Longer than the test.
        add(qmp, "delay:ms=4000000000");
        wait_for_a_hit(qmp, 0);
    };
    delay(&mut qmp);
    remove(&mut qmp, None);
    session.output.expect_bytes(2000, BOUND).unwrap();
    delay(&mut qmp);
    qmp.query("stop");
    qmp.query("cont");
    delay(&mut qmp);
    qmp.query("system_reset");
    delay(&mut qmp);
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

#[test]
fn the_error_policies_see_errors_on_order() {
    if !kvm_is_usable() {
        return;
    }
    for (policy, rule, nospace, state) in [
        ("stop", "error:n=5", false, "io-error"),
        ("stop", "error:nospace:n=5", true, "io-error"),
        ("enospc", "error:nospace:n=5", true, "io-error"),
        ("ignore", "error:nospace:n=5", true, "running"),
    ] {
        let directory = tempdir().unwrap();
        let keys = format!("werror={policy},fault={rule}");
        let (session, mut qmp) = writer(directory.path(), &keys, &["--paused"]);
        qmp.query("cont");
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!(event["nospace"], nospace, "{keys}: {event}");
        if state == "io-error" {
            qmp.event("STOP");
        }
        assert_eq!(status(&mut qmp), state, "{keys}");
        // The request is tried again, and is not the fifth any more.
        qmp.query("cont");
        session.output.expect_bytes(2000, BOUND).unwrap();
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
    }
}

#[test]
fn what_cannot_be_done_is_refused() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("plain.img"), 1 << 20);
    let keys = "fault=none,readonly=on";
    let (session, mut qmp) = writer(directory.path(), keys, &["--disk", "plain.img,id=plain"]);
    let mut fails = |command: &str, arguments: Value| {
        let (_, description) = qmp.execute(command, arguments).unwrap_err();
        description
    };
    for (device, rule, says) in [
        ("data", "sometimes", "write KIND"),
        ("data", "delay", "add ms=N"),
        ("plain", "error", "start the VM with fault=none in its --disk"),
        ("other", "error", "'other' not found"),
    ] {
        let error = fails("x-minivmm-fault-add", json!({"device": device, "rule": rule}));
        assert!(error.contains(says), "{device} {rule}: {error}");
    }
    let error = fails("x-minivmm-fault-remove", json!({"device": "data", "id": 1}));
    assert!(error.contains("has no rule 1"), "{error}");
    for _ in 0..64 {
        add(&mut qmp, "error:n=1");
    }
    let more = json!({"device": "data", "rule": "error:n=1"});
    let (_, error) = qmp.execute("x-minivmm-fault-add", more).unwrap_err();
    assert!(error.contains("has 64 rules"), "{error}");
    qmp.query("quit");
    session.wait(BOUND);
}

#[test]
fn people_order_faults_too() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (session, mut qmp) = writer(directory.path(), "fault=error:flush", &[]);
    let ctl = |arguments: &str, status: i32| {
        let words = ["ctl", SOCKET].into_iter().chain(arguments.split(' '));
        let ended = Session::start(minivmm(words).current_dir(directory.path()))
            .wait(BOUND)
            .must_be(status);
        String::from_utf8(ended.output).unwrap() + &ended.errors
    };
    assert_eq!(ctl("fault data hang:once", 0), "2\n");
    wait_for_a_hit(&mut qmp, 1);
    let table = ctl("faults", 0);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["DISK", "NUMBER", "SEEN", "HITS", "RULE"]
    );
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        ["data", "1", "0", "0", "error:flush"]
    );
    let second: Vec<_> = lines[2].split_whitespace().collect();
    assert_eq!((second[1], second[3], second[4]), ("2", "1", "hang:once"));
    assert!(ctl("fault data --remove 7", 1).contains("has no rule 7"));
    assert!(ctl("fault data", 2).contains("RULE"));
    assert!(ctl("fault data --remove some", 2).contains("some"));
    assert_eq!(ctl("fault data --remove all", 0), "");
    assert_eq!(ctl("faults", 0).lines().count(), 1);
    ctl("quit", 0);
    session.wait(BOUND).must_be(0);
}

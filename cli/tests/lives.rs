//! VMs that live on: stopped, resized, reset, saved, restored and ended again and again, beside clients that stall. Nothing of the
//! host is left behind, and a VM that stays does not grow.
//!
//! CI runs it for some seconds, `make soak T=1h` for an hour.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{Program, SUCCESS};
use minivmm_tests::holdings::Holdings;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::random::Random;
use minivmm_tests::session::Session;
use minivmm_tests::{
    BOUND, kvm_is_usable, minivmm, runs, small_guest, soak_time, unexpected_lines,
};
use rustix::process::Signal;
use serde_json::json;
use tempfile::{TempDir, tempdir};

/// The disk's size at the start. It changes by whole steps.
const SIZE: u64 = 16 << 20;
const STEP: u64 = 64 << 10;
/// Rounds of the VM that stays, until it has touched what it will touch.
const WARM_UP: u64 = 4;
/// Steps of a round.
const STEPS: u64 = 10;

const DISKS: [(&str, &str); 4] = [
    ("raw", "format=raw"),
    ("raw", "format=raw,aio=threads,cache=none"),
    ("qcow2", "format=qcow2"),
    ("raw", "format=raw,snapshot=on"),
];

/// A VM in `directory` with a new disk, and temporary files in `temporary`.
fn vm(
    directory: &Path,
    temporary: &Path,
    program: Program,
    (format, keys): (&str, &str),
) -> Command {
    let image = directory.join("disk.img");
    if format == "qcow2" {
        let size = SIZE.to_string();
        let arguments = ["create", "-q", "-f", "qcow2", "disk.img", &size];
        let made = Command::new("qemu-img").args(arguments).current_dir(directory).status();
        assert!(made.is_ok_and(|status| status.success()), "qemu-img (Debian: qemu-utils)");
    } else {
        sparse(&image, SIZE);
    }
    let mut command = small_guest(directory, program);
    command.args(["--qmp", "unix:qmp", "--disk", &format!("disk.img,{keys}")]);
    command.env("TMPDIR", temporary);
    command
}

/// A client that begins a command, reads nothing, and stays.
fn stalled_client(directory: &Path) -> Qmp {
    let mut client = Qmp::greeted(&directory.join("qmp"));
    client.stream().write_all(br#"{ "execute": "qmp_capabi"#).unwrap();
    client
}

/// Saves the VM, as often as its driver is just resetting the disk.
fn save(directory: &Path, options: &[&str]) {
    let deadline = Instant::now() + BOUND;
    loop {
        let mut command = minivmm([&["ctl", "qmp", "save", "saved"], options].concat());
        let ended = Session::start(command.current_dir(directory)).wait(BOUND);
        let again = ended.errors.contains("its driver is resetting it; try again");
        if !again || Instant::now() > deadline {
            ended.must_be(0);
            return;
        }
    }
}

/// One thing that an operator may do to a VM; `saves`: to save it, too.
fn step(directory: &Path, saves: bool, random: &mut Random, qmp: &mut Qmp, stalled: &mut Vec<Qmp>) {
    match random.below(8) {
        0 => {
            qmp.query("stop");
            qmp.query("query-blockstats");
            qmp.query("cont");
        }
        1 => {
            let size = SIZE + random.below(16) * STEP;
            qmp.execute("block_resize", json!({ "device": "vda", "size": size })).unwrap();
        }
        2 => drop(qmp.query("system_reset")),
        3 => stalled.push(stalled_client(directory)),
        4 => stalled.clear(),
        5 => {
            let limit = random.below(2) * 1000;
            let mut limits = json!({ "device": "vda", "iops": limit });
            for other in ["bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"] {
                limits[other] = json!(0);
            }
            qmp.execute("block_set_io_throttle", limits).unwrap();
        }
        6 if saves => save(directory, &[]),
        _ => {
            for query in ["query-status", "query-block", "query-blockstats", "x-query-metrics"] {
                qmp.query(query);
            }
        }
    }
    // A client that never reads its events would be told less and less; this one has read them all.
    qmp.events.clear();
}

/// A VM that stays: after each round it has what it had before.
fn stays(temporary: &Path, disk: (&str, &str), end: Instant) {
    let directory = tempdir().unwrap();
    let mut command = vm(directory.path(), temporary, Program::ResetStorm, disk);
    let session = Session::start(command.args(["--console", "none"]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let saves = true;
    let (mut before, mut last, mut round) = (None::<Holdings>, None, 0);
    while round <= WARM_UP || Instant::now() < end {
        let mut stalled = Vec::new();
        for _ in 0..STEPS {
            step(directory.path(), saves, &mut random, &mut qmp, &mut stalled);
        }
        drop(stalled);
        match &before {
            Some(before) => {
                before.assert_same_soon(session.id(), &format!("{disk:?}, round {round}"))
            }
            None if round == WARM_UP => {
                // Its clients are gone once it answers and has no more descriptors than with one.
                settle(&session);
                before = Some(Holdings::of(session.id()));
            }
            None => {}
        }
        last = Some(Holdings::of(session.id()));
        round += 1;
    }
    println!("{disk:?}: {round} rounds, from {before:?} to {last:?}");
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    assert_files(directory.path());
}

/// Waits until the number of descriptors has stayed the same for a while.
fn settle(session: &Session) {
    let mut same = 0;
    let mut before = Holdings::of(session.id()).descriptors;
    while same < 20 {
        std::thread::sleep(Duration::from_millis(5));
        let now = Holdings::of(session.id()).descriptors;
        same = if now == before { same + 1 } else { 0 };
        before = now;
    }
}

/// VMs that come and go.
fn come_and_go(temporary: &Path, seed: u64, end: Instant) {
    let mut random = Random(seed);
    let mut lives = 0;
    while lives == 0 || Instant::now() < end {
        let directory = tempdir().unwrap();
        let disk = DISKS[random.below(DISKS.len() as u64) as usize];
        // What a temporary file has is not in a saved machine.
        let saves = !disk.1.contains("snapshot");
        let mut session =
            Session::start(&mut vm(directory.path(), temporary, Program::DiskLoad, disk));
        session.output.expect_bytes(random.below(20) as usize, BOUND).unwrap();
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        let mut stalled = vec![stalled_client(directory.path())];
        for _ in 0..random.below(4) {
            step(directory.path(), saves, &mut random, &mut qmp, &mut stalled);
        }
        if random.below(2) == 0 && saves {
            save(directory.path(), &["--quit"]);
            let ended = session.wait(BOUND).must_be(0);
            assert!(unexpected_lines(&ended.errors).is_empty(), "{disk:?}: {ended}");
            let mut command =
                minivmm(["--incoming", "file:saved,paths=saved", "--qmp", "unix:qmp"]);
            session =
                Session::start(command.current_dir(directory.path()).env("TMPDIR", temporary));
            session.output.expect_bytes(1, BOUND).unwrap();
            qmp = Qmp::connect(&directory.path().join("qmp"));
        }
        match random.below(3) {
            0 => drop(qmp.query("quit")),
            1 => session.signal(Signal::INT),
            _ => session.signal(Signal::TERM),
        }
        let ended = session.wait(BOUND).must_be(0);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{disk:?}: {ended}");
        assert_files(directory.path());
        lives += 1;
    }
    println!("seed {seed}: {lives} VMs came and went");
}

/// Sockets and unfinished files are gone.
fn assert_files(directory: &Path) {
    let left = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    let left: BTreeSet<_> = left.map(|name| name.into_string().unwrap()).collect();
    let known = ["disk.img", "guest.elf", "saved"];
    assert!(left.iter().all(|name| known.contains(&name.as_str())), "{left:?}");
}

/// Many at once: each is served, and ends as it should.
fn all_at_once(count: u32) {
    let directories: Vec<_> = (0..count).map(|_| tempdir().unwrap()).collect();
    let start = |directory: &TempDir| {
        Session::start(small_guest(directory.path(), Program::Echo).arg("--debug-exit"))
    };
    let mut sessions: Vec<_> = directories.iter().map(start).collect();
    for session in &mut sessions {
        session.expect("ready\n", BOUND);
        session.send(b"\x04");
    }
    for session in sessions {
        session.wait(BOUND).must_be(SUCCESS);
    }
}

#[test]
fn nothing_is_left_behind_by_vms_that_live_on_and_vms_that_come_and_go() {
    if !kvm_is_usable() {
        return;
    }
    let temporary = tempdir().unwrap();
    let end = Instant::now() + soak_time(Duration::from_secs(4));
    let path = temporary.path();
    std::thread::scope(|scope| {
        for disk in [DISKS[0], DISKS[2]] {
            scope.spawn(move || stays(path, disk, end));
        }
        for seed in 1..=u64::from(runs(1, 4)) {
            scope.spawn(move || come_and_go(path, seed, end));
        }
    });
    all_at_once(runs(8, 100));
    let left: Vec<_> = fs::read_dir(temporary.path()).unwrap().collect();
    assert!(left.is_empty(), "temporary files: {left:?}");
}

//! Ends at random moments, with and without I/O: nothing that was acknowledged is lost, and no end takes long.
//!
//! CI makes some runs of each kind, `make soak` all of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{Program, words};
use minivmm_tests::qmp::{self, Qmp};
use minivmm_tests::random::Random;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, runs, small_guest};
use rustix::process::Signal;
use serde_json::json;
use tempfile::tempdir;

/// Sectors of the disk under test.
const SECTORS: u64 = 16 << 11;

fn qemu_img(directory: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}

/// Makes an empty disk of one format.
fn make_disk(directory: &Path, format: &str) {
    let disk = directory.join("disk.img");
    let _ = fs::remove_file(&disk);
    match format {
        "qcow2" => {
            let size = (SECTORS * 512).to_string();
            qemu_img(directory, &["create", "-q", "-f", "qcow2", "disk.img", &size]);
        }
        _ => sparse(&disk, SECTORS * 512),
    }
}

/// The first `sectors` sectors of the disk, as another program reads them.
fn content(directory: &Path, format: &str, sectors: usize) -> Vec<u8> {
    if format == "qcow2" {
        qemu_img(directory, &["check", "-q", "disk.img"]);
        qemu_img(directory, &["convert", "-f", "qcow2", "-O", "raw", "disk.img", "disk.raw"]);
        fs::read(directory.join("disk.raw")).unwrap()[..sectors * 512].to_vec()
    } else {
        fs::read(directory.join("disk.img")).unwrap()[..sectors * 512].to_vec()
    }
}

#[test]
fn a_killed_process_loses_nothing_that_a_flush_covered() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (format, options) in
        [("raw", "format=raw"), ("qcow2", "format=qcow2"), ("raw", "snapshot=on")]
    {
        for run in 0..runs(8, 334) {
            make_disk(directory.path(), format);
            let mut command = small_guest(directory.path(), Program::DiskSync);
            let session = Session::start(command.args(["--disk", &format!("disk.img,{options}")]));
            let dots = random.below(60) as usize;
            session.output.expect_bytes(dots, BOUND).unwrap();
            std::thread::sleep(Duration::from_micros(random.below(2_000)));
            session.signal(Signal::KILL);
            let ended = session.wait(BOUND).must_be(128 + 9);
            let durable = ended.output.len();
            assert!(durable >= dots);
            let content = content(directory.path(), format, durable);
            for (sector, bytes) in content.chunks(512).enumerate() {
                let expected = match options {
                    "snapshot=on" => vec![0; 512],
                    _ => words(sector as u32, 128),
                };
                assert!(bytes == expected, "{options}, run {run}: sector {sector} of {durable}");
            }
        }
    }
}

/// How a run is ended, and with which exit status.
const ENDS: [(&str, i32); 5] =
    [("SIGTERM", 0), ("SIGINT", 0), ("quit", 0), ("stop, quit", 0), ("--timeout", 124)];

/// What the machine is doing: its name, the guest, options of its disk, and how many bytes the guest prints before that.
const STATES: [(&str, Program, &str, usize); 6] = [
    ("idle", Program::Echo, "", 1),
    ("writes", Program::DiskLoad, "", 1),
    ("writes and flushes", Program::DiskSync, "", 1),
    ("throttled", Program::DiskLoad, ",throttling.iops-total=20", 1),
    // A write past the limit on the size of files fails.
    ("io-error", Program::DiskLoad, ",werror=stop", 11),
    ("panicked, with a crash kernel", Program::EarlyEcho, "", 1),
];

/// The command under a limit on the size of files: 16 sectors.
fn limited(command: &Command, directory: &Path) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -f 16; exec \"$@\"", "sh"]).arg(command.get_program());
    shell.args(command.get_args()).current_dir(directory);
    shell
}

fn print_times(state: &str, how: &str, mut times: Vec<Duration>) {
    times.sort();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("| {state} | {how} | {} | {median:.1?} | {longest:.1?} |", times.len());
}

/// How long one end takes, from the moment at which it is asked for.
fn end(directory: &Path, state: usize, how: &str, status: i32, random: &mut Random) -> Duration {
    let (name, program, options, printed) = STATES[state];
    make_disk(directory, "raw");
    let mut command = small_guest(directory, program);
    command.args(["--qmp", "unix:qmp", "--disk", &format!("disk.img{options}")]);
    let limit = Duration::from_millis(50 + random.below(200));
    if how == "--timeout" {
        command.args([how, &format!("{}ms", limit.as_millis())]);
    }
    if name == "io-error" {
        command = limited(&command, directory);
    }
    let started = Instant::now();
    let session = Session::start(&mut command);
    if how == "--timeout" {
        session.wait(BOUND).must_be(status);
        return started.elapsed().saturating_sub(limit);
    }
    let mut qmp = how.contains("quit").then(|| Qmp::connect(&directory.join("qmp")));
    // At least one byte: signals have their meaning once the machine has been built.
    session.output.expect_bytes(printed + random.below(6) as usize, BOUND).unwrap();
    std::thread::sleep(Duration::from_micros(random.below(5_000)));
    let asked = Instant::now();
    match (how, &mut qmp) {
        ("SIGTERM", _) => session.signal(Signal::TERM),
        ("SIGINT", _) => session.signal(Signal::INT),
        (_, Some(qmp)) => {
            if how.starts_with("stop") {
                qmp.execute("stop", json!({})).unwrap();
            }
            qmp.execute("quit", json!({})).unwrap();
        }
        _ => unreachable!("a client for each end through the control socket"),
    }
    session.wait(BOUND).must_be(status);
    asked.elapsed()
}

#[test]
fn an_end_at_any_moment_is_quick_and_clean() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for (state, (name, ..)) in STATES.into_iter().enumerate() {
        for (how, status) in ENDS {
            let end = |_| end(directory.path(), state, how, status, &mut random);
            print_times(name, how, (0..runs(2, 40)).map(end).collect());
        }
    }
    let times = (0..runs(2, 40)).map(|_| {
        let (session, mut qmp) =
            qmp::start(directory.path(), Program::Panic, &["--paused", "--disk", "disk.img"]);
        let begun = Instant::now();
        qmp.execute("cont", json!({})).unwrap();
        session.wait(BOUND).must_be(3);
        begun.elapsed()
    });
    print_times("running", "a panic", times.collect());
}

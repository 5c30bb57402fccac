//! `minivmm powercut` finds what a small database does wrong, and nothing where it does it right.
//!
//! The database is here: it writes a record of eight sectors to the next of four slots, then the record's number to sector 0. It
//! is sound if it flushes before that. A shell script reads a state as the database would after the power is back.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Instant;

use devices::GuestMemory;
use devices::disk::injected_faults;
use devices::disk::log_writes::{self, WriteLog};
use devices::disk::{
    CacheMode, Engine, EngineSetup, GuestRange, OpenOptions, Operation, Transfer, open,
};
use minivmm_tests::refusal::{Call, refuse};
use minivmm_tests::session::Session;
use minivmm_tests::xml::elements;
use minivmm_tests::{BOUND, minivmm};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::{TempDir, tempdir};
use vm_memory::{Bytes, GuestAddress};

const SLOTS: u64 = 4;
const RECORD: u64 = 4096;

/// The number in sector 0 has a whole record in its slot.
const SOUND: &str = r#"n=$(head -c 7 "$0"); slot=$((n % 4 + 1))
[ "$(dd if="$0" bs=4096 skip=$slot count=1 2>/dev/null | sort -u)" = "$n" ]"#;

struct Database {
    engine: Box<dyn Engine>,
    memory: GuestMemory,
}

fn text(number: u64, length: u64) -> Vec<u8> {
    format!("{number}\n").repeat(length as usize / 8).into_bytes()
}

impl Database {
    fn run(&mut self, operation: Operation, offset: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(0)).unwrap();
        let length = data.len() as u64;
        let ranges = &[GuestRange { address: GuestAddress(0), length: length as u32 }];
        let ranges = if data.is_empty() { &[][..] } else { ranges };
        self.engine.submit(Transfer { tag: 0, operation, offset, length, ranges });
        self.engine.commit();
        let mut done = Vec::new();
        self.engine.wait_for_all(&mut done);
        assert!(done.len() == 1 && done[0].result.is_ok(), "{done:?}");
    }
}

/// Commits records on a disk of this cache mode, with a flush before each number if `flushes` says so. The log is `log` in the
/// directory, the disk before it `base`.
fn commit(cache: CacheMode, flushes: bool) -> TempDir {
    commit_with(cache, flushes, &[])
}

/// The same on a disk with faults.
fn commit_with(cache: CacheMode, flushes: bool, faults: &[&str]) -> TempDir {
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let number = 1_000_000;
    let mut base = vec![0; (RECORD * (SLOTS + 1)) as usize];
    base[..512].copy_from_slice(&text(number, 512));
    base[RECORD as usize..][..RECORD as usize].copy_from_slice(&text(number, RECORD));
    fs::write(at("base"), &base).unwrap();
    fs::write(at("disk"), &base).unwrap();
    let log = Arc::new(WriteLog::new(at("log")));
    log.begin().unwrap();
    let options = OpenOptions { cache, ..OpenOptions::new(at("disk")) };
    let disk = log_writes::over(open(&options).unwrap(), log, cache);
    let faults = faults.iter().map(|fault| fault.parse().unwrap()).collect();
    let disk = injected_faults::over(disk, faults);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let engine = disk.engine(EngineSetup::new(memory.clone(), 8)).unwrap();
    let mut database = Database { engine, memory };
    let write = Operation::Write { durable: !cache.writeback() };
    for number in number + 1..number + 8 {
        database.run(write, (number % SLOTS + 1) * RECORD, &text(number, RECORD));
        if flushes {
            database.run(Operation::Flush, 0, &[]);
        }
        database.run(write, 0, &text(number, 512));
        database.run(Operation::Flush, 0, &[]);
    }
    directory
}

fn powercut(directory: &Path, arguments: &[&str]) -> Output {
    let words = [&["powercut", "log", "--base", "base", "--states", "150"], arguments].concat();
    minivmm(words).current_dir(directory).env("TMPDIR", directory).output().unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn check(directory: &Path, script: &str) -> Value {
    let output = powercut(directory, &["--json", "--", "sh", "-c", script, "{}"]);
    let report = report(&output);
    let failed = report["failed"].as_u64().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(failed > 0)), "{output:?}");
    let left: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "only base, disk and log are left: {left:?}");
    report
}

#[test]
fn nothing_is_found_where_a_flush_or_write_through_keeps_the_order() {
    for (cache, flushes) in [(CacheMode::Writeback, true), (CacheMode::Writethrough, false)] {
        let directory = commit(cache, flushes);
        let report = check(directory.path(), SOUND);
        assert_eq!(report["failed"], 0, "{report:#}");
        assert!(report["states"].as_u64().unwrap() > 100, "{report:#}");
    }
}

#[test]
fn a_missing_flush_is_found_and_the_write_that_it_forgot_is_named() {
    let directory = commit(CacheMode::Writeback, false);
    let before = fs::read(directory.path().join("base")).unwrap();
    let found = check(directory.path(), SOUND);
    let failures = found["failures"].as_array().unwrap();
    assert!(!failures.is_empty(), "{found:#}");
    for failure in failures {
        let dropped = failure["dropped"].as_array().unwrap();
        assert_eq!(dropped.len(), 1, "no smaller state fails: {failure:#}");
        assert_eq!(dropped[0]["sectors"], RECORD / 512, "the record, not its number: {failure:#}");
    }
    assert!(fs::read(directory.path().join("base")).unwrap() == before);
    // A name gives the same state, on which the same command fails.
    let state = failures[0]["state"].as_str().unwrap();
    let made = powercut(directory.path(), &["--state", state, "--output", "state"]);
    assert_eq!(made.status.code(), Some(0), "{made:?}");
    let judged = std::process::Command::new("sh")
        .args(["-c", SOUND, "state"])
        .current_dir(directory.path())
        .status();
    assert!(!judged.unwrap().success());
    // A command gets the state, and says with what status this ends.
    let script = format!("{SOUND} || exit 7");
    let mut command = minivmm(["powercut", "log", "--base", "base", "--state", state]);
    command.args(["--", "sh", "-c", &script, "{}"]).current_dir(directory.path());
    let handed = command.env("TMPDIR", directory.path()).output().unwrap();
    assert_eq!(handed.status.code(), Some(7), "{handed:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4, "the file is removed");
    let again = powercut(directory.path(), &["--state", state, "--output", "state"]);
    assert_eq!(again.status.code(), Some(2), "the file is there already: {again:?}");
}

#[test]
fn flushes_that_cache_unsafe_ignores_are_missing() {
    let directory = commit(CacheMode::Unsafe, true);
    let report = check(directory.path(), SOUND);
    assert_ne!(report["failed"], 0, "{report:#}");
}

#[test]
fn a_drive_that_loses_flushes_breaks_a_sound_database() {
    let directory = commit_with(CacheMode::Writeback, true, &["lost:flush:one-in=2:seed=1"]);
    let report = check(directory.path(), SOUND);
    assert_ne!(report["failed"], 0, "{report:#}");
}

#[test]
fn a_command_may_change_a_state_and_the_next_one_is_whole() {
    let directory = commit(CacheMode::Writeback, false);
    let plain = check(directory.path(), SOUND);
    // Overwrites the file, makes another in its place, or removes it.
    for damage in ["tr 1 2 <base >\"$0\"", "cp disk new; mv new \"$0\"", "rm \"$0\""] {
        let script = format!("{SOUND}; status=$?; {damage}; exit $status");
        let report = check(directory.path(), &script);
        assert_eq!(report["failed"], plain["failed"], "{damage}: {report:#}");
    }
}

#[test]
fn the_same_seed_gives_the_same_states_whatever_the_jobs() {
    let directory = commit(CacheMode::Writeback, false);
    let names = |arguments: &[&str]| {
        let words = [arguments, &["--json", "--", "sh", "-c", SOUND, "{}"]].concat();
        report(&powercut(directory.path(), &words))["failed"].clone()
    };
    let one = names(&["--jobs", "1", "--seed", "7"]);
    assert_eq!(one, names(&["--jobs", "5", "--seed", "7"]));
}

#[test]
fn the_text_says_what_failed_and_how_to_have_it_again() {
    let directory = commit(CacheMode::Writeback, false);
    let script = format!("{SOUND} || {{ echo the record is torn; exit 3; }}");
    let output = powercut(directory.path(), &["--", "sh", "-c", &script, "{}"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "log: 14 changes, 7 flushes, 8 epochs; ",
        "exit status 3",
        "the power is cut after entry ",
        "missing: entry ",
        "| the record is torn",
        "the same again: minivmm powercut log --base base --state ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Each of its elements closes, and a label names what the text names.
#[test]
fn the_picture_shows_the_cuts_that_fail_and_what_is_missing() {
    let directory = commit(CacheMode::Writeback, false);
    let arguments = ["--json", "--picture", "cut.svg", "--", "sh", "-c", SOUND, "{}"];
    let report = report(&powercut(directory.path(), &arguments));
    let failures = report["failures"].as_array().unwrap();
    assert!(!failures.is_empty(), "{report:#}");
    let svg = fs::read_to_string(directory.path().join("cut.svg")).unwrap();
    let elements = elements(&svg);
    let texts = |name: &str| -> Vec<&str> {
        let of_name = elements.iter().filter(|element| element.name == name);
        of_name.map(|element| element.text.as_str()).collect()
    };
    for failure in failures {
        let (state, entries) = (failure["state"].as_str().unwrap(), &failure["entries"]);
        let title = format!("state {state}: the power is cut after entry {entries}");
        assert!(texts("text").contains(&title.as_str()), "{title}: {svg}");
        assert!(texts("title").contains(&format!("{state} fails").as_str()), "{svg}");
        let missing = &failure["dropped"][0];
        let (entry, sector) = (&missing["entry"], missing["sector"].as_u64().unwrap());
        let words = format!("{entry}: sectors {sector} to {}: missing", sector + RECORD / 512 - 1);
        assert!(texts("title").contains(&words.as_str()), "{words}: {svg}");
    }
    // Nor is a picture without failures empty.
    let sound = commit(CacheMode::Writeback, true);
    let arguments = ["--picture", "sound.svg", "--", "sh", "-c", SOUND, "{}"];
    assert_eq!(powercut(sound.path(), &arguments).status.code(), Some(0));
    let svg = fs::read_to_string(sound.path().join("sound.svg")).unwrap();
    assert!(svg.contains("0 failed") && svg.contains(": sectors 8 to "), "{svg}");
}

#[test]
fn a_command_that_takes_too_long_is_killed_and_has_failed() {
    let directory = commit(CacheMode::Writeback, true);
    // One state is looked at for too long.
    let script = "mkdir once || exit 0; sleep 1000 & wait; : {}";
    let arguments = ["--command-timeout", "2s", "--json", "--", "sh", "-c", script];
    let output = powercut(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = report(&output);
    let failures = report["failures"].as_array().unwrap();
    assert!(!failures.is_empty(), "{report:#}");
    for failure in failures {
        assert_eq!(failure["exit-status"], 124, "{report:#}");
    }
}

#[test]
fn a_command_that_a_state_is_handed_to_has_its_time_limit_too() {
    let directory = commit(CacheMode::Writeback, true);
    let arguments =
        ["--command-timeout", "1s", "--state", "0:none", "--", "sh", "-c", "exec sleep 1000 # {}"];
    let output = powercut(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(124), "{output:?}");
}

#[test]
fn a_report_that_cannot_be_printed_is_no_success() {
    let directory = commit(CacheMode::Writeback, true);
    let words = ["powercut", "log", "--base", "base", "--states", "3", "--", "true", "{}"];
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let status = minivmm(words).current_dir(directory.path()).stdout(full).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// A command may have a timer of its own, and limits that a signal enforces.
#[test]
fn a_command_has_no_signal_blocked_or_ignored() {
    let directory = commit(CacheMode::Writeback, true);
    let script = "for name in Blk Ign; do grep -q \"Sig$name:.0*$\" /proc/self/status; done; : {}";
    for words in [&["--states", "2"][..], &["--state", "0:all"]] {
        let mut command = minivmm(["powercut", "log", "--base", "base"]);
        command.args(words).args(["--", "sh", "-ec", script]);
        // What the parent of this test ignores stays ignored, SIGHUP under nohup(1).
        let mut behind = Command::new("env");
        behind.arg("--default-signal").arg(command.get_program()).args(command.get_args());
        let status = behind.current_dir(directory.path()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{words:?}");
    }
}

/// SIGCHLD may be ignored, threads may have huge stacks, and the host may have no pidfds (Linux before 5.3).
#[test]
fn a_command_ends_as_ever_whatever_the_parent_and_the_host_do() {
    let directory = commit(CacheMode::Writeback, true);
    let words = ["powercut", "log", "--base", "base", "--states", "3"];
    let mut command = minivmm(words);
    command.args(["--command-timeout", "1m", "--json", "--", "sh", "-c", "exit 3 # {}"]);
    let mut behind = Command::new("env");
    behind.args(["--ignore-signal=CHLD", "RUST_MIN_STACK=100000000000"]);
    behind.arg(command.get_program()).args(command.get_args()).current_dir(directory.path());
    let call = Call { number: libc::SYS_pidfd_open as u32, request: None };
    let output = refuse(&mut behind, call, libc::ENOSYS).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let failures = &report(&output)["failures"];
    assert_eq!(failures[0]["exit-status"], 3, "{output:?}");
}

/// Nor does a state fail whose command was killed for that.
#[test]
fn a_signal_ends_a_command_that_hangs() {
    let directory = commit(CacheMode::Writeback, true);
    let script = "echo >begun; sleep 1000 & wait; : {}";
    let mut command = minivmm(["powercut", "log", "--base", "base", "--jobs", "1"]);
    command.args(["--", "sh", "-c", script]).current_dir(directory.path());
    let session = Session::start(command.env("TMPDIR", directory.path()));
    let deadline = Instant::now() + BOUND;
    while !directory.path().join("begun").exists() {
        assert!(Instant::now() < deadline, "the command is not run");
        std::thread::yield_now();
    }
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(1);
    let text = String::from_utf8(ended.output).unwrap();
    assert!(text.contains(" 0 states: 0 failed\nstopped by a signal"), "{text}");
}

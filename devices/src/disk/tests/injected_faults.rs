//! Injected faults hit the requests that their rules choose, and have the effect that their kind names.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::rig::{Request, Rig, WRITE};
use crate::disk::injected_faults::{self, FaultRule};
use crate::disk::{DiskError, OpenOptions, Operation, open};

/// A disk of 64 sectors of ones, with these faults.
fn faulty(directory: &tempfile::TempDir, rules: &[&str]) -> Rig {
    let path = directory.path().join("image");
    fs::write(&path, [1; 64 * 512]).unwrap();
    let disk = open(&OpenOptions { locking: false, ..OpenOptions::new(path) }).unwrap();
    let rules = rules.iter().map(|rule| rule.parse::<FaultRule>().unwrap()).collect();
    let rig = Rig::new(injected_faults::over(disk, rules));
    rig.put(0, &[2; 8 * 512]);
    rig
}

fn write(sector: u64, sectors: u32) -> Request {
    Request::plain(WRITE, sector * 512, 0, sectors * 512)
}

/// Which of `count` writes one after the other fail.
fn failing(rig: &mut Rig, count: u64) -> Vec<u64> {
    (1..=count).filter(|_| rig.run(&[write(0, 1)])[0].is_err()).collect()
}

#[test]
fn an_error_hits_what_its_words_say() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(failing(&mut faulty(&directory, &["error:n=3"]), 9), [3]);
    assert_eq!(failing(&mut faulty(&directory, &["error:once"]), 9), [1]);
    assert_eq!(failing(&mut faulty(&directory, &["error"]), 3), [1, 2, 3]);
    assert_eq!(failing(&mut faulty(&directory, &["error:read", "error:n=1"]), 3), [1]);
    let some = failing(&mut faulty(&directory, &["error:one-in=4:seed=5"]), 400);
    assert!((50..150).contains(&some.len()), "{}", some.len());
    assert_eq!(some, failing(&mut faulty(&directory, &["error:one-in=4:seed=5"]), 400));
    let mut rig = faulty(&directory, &["error:sectors=10-12"]);
    let hit = |rig: &mut Rig, sector| rig.run(&[write(sector, 2)])[0] == Err(DiskError::Host(5));
    let hits: Vec<_> = (6..16).filter(|sector| hit(&mut rig, *sector)).collect();
    assert_eq!(hits, [9, 10, 11, 12]);
    assert!(fs::read(directory.path().join("image")).unwrap()[10 * 512..11 * 512] == [1; 512]);
}

/// A merged transfer that fails is tried again request by request, and a rule for one hit would have been used up.
#[test]
fn requests_reach_the_rules_one_by_one() {
    let directory = tempfile::tempdir().unwrap();
    assert!(!faulty(&directory, &["error:once"]).engine.merges());
}

#[test]
fn a_torn_write_and_a_lost_one_succeed() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["torn:sectors=0-7", "lost:write:sectors=16-23"]);
    rig.ok(write(0, 8));
    rig.ok(write(16, 8));
    rig.ok(write(32, 8));
    let image = fs::read(directory.path().join("image")).unwrap();
    let written: Vec<_> =
        (0..64_usize).filter(|sector| image[sector * 512..][..512] == [2; 512]).collect();
    assert_eq!(written, [0, 1, 2, 3, 32, 33, 34, 35, 36, 37, 38, 39]);
}

#[test]
fn a_flipped_bit_is_in_what_the_guest_reads_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["flip:once"]);
    let read = Request::plain(Operation::Read, 0, 0, 4096);
    rig.ok(read.clone());
    let wrong =
        rig.get(0, 4096).iter().filter(|byte| **byte != 1).map(|byte| byte ^ 1).collect::<Vec<_>>();
    assert_eq!(wrong, [1]);
    rig.ok(read);
    assert!(rig.get(0, 4096) == [1; 4096]);
}

#[test]
fn a_misdirected_write_is_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["misdirected:to=40:once", "misdirected:to=62:once"]);
    rig.ok(write(0, 8));
    // The place is one where it fits.
    rig.ok(write(8, 8));
    let image = fs::read(directory.path().join("image")).unwrap();
    let written: Vec<_> =
        (0..64_usize).filter(|sector| image[sector * 512..][..512] == [2; 512]).collect();
    assert_eq!(written, (40..48).chain(56..64).collect::<Vec<_>>());
}

/// The rig sleeps on the engine's descriptor until the delays are over.
#[test]
fn a_delayed_request_completes_later() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["delay:ms=200:n=1", "delay:ms=100:n=1"]);
    let began = Instant::now();
    assert_eq!(rig.run(&[write(0, 1), write(8, 1), write(16, 1)]), [Ok(()), Ok(()), Ok(())]);
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
}

#[test]
fn a_request_hangs_until_its_rule_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["hang:once", "hang:read"]);
    let disk = Arc::clone(&rig.disk);
    let faults = injected_faults::of(&*disk).unwrap();
    let counts = || {
        let rules = faults.rules().into_iter();
        rules.map(|counted| (counted.id, counted.seen, counted.hits)).collect::<Vec<_>>()
    };
    rig.submit(&[write(0, 1), write(8, 1)]);
    assert_eq!(rig.wait(1, |_| {}), HashMap::from([(1, Ok(()))]));
    assert_eq!(counts(), [(1, 2, 1), (2, 0, 0)]);
    assert!(!faults.remove(Some(7)));
    let mut done = Vec::new();
    rig.engine.reap(&mut done);
    assert!(done.is_empty(), "{done:?}");
    let waiting = std::thread::spawn(move || rig.wait(1, |_| {}));
    assert!(faults.remove(Some(1)));
    assert_eq!(waiting.join().unwrap(), HashMap::from([(0, Ok(()))]));
    assert_eq!(faults.add("error".parse().unwrap()), Some(3));
    assert_eq!(counts(), [(2, 0, 0), (3, 0, 0)]);
    assert!(faults.remove(None));
    assert!(counts().is_empty());
}

/// As a drive's bad sectors, which a write makes it replace.
#[test]
fn a_write_heals_bad_sectors() {
    let directory = tempfile::tempdir().unwrap();
    let rules = ["error:n=1", "error:read:sectors=10-20:until-written"];
    let mut rig = faulty(&directory, &rules);
    let bad = |rig: &mut Rig| {
        let read = |sector| Request::plain(Operation::Read, sector * 512, 0x8000, 512);
        let is_bad = |sector: &u64| rig.run(&[read(*sector)])[0].is_err();
        (0..64).filter(is_bad).collect::<Vec<_>>()
    };
    assert_eq!(bad(&mut rig), (10..=20).collect::<Vec<_>>());
    // This one fails, and heals nothing.
    rig.error(write(12, 3));
    assert_eq!(bad(&mut rig), (10..=20).collect::<Vec<_>>());
    rig.ok(write(12, 3));
    assert_eq!(bad(&mut rig), [10, 11, 15, 16, 17, 18, 19, 20]);
    rig.ok(write(0, 8));
    rig.ok(write(8, 8));
    rig.ok(write(16, 8));
    assert!(bad(&mut rig).is_empty());
}

#[test]
fn an_error_may_be_that_there_is_no_space() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = faulty(&directory, &["error:nospace"]);
    assert_eq!(rig.error(write(0, 1)), DiskError::NoSpace);
}

#[test]
fn what_makes_no_sense_is_refused() {
    for bad in [
        "",
        "wrong",
        "error:",
        "error:n=0",
        "error:n=x",
        "error:sectors=9-3",
        "error:once=1",
        "torn:read",
        "flip:write",
        "lost:read",
        "lost:flush:sectors=1-2",
        "error:one-in=0",
        "delay",
        "delay:ms=0",
        "hang:ms=1",
        "lost:nospace",
        "misdirected",
        "misdirected:read:to=1",
        "error:to=1",
        "error:read:until-written",
        "error:sectors=1-2:until-written",
        "error:read:sectors=0-65536:until-written",
        "error:read:sectors=0-18446744073709551615:until-written",
    ] {
        assert!(bad.parse::<FaultRule>().is_err(), "{bad}");
    }
}

//! Faults on order hit the requests that they are for, and do what they are called.

use std::fs;

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
    ] {
        assert!(bad.parse::<FaultRule>().is_err(), "{bad}");
    }
}

//! `log-writes=`: what a small guest writes, read from the log by the layout of dm-log-writes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::guest::{self, DISK_SECTORS, Program, words};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, small_guest, unexpected_lines};
use tempfile::tempdir;

/// Runs the guest that writes sector 7 and flushes, with a disk of these keys.
fn run(directory: &Path, keys: &str) -> Ended {
    let mut image = vec![0x77; DISK_SECTORS as usize * 512];
    image[3 * 512..][..512].copy_from_slice(&words(0x5a00_0000, 128));
    fs::write(directory.join("disk.img"), image).unwrap();
    let mut guest = small_guest(directory, Program::Disk);
    guest.args(["--debug-exit", "--disk", &format!("disk.img,{keys}")]);
    Session::start(&mut guest).wait(BOUND).must_be(guest::SUCCESS)
}

/// Sector, sectors, flags and text of each entry, in which the data is skipped.
fn entries(log: &[u8]) -> Vec<(u64, u64, u64, String)> {
    let number = |at: usize| u64::from_le_bytes(*log[at..].first_chunk().unwrap());
    assert_eq!((number(0), number(8), number(24) as u32), (0x006a_7366_7773_6872, 1, 512));
    let mut at = 512;
    let entries = (0..number(16)).map(|_| {
        let [sector, sectors, flags, length] = [0, 8, 16, 24].map(|field| number(at + field));
        let text = String::from_utf8(log[at + 32..at + 32 + length as usize].to_vec()).unwrap();
        at += 512 + if flags & (4 | 8) == 0 { sectors as usize * 512 } else { 0 };
        (sector, sectors, flags, text)
    });
    entries.collect()
}

#[test]
fn a_guests_writes_and_flushes_are_logged_in_a_confined_machine() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let complete = (0, 0, 8, "minivmm: complete".to_owned());
    for (keys, write, flush) in [
        ("cache=writeback", 0, 1),
        ("aio=threads", 0, 1),
        ("snapshot=on", 0, 1),
        ("cache=writethrough", 2, 1),
        ("cache=unsafe", 0, 8),
    ] {
        let ended = run(directory.path(), &format!("{keys},log-writes=w.log"));
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
        let log = fs::read(directory.path().join("w.log")).unwrap();
        let entries = entries(&log);
        let flags: Vec<_> = entries.iter().map(|entry| entry.2).collect();
        // A reset of the device and the end of the machine flush, too.
        assert_eq!(flags[..3], [8, write, flush], "{keys}: {entries:?}");
        assert!(flags[3..].iter().all(|flags| *flags == flush), "{keys}: {entries:?}");
        assert_eq!(entries[0], complete);
        assert_eq!((entries[1].0, entries[1].1), (7, 1), "{keys}");
        assert_eq!(log[3 * 512..4 * 512], words(0xc300_0000, 128), "{keys}");
    }
}

#[test]
fn a_full_host_ends_the_log_and_not_the_guest() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    fs::write(&image, [0; 8192]).unwrap();
    let guest = small_guest(directory.path(), Program::DiskSync);
    // The image's size, of which the log needs thrice as much. bash counts units of 1024 bytes instead of 512.
    let limit = "ulimit -f 16; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.current_dir(directory.path()).args(["-c", limit]).arg(guest.get_program());
    command.args(guest.get_args());
    command.args(["--debug-exit", "--disk", "disk.img,log-writes=w.log"]);
    let ended = Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS);
    let lines = unexpected_lines(&ended.errors);
    assert_eq!(lines.len(), 1, "said once: {ended}");
    for part in ["log-writes=w.log", "File too large", "incomplete", "the guest goes on"] {
        assert!(lines[0].contains(part), "{part}: {ended}");
    }
    let log = fs::read(directory.path().join("w.log")).unwrap();
    let entries = entries(&log);
    assert_eq!(entries[0], (0, 0, 8, "minivmm: incomplete".to_owned()));
    assert!(entries.len() > 5, "{entries:?}");
    let image = fs::read(&image).unwrap();
    assert_eq!(image[15 * 512..], words(15, 128), "the last sector is written");
}

//! Logs of writes, read by the layout of dm-log-writes and not by the code that writes them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use super::rig::{self, DEPTH, Request, Rig, WRITE};
use crate::disk::log_writes::{self, WriteLog};
use crate::disk::powercut::Random;
use crate::disk::{Aio, CacheMode, Disk, Format, OpenOptions, Operation, open};

const DISK: u64 = 2 << 20;
/// What one request of a load changes at most: a cluster of a qcow2 image.
const PLACE: u64 = 64 << 10;

/// An entry, and its data.
#[derive(Debug, PartialEq)]
struct Logged {
    sector: u64,
    sectors: u64,
    flags: u64,
    text: String,
    data: Vec<u8>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

/// Reads a log as xfstests' replay-log does: struct log_write_super, then each struct log_write_entry.
fn read(path: &Path) -> Vec<Logged> {
    let log = fs::read(path).unwrap();
    assert_eq!((number(&log, 0), number(&log, 8)), (0x006a_7366_7773_6872, 1), "magic and version");
    assert_eq!(number(&log, 24) as u32, 512, "bytes of a sector");
    let mut at = 512;
    let entries = (0..number(&log, 16)).map(|_| {
        let [sector, sectors, flags, length] = [0, 8, 16, 24].map(|field| number(&log, at + field));
        let text = log[at + 32..at + 32 + length as usize].to_vec();
        assert!(flags & 8 != 0 || log[at + 32] == 0, "replay-log takes that for a damaged entry");
        assert!(flags != 0 || sectors != 0, "replay-log takes that for a damaged entry");
        at += 512;
        let has_data = flags & (4 | 8) == 0;
        let data = if has_data { log[at..at + sectors as usize * 512].to_vec() } else { vec![] };
        at += data.len();
        Logged { sector, sectors, flags, text: String::from_utf8(text).unwrap(), data }
    });
    let entries = entries.collect();
    assert_eq!(at, log.len(), "nothing follows");
    entries
}

fn replay(entries: &[Logged], disk: &mut [u8]) {
    for entry in entries {
        let (start, length) = (entry.sector as usize * 512, entry.sectors as usize * 512);
        match entry.flags & 4 {
            0 => disk[start..start + entry.data.len()].copy_from_slice(&entry.data),
            _ => disk[start..start + length].fill(0),
        }
    }
}

/// A disk of zeroes whose writes are logged to `log` in `directory`.
fn logged(directory: &Path, options: &OpenOptions) -> Arc<dyn Disk> {
    let log = Arc::new(WriteLog::new(directory.join("log")));
    log.check().unwrap();
    log.begin().unwrap();
    log_writes::over(open(options).unwrap(), log, options.cache)
}

fn raw(directory: &Path) -> OpenOptions {
    let path = directory.join("image");
    fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    OpenOptions { locking: false, ..OpenOptions::new(path) }
}

/// Changes of all kinds, several at once, in every part of the disk from place `first` on.
fn load(rig: &mut Rig, first: u64, places: u64, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..20 {
        let mut requests = Vec::new();
        for place in first..first + places {
            let (offset, memory) = (place * PLACE, (place - first) * PLACE);
            let zeroes = Operation::WriteZeroes { unmap: place % 2 == 0, durable: false };
            requests.push(match random.below(8) {
                0 => Request::bare(Operation::Discard, offset, PLACE),
                1 => Request::bare(zeroes, offset, PLACE),
                2 => Request::bare(Operation::Flush, 0, 0),
                _ => {
                    let sectors = 1 + random.below(PLACE / 512 - 1);
                    let data = vec![1 + random.below(255) as u8; sectors as usize * 512];
                    rig.put(memory, &data);
                    let start = offset + random.below(PLACE / 512 - sectors) * 512;
                    Request::plain(WRITE, start, memory, data.len() as u32)
                }
            });
        }
        assert!(rig.run(&requests).iter().all(Result::is_ok));
    }
}

/// What the guest reads.
fn content(rig: &mut Rig) -> Vec<u8> {
    rig.ok(Request::plain(Operation::Read, 0, 0, DISK as u32));
    rig.get(0, DISK as usize)
}

#[test]
fn a_log_replays_to_what_the_disk_has() {
    for directory in rig::directories() {
        for aio in [Aio::Threads, Aio::IoUring] {
            let options = OpenOptions { aio, ..raw(directory.path()) };
            check_load(directory.path(), &options);
        }
        let qcow2 = directory.path().join("qcow2");
        let size = DISK.to_string();
        let create = ["create", "-f", "qcow2", qcow2.to_str().unwrap(), &size];
        if rig::run(Command::new("qemu-img").args(create)).is_ok() {
            let format = Some(Format::Qcow2);
            check_load(directory.path(), &OpenOptions { format, ..OpenOptions::new(&qcow2) });
        }
    }
}

fn check_load(directory: &Path, options: &OpenOptions) {
    let mut rig = Rig::new(logged(directory, options));
    load(&mut rig, 0, DISK / PLACE, 5);
    let expected = content(&mut rig);
    // Without an end: a killed minivmm leaves the same.
    let entries = read(&directory.join("log"));
    let mut replayed = vec![0; DISK as usize];
    replay(&entries, &mut replayed);
    assert!(replayed == expected, "{options:?}");
    let flags = entries.iter().fold(0, |all, entry| all | entry.flags);
    assert_eq!(flags, 1 | 4 | 8, "flushes, discards, and a mark");
    assert_eq!(entries[0].text, "minivmm: complete");
}

#[test]
fn several_queues_share_a_log() {
    let directory = tempfile::tempdir().unwrap();
    let disk = logged(directory.path(), &raw(directory.path()));
    let half = DISK / PLACE / 2;
    let queues: Vec<_> = [0, half]
        .map(|first| {
            let mut rig = Rig::new(Arc::clone(&disk));
            thread::spawn(move || load(&mut rig, first, half, first))
        })
        .into_iter()
        .collect();
    queues.into_iter().for_each(|queue| queue.join().unwrap());
    let expected = content(&mut Rig::new(disk));
    let mut replayed = vec![0; DISK as usize];
    replay(&read(&directory.path().join("log")), &mut replayed);
    assert!(replayed == expected);
}

#[test]
fn a_flush_stands_behind_what_it_covers_and_before_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(logged(directory.path(), &raw(directory.path())));
    let write = |sector: u64| Request::plain(WRITE, sector * 512, 0, 512);
    rig.ok(write(1));
    // What completes while the flush is under way is not covered by it.
    let batch: Vec<_> = std::iter::once(Request::bare(Operation::Flush, 0, 0))
        .chain((2..u64::from(DEPTH)).map(write))
        .collect();
    assert!(rig.run(&batch).iter().all(Result::is_ok));
    let entries = read(&directory.path().join("log"));
    let place = entries.iter().position(|entry| entry.flags == 1).unwrap();
    assert_eq!(entries[place - 1].sector, 1);
    assert_eq!(entries.len() - place - 1, DEPTH as usize - 2);
}

#[test]
fn durable_writes_are_fua_and_failed_ones_are_marks() {
    let directory = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(logged(directory.path(), &raw(directory.path())));
    rig.ok(Request::plain(Operation::Write { durable: true }, 512, 0, 512));
    rig.error(Request::plain(WRITE, DISK, 0, 512));
    let entries = read(&directory.path().join("log"));
    assert_eq!((entries[1].flags, entries[1].sector), (2, 1));
    assert_eq!(entries[2].flags, 8);
    assert!(entries[2].text.starts_with("failed: 1 sectors at 4096"), "{}", entries[2].text);
    assert_eq!(entries.len(), 3);
}

#[test]
fn flushes_that_make_nothing_durable_are_marks() {
    let directory = tempfile::tempdir().unwrap();
    let options = OpenOptions { cache: CacheMode::Unsafe, ..raw(directory.path()) };
    let mut rig = Rig::new(logged(directory.path(), &options));
    rig.ok(Request::bare(Operation::Flush, 0, 0));
    let entries = read(&directory.path().join("log"));
    assert_eq!((entries.len(), entries[1].flags), (2, 8), "{entries:?}");
}

#[test]
fn an_older_log_is_emptied_when_a_new_one_begins_and_nothing_else_is_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let mut rig = Rig::new(logged(directory.path(), &raw(directory.path())));
    rig.ok(Request::plain(WRITE, 0, 0, 4096));
    drop(rig);
    let older = fs::read(&path).unwrap();
    let log = WriteLog::new(&path);
    log.check().unwrap();
    assert_eq!(fs::read(&path).unwrap(), older, "a start that is refused changes nothing");
    let second = WriteLog::new(&path).check().unwrap_err().to_string();
    assert!(second.contains("another machine"), "{second}");
    log.begin().unwrap();
    drop(log);
    assert_eq!(read(&path).len(), 1, "a guest that wrote nothing");
    fs::write(&path, "a letter to a friend").unwrap();
    let refused = WriteLog::new(&path).check().unwrap_err().to_string();
    assert!(refused.contains("something else"), "{refused}");
    assert_eq!(fs::read(&path).unwrap(), b"a letter to a friend");
}

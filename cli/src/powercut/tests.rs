//! Which states are legal: small logs, in dm-log-writes' own format and in minivmm's.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use devices::disk::log_writes::format::{DISCARD, Entry, FLUSH, FUA, MARK, superblock};
use tempfile::TempDir;

use super::history::History;
use super::medium::Medium;
use super::plan::Plan;

/// A write of one letter to `sectors` from `sector` on.
fn write(sector: u64, sectors: u64, letter: u8) -> (Entry, u8) {
    (Entry { sector, sectors, ..Entry::default() }, letter)
}

fn flush() -> (Entry, u8) {
    (Entry { flags: FLUSH, ..Entry::default() }, 0)
}

impl super::history::Change {
    pub(super) fn of(sector: u64, sectors: u64) -> Self {
        Self { entry: 0, sector, sectors, data: None, begun: 0 }
    }

    fn letter(&self, history: &History) -> char {
        let mut letter = [b'_'];
        if let Some(data) = self.data {
            std::os::unix::fs::FileExt::read_exact_at(&history.file, &mut letter, data).unwrap();
        }
        char::from(letter[0])
    }
}

fn log(directory: &Path, entries: &[(Entry, u8)]) -> History {
    let mut bytes = superblock(entries.len() as u64).to_vec();
    for (entry, letter) in entries {
        bytes.extend(entry.encode());
        if entry.has_data() {
            bytes.extend(vec![*letter; entry.sectors as usize * 512]);
        }
    }
    let path = directory.join("log");
    fs::write(&path, bytes).unwrap();
    History::read(&path).unwrap()
}

/// For each epoch what the medium may be: a letter a sector, `.` for what was there before.
fn states(entries: &[(Entry, u8)]) -> Vec<BTreeSet<String>> {
    let directory = TempDir::new().unwrap();
    let history = log(directory.path(), entries);
    let base = directory.path().join("base");
    fs::write(&base, vec![b'.'; 4 * 512]).unwrap();
    let base = File::open(base).unwrap();
    let mut medium = Medium::new(&history, &base, directory.path().join("state")).unwrap();
    let mut epochs = vec![BTreeSet::new(); history.epochs()];
    for choice in Plan::new(&history, 2000, 1, 1) {
        medium.hold(&choice).unwrap();
        medium.looked_at().unwrap();
        let bytes = fs::read(medium.path()).unwrap();
        let sectors = bytes.chunks(512).map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "sectors are whole");
            if sector[0] == 0 { '0' } else { char::from(sector[0]) }
        });
        epochs[choice.epoch].insert(sectors.collect());
    }
    epochs
}

fn set(states: &[&str]) -> BTreeSet<String> {
    states.iter().map(|state| (*state).to_owned()).collect()
}

#[test]
fn what_a_flush_covers_is_there_and_the_rest_may_be() {
    let epochs = states(&[write(0, 1, b'a'), write(1, 1, b'b'), flush(), write(0, 1, b'c')]);
    assert_eq!(epochs[0], set(&["....", "a...", ".b..", "ab.."]));
    assert_eq!(epochs[1], set(&["ab..", "cb.."]));
}

#[test]
fn a_write_is_torn_between_sectors() {
    let epochs = states(&[write(1, 2, b'a')]);
    assert_eq!(epochs[0], set(&["....", ".a..", "..a.", ".aa."]));
}

#[test]
fn a_durable_write_is_there_and_replaces_what_was_in_its_sectors() {
    let fua =
        |sector, letter| (Entry { sector, sectors: 1, flags: FUA, ..Entry::default() }, letter);
    let epochs = states(&[write(0, 2, b'a'), fua(0, b'b'), write(2, 1, b'c')]);
    assert_eq!(epochs[0].len(), 2 * 3, "{:?}", epochs[0]);
    assert_eq!(epochs[1], set(&["b...", "ba..", "b.c.", "bac."]));
}

#[test]
fn a_discard_reads_as_zeroes_or_was_not_made() {
    let discard = Entry { sector: 0, sectors: 1, flags: DISCARD, ..Entry::default() };
    let epochs = states(&[write(0, 1, b'a'), flush(), (discard, 0), flush()]);
    assert_eq!(epochs[1], set(&["a...", "0..."]));
    assert_eq!(epochs[2], set(&["0..."]));
}

#[test]
fn what_was_submitted_before_a_flush_ended_may_be_there_before_it() {
    // `b` was submitted before the flush, and completed after it; `c` may have been submitted after its end.
    let ordered = |mut entry: (Entry, u8), submitted, flushed| {
        entry.0.submitted = Some(submitted);
        entry.0.flushed = flushed;
        entry
    };
    let epochs = states(&[
        ordered(write(0, 1, b'a'), 0, None),
        ordered(flush(), 1, Some(2)),
        ordered(write(1, 1, b'b'), 0, None),
        ordered(write(2, 1, b'c'), 2, None),
    ]);
    // The flush ends when the log has two entries, of which neither is `b`.
    assert_eq!(epochs[0], set(&["....", "a...", ".b..", "ab.."]));
    assert_eq!(epochs[1], set(&["a...", "ab..", "a.c.", "abc."]));
}

#[test]
fn a_damaged_log_is_read_as_far_as_it_goes() {
    let directory = TempDir::new().unwrap();
    let huge = Entry { sector: u64::MAX - 1, sectors: 1 << 60, flags: DISCARD, ..Entry::default() };
    let mark = Entry { flags: MARK, text: "x".repeat(600), ..Entry::default() };
    let entries = [write(0, 1, b'a'), (huge, 0), (mark, 0), write(1, 1, b'b')];
    let history = log(directory.path(), &entries);
    let letters: String = history.changes.iter().map(|change| change.letter(&history)).collect();
    assert_eq!((letters.as_str(), history.is_incomplete), ("ab", false));
    let path = directory.path().join("log");
    let bytes = fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(100) {
        fs::write(&path, &bytes[..length]).unwrap();
        if let Ok(history) = History::read(&path) {
            assert!(history.is_incomplete, "{length}");
        }
    }
}

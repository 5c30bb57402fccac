//! A log of writes as a history: which change was under way or durable when.
//!
//! Time is counted in entries of the log. A change is *complete* from its own entry on. It has *begun* from its submission on, as its
//! entry says, or from its own entry on if the log does not say. A *durability event* is the end of a flush, or of a write that was
//! durable when it completed. Between two events only more changes begin, so the medium has the most legal states just before an event.
//! Those moments, and the end of the log, are the *epochs* at which the power is cut.
//!
//! | at an epoch | on the medium |
//! |---|---|
//! | covered by a flush that has succeeded, or durable by itself and complete | yes |
//! | begun, and not durable | each sector or not: the change is *open* |
//! | begun, but a later durable write has replaced the sector | no |
//! | not begun | no |

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devices::disk::log_writes::format::{
    DISCARD, Entry, FLUSH, FUA, INCOMPLETE, LogSector, MARK, SECTOR_BYTES, VERSION, read_superblock,
};

use super::error::PowercutError;

/// No disk has more sectors: offsets in files are signed.
const SECTORS_MAX: u64 = i64::MAX as u64 / SECTOR_BYTES as u64;

/// A write, a discard or a zeroing.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Its place in the log.
    pub(super) entry: u64,
    pub(super) sector: u64,
    pub(super) sectors: u64,
    /// Where its data is in the log. `None`: it reads as zeroes afterwards.
    pub(super) data: Option<u64>,
    /// How many entries the log had when it was submitted.
    pub(super) begun: u64,
}

/// Makes changes durable.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A flush that covers the entries before `place`, and succeeded when the log had `done` entries.
    Flush { place: u64, done: u64 },
    /// The change of this index is complete and was durable by itself.
    Durable(usize),
}

/// All of a log.
#[derive(Debug)]
pub(super) struct History {
    pub(super) file: File,
    /// In the order of the log.
    pub(super) changes: Vec<Change>,
    /// By change: the earliest submission of it and of all later ones.
    earliest: Vec<u64>,
    events: Vec<Event>,
    entries: u64,
    pub(super) flushes: u64,
    /// What was written later is missing: the log ended early.
    pub(super) is_incomplete: bool,
}

impl History {
    /// Reads the log at `path`.
    ///
    /// # Errors
    /// It is no log, or it cannot be read. An entry that is cut off ends it.
    pub(super) fn read(path: &Path) -> Result<Self, PowercutError> {
        let failed = |source| PowercutError::file("LOG", path, source);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut sector: LogSector = [0; SECTOR_BYTES];
        let superblock = file.read_exact_at(&mut sector, 0).ok();
        let announced = match superblock.and_then(|()| read_superblock(&sector)) {
            Some((VERSION, entries, size)) if size as usize == SECTOR_BYTES => entries,
            Some(_) => return Err(PowercutError::Version(path.to_owned())),
            None => return Err(PowercutError::NoLog(path.to_owned())),
        };
        let mut history = Self {
            file,
            changes: Vec::new(),
            earliest: Vec::new(),
            events: Vec::new(),
            entries: 0,
            flushes: 0,
            is_incomplete: false,
        };
        let mut at = SECTOR_BYTES as u64;
        while history.entries < announced && at + SECTOR_BYTES as u64 <= length {
            history.file.read_exact_at(&mut sector, at).map_err(failed)?;
            let entry = Entry::decode(&sector);
            at += SECTOR_BYTES as u64;
            let data = match entry.has_data() {
                true => entry.sectors.saturating_mul(SECTOR_BYTES as u64),
                false => 0,
            };
            if data > length - at {
                break;
            }
            history.add(&entry, at);
            at += data;
        }
        history.is_incomplete |= history.entries < announced;
        history.order_events();
        Ok(history)
    }

    fn add(&mut self, entry: &Entry, data: u64) {
        let index = self.entries;
        self.entries += 1;
        if entry.flags & MARK != 0 {
            self.is_incomplete |= index == 0 && entry.text == INCOMPLETE;
            return;
        }
        if entry.flags & FLUSH != 0 {
            let done = entry.flushed.unwrap_or(index).max(index);
            self.events.push(Event::Flush { place: index, done });
            self.flushes += 1;
        }
        let end = entry.sector.checked_add(entry.sectors);
        if entry.sectors == 0 || end.is_none_or(|end| end > SECTORS_MAX) {
            return;
        }
        if entry.flags & FUA != 0 {
            self.events.push(Event::Durable(self.changes.len()));
        }
        self.changes.push(Change {
            entry: index,
            sector: entry.sector,
            sectors: entry.sectors,
            data: (entry.flags & DISCARD == 0).then_some(data),
            begun: entry.submitted.unwrap_or(index).min(index),
        });
    }

    /// Puts the events in the order in which they happened.
    fn order_events(&mut self) {
        let Self { changes, events, earliest, .. } = self;
        let mut least = u64::MAX;
        earliest.extend(changes.iter().rev().map(|change| {
            least = least.min(change.begun);
            least
        }));
        earliest.reverse();
        // At one count of entries a flush ends before the next entry is there.
        events.sort_by_key(|event| match *event {
            Event::Flush { done, .. } => (done, 0),
            Event::Durable(index) => (changes[index].entry, 1),
        });
    }

    /// How many epochs there are: one before each event, and the end.
    pub(super) fn epochs(&self) -> usize {
        self.events.len() + 1
    }

    /// How many entries the log has at an epoch.
    pub(super) fn entries_at(&self, epoch: usize) -> u64 {
        match self.events.get(epoch) {
            Some(Event::Flush { done, .. }) => (*done).min(self.entries),
            Some(Event::Durable(index)) => self.changes[*index].entry,
            None => self.entries,
        }
    }

    /// The flushes: how many entries each covers, and how many the log had when it succeeded.
    pub(super) fn flush_spans(&self) -> impl Iterator<Item = (u64, u64)> {
        self.events.iter().filter_map(|event| match *event {
            Event::Flush { place, done } => Some((place, done)),
            Event::Durable(_) => None,
        })
    }

    /// The changes from `first` on that have begun at an epoch, in the order of the log.
    fn begun(&self, epoch: usize, first: usize) -> impl Iterator<Item = usize> {
        let count = self.entries_at(epoch);
        // What was submitted at the moment of a flush's end may have been submitted after it; what was submitted when a durable
        // write was not in the log yet was submitted before its end.
        let limit = match self.events.get(epoch) {
            Some(Event::Durable(_)) => count + 1,
            _ => count,
        };
        let has_begun = move |index: &usize| {
            let change = &self.changes[*index];
            change.entry < count || change.begun < limit
        };
        (first..self.changes.len())
            .take_while(move |index| has_begun(index) || self.earliest[*index] < limit)
            .filter(has_begun)
    }

    /// What the event at the end of an epoch makes durable. What is durable already may be among it; what is before `first` is.
    fn made_durable(&self, epoch: usize, first: usize) -> Range<usize> {
        match self.events.get(epoch) {
            Some(Event::Flush { place, .. }) => {
                first..self.changes.partition_point(|change| change.entry < *place)
            }
            Some(Event::Durable(index)) => *index..index + 1,
            None => 0..0,
        }
    }
}

/// Goes through the epochs of a history, and knows which changes are durable.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) epoch: usize,
    is_durable: Vec<bool>,
    /// Changes before this one are durable.
    first: usize,
}

impl Walk {
    /// At the first epoch.
    pub(super) fn new(history: &History) -> Self {
        Self { epoch: 0, is_durable: vec![false; history.changes.len()], first: 0 }
    }

    /// Goes to the next epoch. Returns the changes that have become durable, in the order of the log.
    pub(super) fn step(&mut self, history: &History) -> Vec<usize> {
        let new = history.made_durable(self.epoch, self.first);
        let new =
            new.filter(|index| !std::mem::replace(&mut self.is_durable[*index], true)).collect();
        while self.is_durable.get(self.first) == Some(&true) {
            self.first += 1;
        }
        self.epoch += 1;
        new
    }

    /// The open changes, in the order of the log.
    pub(super) fn open(&self, history: &History) -> Vec<usize> {
        history.begun(self.epoch, self.first).filter(|index| !self.is_durable[*index]).collect()
    }
}

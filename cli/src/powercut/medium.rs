//! A file that holds one state of the medium after the other.
//!
//! The file is a copy of the base image with what is durable at an epoch. A state puts the chosen sectors over that; the next one
//! takes them away again. So a state costs what differs, as long as the command that looks at it leaves the file alone. If the
//! command has changed the file, which its time of modification shows, it is copied anew: by a reflink, or without its holes.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use devices::disk::SECTOR;
use rustix::fs::{FallocateFlags, SeekFrom};

use super::choice::{Choice, Presence};
use super::history::{History, Walk};

/// Bytes that are copied at once.
const CHUNK: u64 = 1 << 20;

pub(super) struct Medium<'a> {
    history: &'a History,
    base: &'a File,
    path: PathBuf,
    file: File,
    walk: Walk,
    durable: Extents,
    /// Sectors that the present state has changed.
    changed: Vec<Range<u64>>,
    /// The file holds what is durable, and `changed`.
    is_valid: bool,
}

/// Which change ranges of sectors have their durable content from. Ranges do not overlap.
#[derive(Default)]
struct Extents(BTreeMap<u64, (u64, usize)>);

impl Extents {
    /// The extents that reach into `range`, as far as they do, in order.
    fn inside(&self, range: &Range<u64>) -> impl Iterator<Item = (Range<u64>, usize)> {
        let (start, end) = (range.start, range.end);
        let before = self.0.range(..start).next_back();
        before.into_iter().chain(self.0.range(start..end)).filter_map(
            move |(at, (until, index))| {
                let part = (*at).max(start)..(*until).min(end);
                (!part.is_empty()).then_some((part, *index))
            },
        )
    }

    /// `range` is from change `index` now.
    fn insert(&mut self, range: Range<u64>, index: usize) {
        let overlapping: Vec<_> = self.inside(&range).map(|(part, _)| part.start).collect();
        for start in overlapping {
            let Some((&at, &(until, of))) = self.0.range(..=start).next_back() else { continue };
            self.0.remove(&at);
            if at < range.start {
                self.0.insert(at, (range.start, of));
            }
            if until > range.end {
                self.0.insert(range.end, (until, of));
            }
        }
        self.0.insert(range.start, (range.end, index));
    }
}

/// The time of modification of a file that no command has changed.
fn untouched() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1)
}

impl<'a> Medium<'a> {
    /// A medium at the first epoch, in a new file at `path`.
    pub(super) fn new(history: &'a History, base: &'a File, path: PathBuf) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        Ok(Self {
            history,
            base,
            path,
            file,
            walk: Walk::new(history),
            durable: Extents::default(),
            changed: Vec::new(),
            is_valid: false,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The open changes at an epoch that is not before the present one.
    pub(super) fn open_at(&mut self, epoch: usize) -> io::Result<Vec<usize>> {
        self.go_to(epoch)?;
        Ok(self.walk.open(self.history))
    }

    /// Makes the file hold a state, of an epoch that is not before the present one.
    pub(super) fn hold(&mut self, choice: &Choice) -> io::Result<()> {
        self.go_to(choice.epoch)?;
        if !self.is_valid {
            self.copy_durable()?;
        }
        self.take_away()?;
        let open = self.walk.open(self.history);
        for (index, part) in open.into_iter().zip(&choice.parts) {
            let change = &self.history.changes[index];
            match part {
                Presence::Absent => {}
                Presence::Whole => {
                    self.put_over(index, change.sector..change.sector + change.sectors)?;
                }
                Presence::Torn(sectors) => {
                    for (at, _) in (change.sector..).zip(sectors).filter(|(_, is_there)| **is_there)
                    {
                        self.put_over(index, at..at + 1)?;
                    }
                }
            }
        }
        self.file.set_times(FileTimes::new().set_modified(untouched()))
    }

    /// To be called when a command has looked at the file.
    pub(super) fn looked_at(&mut self) -> io::Result<()> {
        let same = |about: fs::Metadata| -> io::Result<bool> {
            let own = self.file.metadata()?;
            Ok(about.ino() == own.ino()
                && about.dev() == own.dev()
                && own.modified()? == untouched())
        };
        if fs::symlink_metadata(&self.path).ok().map(same).transpose()? != Some(true) {
            self.is_valid = false;
            if fs::symlink_metadata(&self.path).is_ok() {
                fs::remove_file(&self.path)?;
            }
            let new = File::options().read(true).write(true).create_new(true).open(&self.path)?;
            self.file = new;
        }
        Ok(())
    }

    fn go_to(&mut self, epoch: usize) -> io::Result<()> {
        if self.walk.epoch >= epoch {
            return Ok(());
        }
        self.take_away()?;
        while self.walk.epoch < epoch {
            for index in self.walk.step(self.history) {
                let change = &self.history.changes[index];
                let range = change.sector..change.sector + change.sectors;
                for part in self.newer_parts(index, range) {
                    if self.is_valid {
                        self.write(index, part.clone())?;
                    }
                    self.durable.insert(part, index);
                }
            }
        }
        Ok(())
    }

    /// The parts of `range` that no durable change after change `index` has replaced.
    fn newer_parts(&self, index: usize, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut start = range.start;
        for (durable, _) in self.durable.inside(&range).filter(|(_, by)| *by > index) {
            if durable.start > start {
                parts.push(start..durable.start);
            }
            start = durable.end;
        }
        if start < range.end {
            parts.push(start..range.end);
        }
        parts
    }

    fn put_over(&mut self, index: usize, range: Range<u64>) -> io::Result<()> {
        for part in self.newer_parts(index, range) {
            self.changed.push(part.clone());
            self.write(index, part)?;
        }
        Ok(())
    }

    /// Writes what change `index` has in `range`.
    fn write(&self, index: usize, range: Range<u64>) -> io::Result<()> {
        let change = &self.history.changes[index];
        let (start, end) = (range.start * SECTOR, range.end * SECTOR);
        let Some(data) = change.data else {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            return Ok(rustix::fs::fallocate(&self.file, mode, start, end - start)?);
        };
        let data = data + (range.start - change.sector) * SECTOR;
        for at in (start..end).step_by(CHUNK as usize) {
            let mut buffer = vec![0; (end - at).min(CHUNK) as usize];
            self.history.file.read_exact_at(&mut buffer, data + (at - start))?;
            self.file.write_all_at(&buffer, at)?;
        }
        Ok(())
    }

    /// Puts the durable content back where the present state has changed it.
    fn take_away(&mut self) -> io::Result<()> {
        for range in std::mem::take(&mut self.changed) {
            if self.is_valid {
                copy(self.base, &self.file, range.start * SECTOR..range.end * SECTOR)?;
                self.write_durable(range)?;
            }
        }
        Ok(())
    }

    /// Writes the durable changes of `range`.
    fn write_durable(&self, range: Range<u64>) -> io::Result<()> {
        self.durable.inside(&range).try_for_each(|(part, index)| self.write(index, part))
    }

    /// Makes the file a copy of the base with all that is durable.
    fn copy_durable(&mut self) -> io::Result<()> {
        self.changed.clear();
        self.file.set_len(0)?;
        if rustix::fs::ioctl_ficlone(&self.file, self.base).is_err() {
            copy_all(self.base, &self.file)?;
        }
        self.write_durable(0..u64::MAX)?;
        self.is_valid = true;
        Ok(())
    }
}

/// Copies all but the holes.
fn copy_all(from: &File, to: &File) -> io::Result<()> {
    let length = rustix::fs::seek(from, SeekFrom::End(0))?;
    to.set_len(length)?;
    let mut at = 0;
    // A file system without holes names one range of data.
    while at < length
        && let Ok(data) = next_data(from, at)
    {
        let hole = next_hole(from, data)?.min(length);
        copy(from, to, data..hole)?;
        at = hole;
    }
    Ok(())
}

// pread(2) would do for all of a file without these; they move the file offset, which is read nowhere.
fn next_data(file: &File, at: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::Data(at))?)
}

fn next_hole(file: &File, at: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::Hole(at))?)
}

/// Copies bytes; behind the end of `from` there are zeroes.
fn copy(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    for at in range.clone().step_by(CHUNK as usize) {
        let mut buffer = vec![0; (range.end - at).min(CHUNK) as usize];
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read_at(&mut buffer[filled..], at + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        to.write_all_at(&buffer, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_split_where_another_change_comes_over_them() {
        let mut extents = Extents::default();
        extents.insert(10..20, 1);
        extents.insert(14..16, 2);
        extents.insert(19..25, 3);
        extents.insert(5..11, 4);
        let all: Vec<_> = extents.inside(&(0..100)).collect();
        assert_eq!(all, [(5..11, 4), (11..14, 1), (14..16, 2), (16..19, 1), (19..25, 3)]);
        assert_eq!(extents.inside(&(12..15)).collect::<Vec<_>>(), [(12..14, 1), (14..15, 2)]);
        extents.insert(0..100, 5);
        assert_eq!(extents.inside(&(7..8)).collect::<Vec<_>>(), [(7..8, 5)]);
        assert_eq!(extents.0.len(), 1);
    }
}

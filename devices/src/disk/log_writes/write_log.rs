//! The file of a log of writes. The builder checks and begins it before the process is confined; the workers of the disk append to it.
//!
//! Nothing in the file system changes before all else that the user named was accepted ([`WriteLog::begin`]). Each entry is one write to
//! the page cache. The superblock follows once for each batch, before the guest sees its completions. So even after a kill, the log has
//! every write that the guest saw completed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{Access, FlockOperation};

use super::format::{
    COMPLETE, DISCARD, Entry, FLUSH, INCOMPLETE, MAGIC, MARK, SECTOR_BYTES, superblock,
};
use crate::disk::SECTOR;
use crate::lock;

/// Zeroes are logged in entries of so many sectors (16 MiB), since readers load the data of an entry at once.
const ZEROES_MAX: u64 = 32 << 10;

/// A log of writes, shared by the workers of one disk.
#[derive(Debug)]
pub struct WriteLog {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: it is not begun, or it took no more. Then nothing is logged.
    file: Option<File>,
    entries: u64,
    /// How many of them the superblock announces.
    published: u64,
    /// Where the next entry goes.
    end: u64,
}

/// The place of a flush that has been submitted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushPlace {
    offset: u64,
    submitted: u64,
}

impl WriteLog {
    /// A log that is to be at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), state: Mutex::default() }
    }

    /// Where the log is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file if it is there already, and changes nothing.
    ///
    /// # Errors
    /// The host refuses, or would refuse to create the file, or the file has something else in it.
    pub fn check(&self) -> io::Result<()> {
        let open = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&self.path);
        let file = match open {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let access = Access::WRITE_OK | Access::EXEC_OK;
                return Ok(rustix::fs::access(parent.unwrap_or(Path::new(".")), access)?);
            }
            result => result?,
        };
        let refused = |why: &str| Err(io::Error::other(why.to_owned()));
        let about = file.metadata()?;
        if !about.is_file() {
            return refused("is no regular file; name a new file");
        }
        let mut start = [0; 8];
        if about.len() != 0
            && (file.read_exact_at(&mut start, 0).is_err() || u64::from_le_bytes(start) != MAGIC)
        {
            return refused("has something else than a log of writes in it; name a new file");
        }
        self.keep(file)
    }

    /// Creates the file or empties the older log that `check` has found, and begins a log.
    ///
    /// # Errors
    /// The host refuses.
    pub fn begin(&self) -> io::Result<()> {
        if lock(&self.state).file.is_none() {
            let mut options = File::options();
            self.keep(
                options.read(true).write(true).create_new(true).mode(0o600).open(&self.path)?,
            )?;
        }
        let mut state = lock(&self.state);
        let Some(file) = state.file.take() else { return Ok(()) };
        file.set_len(0)?;
        state.end = SECTOR_BYTES as u64;
        state.append_mark(&file, COMPLETE)?;
        state.publish(&file)?;
        state.file = Some(file);
        Ok(())
    }

    fn keep(&self, file: File) -> io::Result<()> {
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let why = "another machine logs to it; name a new file";
            return Err(io::Error::other(why));
        }
        lock(&self.state).file = Some(file);
        Ok(())
    }

    /// How many entries there are now.
    pub(super) fn entries(&self) -> u64 {
        lock(&self.state).entries
    }

    /// Appends a write. `buffer` is its data behind one sector, which becomes the entry.
    pub(super) fn write(&self, entry: &Entry, buffer: &mut [u8]) {
        self.change(|state, file| state.append(file, entry, buffer));
    }

    /// Appends a write of zeroes, whose data is a hole in the file.
    pub(super) fn zeroes(&self, entry: &Entry) {
        self.change(|state, file| {
            let end = entry.sector + entry.sectors;
            let starts = (entry.sector..end).step_by(ZEROES_MAX as usize);
            starts.into_iter().try_for_each(|sector| {
                let sectors = (end - sector).min(ZEROES_MAX);
                let part = Entry { sector, sectors, ..entry.clone() };
                file.set_len(state.end + SECTOR_BYTES as u64 + sectors * SECTOR)?;
                state.append(file, &part, &mut [0; SECTOR_BYTES])?;
                state.end += sectors * SECTOR;
                Ok(())
            })
        });
    }

    /// Appends a discard.
    pub(super) fn discard(&self, entry: &Entry) {
        let entry = Entry { flags: entry.flags | DISCARD, ..entry.clone() };
        self.change(|state, file| state.append(file, &entry, &mut [0; SECTOR_BYTES]));
    }

    /// Appends a text for readers.
    pub(super) fn mark(&self, text: &str) {
        self.change(|state, file| state.append_mark(file, text));
    }

    /// Appends the place of a flush that is being submitted: a mark until [`Self::flush_ends`].
    pub(super) fn flush_begins(&self) -> FlushPlace {
        let mut place = FlushPlace::default();
        self.change(|state, file| {
            place = FlushPlace { offset: state.end, submitted: state.entries };
            state.append_mark(file, "flush, not complete")
        });
        place
    }

    /// The flush has succeeded.
    pub(super) fn flush_ends(&self, place: FlushPlace) {
        let FlushPlace { offset, submitted } = place;
        self.change(|state, file| {
            let flushed = Some(state.entries);
            let entry =
                Entry { flags: FLUSH, submitted: Some(submitted), flushed, ..Entry::default() };
            // The log had not begun when the flush was submitted.
            if offset == 0 {
                return Ok(());
            }
            file.write_all_at(&entry.encode(), offset)
        });
    }

    /// Announces all entries to readers of the file.
    pub(super) fn publish(&self) {
        let mut state = lock(&self.state);
        if state.published != state.entries {
            self.change_locked(&mut state, State::publish);
        }
    }

    fn change(&self, change: impl FnOnce(&mut State, &File) -> io::Result<()>) {
        self.change_locked(&mut lock(&self.state), change);
    }

    /// Makes a change of the file. The first one that fails ends the log.
    fn change_locked(
        &self,
        state: &mut State,
        change: impl FnOnce(&mut State, &File) -> io::Result<()>,
    ) {
        let Some(file) = state.file.take() else { return };
        let Err(error) = change(state, &file) else {
            state.file = Some(file);
            return;
        };
        let (path, entries) = (self.path.display(), state.entries);
        tracing::error!(
            "log-writes={path}: {error}: the log ends after {entries} entries and says that it is incomplete; the guest goes on. Start again with a log where there is space"
        );
        if let Err(error) = state.end_incomplete(&file) {
            tracing::error!(
                "log-writes={path}: {error}: the log does not even say that it is incomplete; delete it"
            );
        }
    }
}

impl State {
    fn append(&mut self, file: &File, entry: &Entry, buffer: &mut [u8]) -> io::Result<()> {
        buffer[..SECTOR_BYTES].copy_from_slice(&entry.encode());
        file.write_all_at(buffer, self.end)?;
        self.end += buffer.len() as u64;
        self.entries += 1;
        Ok(())
    }

    fn append_mark(&mut self, file: &File, text: &str) -> io::Result<()> {
        let (flags, submitted) = (MARK, Some(self.entries));
        let entry = Entry { flags, submitted, text: text.to_owned(), ..Entry::default() };
        self.append(file, &entry, &mut [0; SECTOR_BYTES])
    }

    fn publish(&mut self, file: &File) -> io::Result<()> {
        file.write_all_at(&superblock(self.entries), 0)?;
        self.published = self.entries;
        Ok(())
    }

    /// Cuts off what was written in part, and changes the first mark. Its sector and the superblock's are there already, so this needs
    /// no space.
    fn end_incomplete(&mut self, file: &File) -> io::Result<()> {
        file.set_len(self.end)?;
        let (flags, submitted) = (MARK, Some(0));
        let mark = Entry { flags, submitted, text: INCOMPLETE.to_owned(), ..Entry::default() };
        file.write_all_at(&mark.encode(), SECTOR_BYTES as u64)?;
        self.publish(file)
    }
}

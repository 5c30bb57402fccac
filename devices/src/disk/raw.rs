//! A raw image: a host file or block device whose bytes are the disk's.
//!
//! The engine asks where the data of a job is ([`DataPlace`]), and its `route` decides by that who executes the job. If the job needs
//! no waiting thread, the engine executes it with the file. For all others the pool's threads call `blocking`. `open` plugs in
//! `blocking`, and the requirements of direct I/O ([`DirectIo`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SECTOR;
use super::host_file::HostFile;
use super::job::Job;
use super::observer::FileChange;

pub(super) mod blocking;
mod ranges;

/// Where the data of a job is on the host: this decides what the job may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum DataPlace {
    /// In memory, because the file is in memory (tmpfs): no job waits for a device.
    Memory,
    /// In the page cache. A write is a copy. A read is one if the data is cached.
    PageCache,
    /// On the device, by direct I/O: each job waits for the device. If it is not `aligned`, it needs a bounce buffer.
    Direct { aligned: bool },
    /// In an image of another format than raw, which has to translate.
    Translated,
}

/// What direct I/O requires of jobs. The file can only be read and written in whole units. A unit that a write covers in part is read,
/// modified and written back. Two of these writes to one unit at once would undo each other, so each locks its units.
pub(super) trait DirectIo: Send + Sync {
    /// Whether `job`, a read or write, is aligned as the file requires, so that it needs no bounce buffer.
    fn is_aligned(&self, job: &Job) -> bool;

    /// If `job` is a write, locks the units that it touches. `false`: another write has locked some of them.
    fn try_lock_units(&self, job: &Job) -> bool;

    /// Unlocks what `try_lock_units` locked. `job` must not have advanced since.
    fn unlock_units(&self, job: &Job);
}

/// An open raw image. Each call may come from any thread, several at once.
pub(super) struct RawImage {
    file: HostFile,
    /// Every transfer is a copy from or to the host's memory.
    pub(super) in_memory: bool,
    capacity: AtomicU64,
    /// For a file that was opened for direct I/O.
    pub(super) direct: Option<Arc<dyn DirectIo>>,
}

impl RawImage {
    pub(super) fn new(file: HostFile, direct: Option<Arc<dyn DirectIo>>) -> io::Result<Self> {
        let in_memory = direct.is_none() && file.in_memory();
        let capacity = AtomicU64::new(0);
        let image = Self { file, in_memory, capacity, direct };
        image.refresh_capacity()?;
        Ok(image)
    }

    pub(super) fn file(&self) -> &HostFile {
        &self.file
    }

    pub(super) fn data_place(&self, job: &Job) -> DataPlace {
        match &self.direct {
            Some(direct) => DataPlace::Direct { aligned: direct.is_aligned(job) },
            None if self.in_memory => DataPlace::Memory,
            None => DataPlace::PageCache,
        }
    }

    /// Makes one system call that writes `job` or the start of it. Returns how many bytes were written.
    pub(super) fn write_some(&self, job: &Job, flags: i32) -> io::Result<u64> {
        waypoint!();
        let change = FileChange::Write { job, durable: flags & libc::RWF_DSYNC != 0 };
        let change = self.file.begin(change);
        let result = job.buffers.write_to(&self.file, job.offset, flags);
        self.file.end(change, result.is_ok());
        result
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn refresh_capacity(&self) -> io::Result<u64> {
        let length = self.file.length()?;
        let capacity = length - length % SECTOR;
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }
}

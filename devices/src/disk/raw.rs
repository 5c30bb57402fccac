//! A raw image: a host file or block device whose bytes are the disk's.
//!
//! The engine asks here where a transfer's data is ([`Medium`]), and its `route` decides by that who serves it. Transfers that need no
//! waiting thread are made by the engine itself, with the file. All others are made by the pool's threads, which call `blocking`.
//! `open` plugs in `blocking`, and what direct I/O requires ([`DirectIo`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::host_file::HostFile;
use super::job::Job;
use super::{Lifetime, Limits, SECTOR};

pub(super) mod blocking;
mod ranges;

/// Where a transfer finds its data. It decides what the transfer has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The file itself is in memory (tmpfs): no transfer waits for a device.
    Memory,
    /// Data goes through the page cache: writes are copies, reads may be.
    PageCache,
    /// Direct I/O: each transfer waits for the device, and goes through a bounce buffer unless it is aligned.
    Direct { aligned: bool },
    /// Not in a raw image: a format has to translate.
    Translated,
}

/// What direct I/O requires of transfers. The file takes whole units only. For a write that covers a unit in part, the unit is read,
/// modified and written back. Two such writes to one unit at once would undo each other, so they exclude each other.
pub(super) trait DirectIo: Send + Sync {
    /// Whether the file takes `job`, a read or write, as it is.
    fn takes(&self, job: &Job) -> bool;

    /// Takes the units that `job` touches if it is a write. False if another write has some of them.
    fn try_take(&self, job: &Job) -> bool;

    /// Gives back what `try_take` took; `job` has not advanced since.
    fn release(&self, job: &Job);
}

/// An open raw image. Each call may come from any thread, several at once.
pub(super) struct RawImage {
    file: HostFile,
    in_memory: bool,
    limits: Limits,
    lifetime: Option<Lifetime>,
    capacity: AtomicU64,
    /// For a file that was opened for direct I/O.
    pub(super) direct: Option<Arc<dyn DirectIo>>,
}

impl RawImage {
    /// `limits` and `lifetime` are those of the file.
    pub(super) fn new(
        file: HostFile,
        limits: Limits,
        lifetime: Option<Lifetime>,
        direct: Option<Arc<dyn DirectIo>>,
    ) -> io::Result<Self> {
        let (in_memory, capacity) = (file.in_memory(), AtomicU64::new(0));
        let image = Self { file, in_memory, limits, lifetime, capacity, direct };
        image.refresh_capacity()?;
        Ok(image)
    }

    pub(super) fn file(&self) -> &HostFile {
        &self.file
    }

    pub(super) fn medium(&self, job: &Job) -> Medium {
        match &self.direct {
            Some(direct) => Medium::Direct { aligned: direct.takes(job) },
            None if self.in_memory => Medium::Memory,
            None => Medium::PageCache,
        }
    }

    /// Whether every transfer is a copy from or to the host's memory.
    pub(super) fn is_in_memory(&self) -> bool {
        self.in_memory && self.direct.is_none()
    }

    /// One system call that writes the start of `job`. Returns how many bytes it wrote.
    pub(super) fn write_some(&self, job: &Job, flags: i32) -> io::Result<u64> {
        waypoint!();
        let change = || job.written(flags & libc::RWF_DSYNC != 0);
        self.file.observe(change, || job.buffers.write_to(&self.file, job.offset, flags))
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn lifetime(&self) -> Option<Lifetime> {
        self.lifetime
    }

    pub(super) fn refresh_capacity(&self) -> io::Result<u64> {
        let length = self.file.length()?;
        let capacity = length - length % SECTOR;
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }
}

//! What every kind of image can do, one blocking call at a time. Engines decide who makes the call, and when.

use std::io;
use std::sync::Arc;

use super::bounce::Bounce;
use super::buffers::IoBuffers;
use super::raw::RawFile;
use super::{DiskError, Lifetime, Limits, Operation, ScsiCommand};

/// One transfer under way: a `Transfer` whose guest ranges are host addresses now, and which shrinks as data moves.
pub(super) struct Job {
    /// The caller's name for it.
    pub(super) tag: u32,
    /// What to do.
    pub(super) operation: Operation,
    /// Where the rest starts on the disk, in bytes.
    pub(super) offset: u64,
    /// Bytes left to do.
    pub(super) length: u64,
    /// Where the rest is in guest memory, for reads and writes.
    pub(super) buffers: IoBuffers,
    /// Not a transfer at all, but this command with data in `buffers`.
    pub(super) scsi: Option<Arc<ScsiCommand>>,
}

impl Job {
    /// A job that does nothing yet, to be filled in and used again and again.
    pub(super) fn empty() -> Self {
        Self { tag: 0, operation: Operation::Flush, offset: 0, length: 0, buffers: IoBuffers::default(), scsi: None }
    }

    /// The first `count` bytes of a read or write are done.
    pub(super) fn advance(&mut self, count: u64) {
        self.buffers.advance(count);
        self.offset += count;
        self.length -= count;
    }

    /// Moves the next `data.len()` bytes out of guest memory.
    pub(super) fn take(&mut self, data: &mut [u8]) {
        self.buffers.take(data);
        self.advance(data.len() as u64);
    }

    /// Moves `data` into the next `data.len()` bytes of guest memory.
    pub(super) fn fill(&mut self, data: &[u8]) {
        self.buffers.fill(data);
        self.advance(data.len() as u64);
    }

    /// First byte after the job.
    pub(super) fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// An image behind a disk. Methods are called from any thread, several at once.
pub(super) trait Image: Send + Sync {
    /// Size in bytes, a multiple of 512.
    fn capacity(&self) -> u64;

    /// What the medium prefers.
    fn limits(&self) -> Limits;

    /// How worn the medium is.
    fn lifetime(&self) -> Option<Lifetime> {
        None
    }

    /// See `Disk::refresh_capacity`.
    fn refresh_capacity(&self) -> io::Result<u64>;

    /// See `Disk::resize`.
    fn resize(&self, bytes: u64) -> io::Result<()>;

    /// Does what is left of `job`, all of it or an error. `bounce` is the calling thread's.
    fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError>;

    /// The host file, if the disk's bytes are the file's bytes: engines may then go to it without `execute`.
    fn raw_file(&self) -> Option<&RawFile> {
        None
    }
}

impl From<io::Error> for DiskError {
    fn from(error: io::Error) -> Self {
        match (error.raw_os_error(), error.kind()) {
            (Some(libc::ENOSPC | libc::EDQUOT), _) | (None, io::ErrorKind::StorageFull) => Self::NoSpace,
            (Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY), _) | (None, io::ErrorKind::Unsupported) => {
                Self::Unsupported
            }
            (Some(errno), _) => Self::Host(errno),
            (None, io::ErrorKind::UnexpectedEof) => Self::OutOfRange,
            (None, _) => Self::Host(libc::EIO),
        }
    }
}

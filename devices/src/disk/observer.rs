//! Reports each change of an image's file to an [`Observer`], when the change begins and when it ends.
//!
//! Only tests register one: the power-cut rig (`powercut`) works out what a medium may hold after a power cut.
//! [`HostFile`](super::host_file::HostFile) reports flushes. The raw image, the ring, the threads and the storage below imago report
//! their changes to it. A write is reported as a whole, even if the host makes it in parts, with the data that guest memory has
//! when the write begins. So under an observer the guest must not change that data meanwhile.

use std::fmt::Debug;

use super::job::Job;

/// A change of a file.
#[cfg_attr(not(test), expect(dead_code, reason = "only tests register an observer"))]
pub(super) enum FileChange<'a> {
    /// The rest of a write. `durable`: it is durable when it has ended (RWF_DSYNC).
    Write { job: &'a Job, durable: bool },
    /// A write of bytes that are no guest's, such as metadata.
    WriteBytes { offset: u64, data: Vec<u8> },
    /// A range was zeroed or a hole was made in it.
    Zero { offset: u64, length: u64 },
    /// An fdatasync(2). When it has ended, each change that had ended before it began is durable.
    Sync,
}

/// Gets changes reported. Any thread calls it, and several at once.
pub(super) trait Observer: Debug + Send + Sync {
    /// A change is about to be made. Returns a number for it.
    fn begin(&self, change: FileChange<'_>) -> usize;

    /// The change with that number was made, or failed.
    fn end(&self, number: usize, succeeded: bool);
}

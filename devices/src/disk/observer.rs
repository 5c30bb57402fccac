//! Reports each change of an image's file to an [`Observer`], when the change begins and when it ends.
//!
//! Only tests register one: the power-cut rig (`powercut`) works out what a medium may hold after a power cut.
//! [`HostFile`](super::host_file::HostFile) reports flushes and zeroed ranges. The raw image, the ring and the storage below imago
//! report their writes. A write is reported as a whole, even if the host makes it in parts, with the data that guest memory has
//! when the write begins. So under an observer the guest must not change that data meanwhile.

use std::fmt;
use std::sync::Arc;

/// A change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// The first byte.
        offset: u64,
        /// What was written.
        data: Vec<u8>,
        /// It is durable when it has ended (RWF_DSYNC).
        durable: bool,
    },
    /// A range was zeroed or a hole was made in it.
    Zero {
        /// The first byte.
        offset: u64,
        /// In bytes.
        length: u64,
    },
    /// An fdatasync(2). When it has ended, each change that had ended before it began is durable.
    Sync,
}

/// Gets changes reported. Any thread calls it, and several at once.
pub trait Observer: Send + Sync {
    /// A change is about to be made. Returns a number for it.
    fn begin(&self, change: Change) -> usize;

    /// The change with that number was made, or failed.
    fn end(&self, number: usize, succeeded: bool);
}

/// An observer, as an option of opening an image.
#[derive(Clone)]
pub struct ObservedBy(pub Arc<dyn Observer>);

impl fmt::Debug for ObservedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObservedBy")
    }
}

impl PartialEq for ObservedBy {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ObservedBy {}

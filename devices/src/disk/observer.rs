//! Lets something else see each change of an image's file, with the moments at which it begins and ends.
//!
//! The core calls an [`Observer`] and knows none. Its user is the power-cut rig (`powercut`), which works
//! out what a medium may hold after a power cut. [`HostFile`](super::host_file::HostFile) reports what it does itself; the raw
//! image, the ring for what it does, and the storage below imago report their writes through it. A write is seen as a whole,
//! also where the host makes it in parts, and as its data is when it begins: the guest must not change that meanwhile.

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
    /// What had ended before this began is durable when this ends (fdatasync).
    Sync,
}

/// Sees changes. Called by any thread, by several at once.
pub trait Observer: Send + Sync {
    /// A change is about to be made. Returns a name for it.
    fn begin(&self, change: Change) -> usize;

    /// The change of that name was made, or failed.
    fn end(&self, name: usize, succeeded: bool);
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

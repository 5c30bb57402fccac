//! `log-writes=`: a log of what the guest writes to a disk, in the format of Linux's dm-log-writes.
//!
//! A capability. The builder calls [`over`], which puts a [`Disk`] around the one that [`open`](super::open()) made. Its engine sees each
//! [`Transfer`](super::Transfer) that a worker submits and each [`Completion`](super::Completion) that it reaps. So the log has the
//! guest's sectors and not those of the image, for every format and engine.
//!
//! Entries are in the order of completion. A write is logged when it has completed, before its worker is told. The entry of a flush is
//! made when the flush is submitted, because a flush covers what has completed by then. It is a mark at first, and becomes a flush when
//! the flush has succeeded. Each entry also has the number of entries when its request was submitted, which dm-log-writes does not record
//! ([`format`](mod@format)). With `cache=unsafe` flushes make nothing durable, so they stay marks.
//!
//! The data is copied from guest memory at the submission. If a guest changes it while the write is in flight, log and image may differ.
//! Requests that the worker has merged are one entry. A discard is logged with the range that the guest named, even if the image frees
//! only the whole clusters in it: the content of a discarded range is not defined.
//!
//! | file | what it does |
//! |---|---|
//! | `format` | the bytes of a log, for its writer and its readers |
//! | `write_log` | appends entries to the file, and ends the log when the host has no space for more |
//! | `logged_engine` | keeps a copy of each change in flight, and logs it when it is complete |

pub mod format;
mod logged_engine;
mod write_log;

use std::io;
use std::sync::Arc;

use self::logged_engine::LoggedEngine;
pub use self::write_log::WriteLog;
use super::layer::{Layer, LayeredDisk};
use super::{CacheMode, Disk, Engine, SECTOR};
use crate::GuestMemory;

/// Logs the changes of a disk.
struct LogLayer {
    log: Arc<WriteLog>,
    /// Flushes make nothing durable (`cache=unsafe`), so they stay marks in the log.
    ignores_flush: bool,
}

/// Adds a log of its changes to `disk`. `cache` is the disk's cache mode.
pub fn over(disk: Arc<dyn Disk>, log: Arc<WriteLog>, cache: CacheMode) -> Arc<dyn Disk> {
    let layer = LogLayer { log, ignores_flush: cache.ignores_flush() };
    Arc::new(LayeredDisk { disk, layer })
}

impl Layer for LogLayer {
    type Engine = LoggedEngine;

    fn engine(&self, _: &dyn Engine, memory: GuestMemory, depth: u32) -> io::Result<LoggedEngine> {
        Ok(LoggedEngine::new(memory, depth, Arc::clone(&self.log), self.ignores_flush))
    }

    fn resized(&self, bytes: u64) {
        self.log.mark(&format!("resized to {} sectors", bytes / SECTOR));
        self.log.publish();
    }
}

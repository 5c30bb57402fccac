//! `log-writes=`: a log of what the guest writes to a disk, in the format of Linux's dm-log-writes.
//!
//! A capability. It hooks in as a [`Disk`] around the one that [`open`](super::open()) made: [`over`] is called by the builder,
//! and its engine sees each [`Transfer`](super::Transfer) that a worker submits and each [`Completion`](super::Completion) that it
//! reaps. So the log has the guest's sectors and not those of the image, for every format and engine, and the core does not know of it.
//!
//! The log is in the order of completion. A write is logged when it has completed, before its worker sees that. A flush has
//! its place where it was submitted, since it covers what had completed by then: an entry stands there as a mark and becomes a
//! flush when the flush has succeeded. Each entry also says how many entries the log had when its request was submitted, which
//! dm-log-writes leaves open ([`format`](mod@format)). With `cache=unsafe` flushes make nothing durable, so they stay marks.
//!
//! The data is copied from guest memory when the write is submitted. If a guest changes it while the write is in flight, which
//! its own disk need not survive either, log and image may differ. A write that the worker made of several adjacent ones is one
//! entry. A discard is logged as a discard of the range that the guest named, also where the image frees only whole clusters
//! of it: the content of a discarded range is not defined.
//!
//! | file | what it does |
//! |---|---|
//! | `format` | the bytes of a log, for who writes and who reads one |
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
    /// Flushes do nothing, and are no flushes for the log.
    ignores_flush: bool,
}

/// `disk`, with its changes in `log`. `cache` is the disk's.
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

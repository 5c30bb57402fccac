//! Events: what a disk tells the VM on its own account, by a callback that the VM gave it.

use std::sync::Arc;

use super::stats::Kind;
use crate::disk::DiskError;

/// Where a disk's events go. Called on worker threads: it must not block, and must not call back into the device.
pub type EventSink = Arc<dyn Fn(BlockEvent) + Send + Sync>;

/// Something that the VM has to know, or to act upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    /// The host failed a request (QMP's BLOCK_IO_ERROR). After `ErrorAction::Stop` the VM has to stop; the request is
    /// retried by `BlockHandle::resume`.
    IoError {
        /// The disk's name.
        device: String,
        /// What was asked for.
        operation: Kind,
        /// What the error policy made of it.
        action: ErrorAction,
        /// What the host reports.
        error: DiskError,
    },
    /// The guest changed something past the offset that the operator set (QMP's BLOCK_WRITE_THRESHOLD). Comes once for each
    /// time that it was set.
    WriteThreshold {
        /// The disk's name.
        device: String,
        /// The offset, in bytes.
        threshold: u64,
        /// How far past it the request reaches, in bytes.
        exceeded: u64,
    },
    /// A worker thread is gone and its queues are dead: the VM cannot go on.
    WorkerFailed {
        /// The disk's name.
        device: String,
        /// What happened.
        message: String,
    },
}

/// What was done about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The guest was told that it succeeded.
    Ignore,
    /// The request is stopped until `resume`, and the VM stops.
    Stop,
}

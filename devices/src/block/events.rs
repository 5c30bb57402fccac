//! Events: what a disk tells the VM on its own account, by a callback that the VM gave it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::stats::Kind;
use crate::lock;

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
        /// The host is out of space.
        nospace: bool,
        /// The host's words.
        reason: String,
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

/// Most error events a second of one disk. A guest can make a failing host fail a hundred thousand requests a second, each
/// event wakes the main loop, and an operator learns from the first few what there is to know: the rest is in the disk's
/// statistics.
const ERROR_EVENTS_PER_SECOND: u32 = 64;

/// Decides whether an event may be sent.
#[derive(Default)]
pub(super) struct EventLimit(Mutex<Option<(Instant, u32)>>);

impl EventLimit {
    pub(super) fn admit(&self, now: Instant) -> bool {
        let mut window = lock(&self.0);
        let fresh = window.filter(|(begin, _)| now < *begin + Duration::from_secs(1));
        let (begin, sent) = fresh.unwrap_or((now, 0));
        *window = Some((begin, sent.saturating_add(1)));
        sent < ERROR_EVENTS_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_limited_each_second() {
        let limit = EventLimit::default();
        let now = Instant::now();
        let admitted = |at: u64| limit.admit(now + Duration::from_millis(at));
        assert_eq!((0..1000).filter(|_| admitted(0)).count() as u32, ERROR_EVENTS_PER_SECOND);
        assert!(!admitted(999));
        assert!(admitted(1000));
    }
}

//! The error policies (`rerror`, `werror`): what becomes of a request that the host failed.
//!
//! A capability: a request passes it only when the host has failed it. `device` plugs [`ErrorPolicies`] in, which the workers know
//! as [`HostErrors`].
//!
//! This file decides, logs, and sends an event to the VM. If the decision is to stop, the worker keeps the request (`queue`), and the
//! main loop stops the machine (`machine::reports` in `vmm`).

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::events::{BlockEvent, ErrorAction, EventSink};
use super::request::HostErrors;
use super::stats::{IoStatus, Kind};
use crate::disk::DiskError;
use crate::lock;
use crate::log_limit::LogLimit;
use crate::virtio::spec::blk;

/// What to do after the host failed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorPolicy {
    /// The guest gets IOERR.
    Report,
    /// The guest gets OK, as if the request had succeeded.
    Ignore,
    /// The request is stopped, and the VM, too. When the VM is resumed, the request is tried again.
    Stop,
    /// As `Stop` if the host is out of space, otherwise as `Report`.
    Enospc,
}

/// The word of `rerror=` and `werror=`.
impl fmt::Display for ErrorPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        })
    }
}

/// The policies of a disk, which its workers share.
pub(super) struct ErrorPolicies {
    disk: String,
    read_errors: ErrorPolicy,
    write_errors: ErrorPolicy,
    events: EventSink,
    io_status: AtomicU8,
    log_limit: LogLimit,
    event_limit: EventLimit,
}

impl ErrorPolicies {
    pub(super) fn new(
        disk: String,
        read_errors: ErrorPolicy,
        write_errors: ErrorPolicy,
        events: EventSink,
    ) -> Self {
        Self {
            disk,
            read_errors,
            write_errors,
            events,
            io_status: AtomicU8::new(IoStatus::Ok as u8),
            log_limit: LogLimit::default(),
            event_limit: EventLimit::default(),
        }
    }

    fn set_io_status(&self, status: IoStatus) {
        self.io_status.store(status as u8, Ordering::Relaxed);
    }

    /// Reports a host error, and what `policy` makes of it, to the VM and to the log.
    fn report(&self, operation: Kind, error: DiskError, policy: ErrorPolicy, action: ErrorAction) {
        if action == ErrorAction::Stop {
            let nospace = error == DiskError::NoSpace;
            self.set_io_status(if nospace { IoStatus::NoSpace } else { IoStatus::Failed });
        }
        let disk = &self.disk;
        let then = match (action, error) {
            (ErrorAction::Report, _) => "the guest gets the error",
            (ErrorAction::Ignore, _) => "the guest does not see the error",
            (ErrorAction::Stop, DiskError::NoSpace) => {
                "the VM is stopped; make space, then `minivmm ctl SOCKET cont`"
            }
            (ErrorAction::Stop, _) => {
                "the VM is stopped; mend the storage, then `minivmm ctl SOCKET cont`"
            }
        };
        let (what, option) = (describe(operation), option(operation));
        self.log_limit
            .warn(format_args!("disk {disk}: {what} failed: {error}; {option}={policy}: {then}"));
        // The event of a stop is always sent: the VM has to act, and there are no more stops than the queues hold requests.
        if action == ErrorAction::Stop || self.event_limit.admit(Instant::now()) {
            (self.events)(BlockEvent::IoError { device: disk.clone(), operation, action, error });
        }
    }
}

impl HostErrors for ErrorPolicies {
    fn decide(&self, kind: Kind, error: DiskError) -> Option<u8> {
        let policy = if kind == Kind::Read { self.read_errors } else { self.write_errors };
        let action = match (policy, error) {
            // The request could not be done, but the host did not fail: the image shrank under a request that was in bounds when
            // it was parsed, or does not support the operation.
            (_, DiskError::Unsupported) => return Some(blk::S_UNSUPP),
            (_, DiskError::OutOfRange) => return Some(blk::S_IOERR),
            (ErrorPolicy::Ignore, _) => ErrorAction::Ignore,
            (ErrorPolicy::Stop, _) | (ErrorPolicy::Enospc, DiskError::NoSpace) => ErrorAction::Stop,
            (ErrorPolicy::Report | ErrorPolicy::Enospc, _) => ErrorAction::Report,
        };
        self.report(kind, error, policy, action);
        match action {
            ErrorAction::Report => Some(blk::S_IOERR),
            ErrorAction::Ignore => Some(blk::S_OK),
            ErrorAction::Stop => None,
        }
    }

    fn io_status(&self) -> IoStatus {
        match self.io_status.load(Ordering::Relaxed) {
            status if status == IoStatus::Failed as u8 => IoStatus::Failed,
            status if status == IoStatus::NoSpace as u8 => IoStatus::NoSpace,
            _ => IoStatus::Ok,
        }
    }

    fn clear(&self) {
        self.set_io_status(IoStatus::Ok);
    }
}

/// The disk's option that says what becomes of a failed request of this kind.
fn option(kind: Kind) -> &'static str {
    if kind == Kind::Read { "rerror" } else { "werror" }
}

/// A request of this kind, in a sentence.
fn describe(kind: Kind) -> &'static str {
    match kind {
        Kind::Read => "a read",
        Kind::Write => "a write",
        Kind::Flush => "a flush",
        Kind::Discard => "a discard",
        Kind::WriteZeroes => "a write of zeroes",
        Kind::SecureErase => "a secure erasure",
        Kind::Other => "a command",
    }
}

/// Most error events a second of one disk. A guest can make a failing host fail a hundred thousand requests a second, and each event
/// wakes the main loop. An operator learns enough from the first few and from the disk's statistics.
const ERROR_EVENTS_PER_SECOND: u32 = 64;

/// Decides whether an event may be sent.
#[derive(Default)]
struct EventLimit(Mutex<Option<(Instant, u32)>>);

impl EventLimit {
    fn admit(&self, now: Instant) -> bool {
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

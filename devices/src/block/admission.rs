//! When a request may start: the place where a limit on the disk's rate (throttling) hooks in.
//!
//! The worker asks a [`Limiter`] for each read, write and write-zeroes. A request that has to wait stays with its queue, in
//! the order of arrival for each direction, and the worker's thread sets a timer for the first of them. Discards and flushes
//! are never limited, as in QEMU. The worker knows only the trait; the device plugs a limiter in.

use std::time::Duration;

use super::request::Request;
use super::stats::Kind;
use crate::clock::Instant;
use crate::virtio::queue::DescriptorChain;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Read, Self::Write];

    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// A limit on the disk's rate, shared by its workers.
pub(super) trait Limiter: Send + Sync {
    /// Nothing is limited now. Asked for each request, so it has to be cheap.
    fn is_off(&self) -> bool;

    /// Reads and writes count for the same limit, so that neither may overtake the other.
    fn couples_directions(&self) -> bool;

    /// How long a request has to wait at `now` before it may start; zero when it may.
    fn wait(&self, direction: Direction, now: Instant) -> Duration;

    /// A request of so many bytes starts.
    fn charge(&self, direction: Direction, bytes: u64);
}

#[derive(Debug)]
pub(super) struct WaitingRequest {
    pub(super) chain: DescriptorChain,
    /// When it was taken from the queue: the wait is part of its time.
    pub(super) started: Instant,
}

/// What of a request a limiter counts. `None`: it is not limited.
pub(super) fn measure(request: &Request<'_>) -> Option<(Direction, u64)> {
    let direction = match request.kind {
        Kind::Read => Direction::Read,
        Kind::Write | Kind::WriteZeroes => Direction::Write,
        _ => return None,
    };
    Some((direction, request.action.ranges().iter().map(|range| range.length).sum()))
}

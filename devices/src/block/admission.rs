//! When a request may start. A limit on the disk's rate (throttling) hooks in here, as a [`Limiter`].
//!
//! The worker asks the limiter about each read, write and write-zeroes. A request that has to wait stays in its queue's list
//! for its [`Direction`], in the order of arrival, and the worker's thread sets a timer for the first of them. Discards and
//! flushes are never limited, as in QEMU. The worker knows only the trait; the device plugs a limiter in.

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
    /// Whether nothing is limited now. Called for each request, so it has to be cheap.
    fn is_off(&self) -> bool;

    /// Whether reads and writes count for the same limit. Then neither may overtake the other.
    fn couples_directions(&self) -> bool;

    /// How long a request has to wait from `now` on before it may start. Zero: it may start.
    fn wait(&self, direction: Direction, now: Instant) -> Duration;

    /// Counts a request of so many bytes, which starts now.
    fn charge(&self, direction: Direction, bytes: u64);
}

#[derive(Debug)]
pub(super) struct WaitingRequest {
    pub(super) chain: DescriptorChain,
    /// When it was taken from the ring. Its latency in the statistics begins there, and so includes the wait.
    pub(super) started: Instant,
}

/// What a limiter counts of a request: its direction and its bytes. `None`: requests of this kind are not limited.
pub(super) fn measure(request: &Request<'_>) -> Option<(Direction, u64)> {
    let direction = match request.kind {
        Kind::Read => Direction::Read,
        Kind::Write | Kind::WriteZeroes => Direction::Write,
        _ => return None,
    };
    Some((direction, request.action.ranges().iter().map(|range| range.length).sum()))
}

//! When a request may start. A limit on the disk's rate (throttling) hooks in here, as a [`Limiter`].
//!
//! While something is limited, the worker asks its limiter about each request. The limiter keeps the chain of a request that has to wait.
//! When it may start, the limiter's timer expires, and the worker begins the request again: its chain is walked and parsed once more.

use std::any::Any;
use std::os::fd::RawFd;

use super::queue::TakenChain;
use super::stats::Kind;
use crate::clock::Instant;
use crate::virtio::queue::DescriptorChain;

/// Why a request begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Its chain was just taken from the ring, or was stopped until `resume`. A request that is executed again from its beginning is asked
    /// about and counted again, as in QEMU. In a restored machine, one that waited for a limit at the save is among these.
    New,
    /// The limiter made it wait before, and lets it start now.
    Waited,
    /// It was merged into a transfer that failed. It is tried again alone, and the limiter has counted it.
    Retry,
}

/// A limit on the rate of one worker's requests. The device makes one for each worker.
pub(super) trait Limiter: Any + Send {
    /// Whether nothing is limited now. Called for each pass and each chain that waited, so it has to be cheap.
    fn is_off(&self) -> bool;

    /// Lets a request for `bytes` of disk start at `now`, and counts it. `false`: it has to wait. Then the worker calls `hold`.
    fn try_start(&mut self, kind: Kind, bytes: u64, origin: Origin, now: Instant) -> bool;

    /// Keeps the chain of a request that may not start yet.
    fn hold(&mut self, kind: Kind, taken: TakenChain);

    /// Takes the next chain that may start at `now`. The worker begins it, as [`Origin::Waited`].
    fn next(&mut self, now: Instant) -> Option<TakenChain>;

    /// The heads of the chains of a queue that wait.
    fn waiting(&self, queue: usize) -> Vec<u16>;

    /// Takes the chains of a queue that wait: the queue is reset.
    fn give_up(&mut self, queue: usize) -> Vec<DescriptorChain>;

    /// A timer that expires when `next` may have a chain. It is watched edge-triggered, and never read.
    fn timer(&self) -> RawFd;
}

//! The requests of one worker that wait because of the disk's limits, in the order of arrival.
//!
//! It is the [`Limiter`] that `device` plugs into each worker. `throttle_group` decides how long a request has to wait. Discards and
//! flushes are never limited, as in QEMU.
//!
//! A timer is set for the first request that may start. It wakes the worker's thread (`worker_thread`), which calls
//! [`Worker::start_waiting`](super::worker::Worker::start_waiting). A change of the limits (`operator`) has the same effect.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::admission::{Limiter, Origin};
use super::queue::TakenChain;
use super::stats::Kind;
use super::throttle::Direction;
use super::throttle_group::Throttle;
use crate::clock::Instant;
use crate::log_limit::LogLimit;
use crate::virtio::queue::DescriptorChain;

/// The longest that the timer is set for: a wait can be longer than a timer can. If nothing may start when the timer expires, it
/// is set again.
const LONGEST_TIMER: Duration = Duration::from_secs(3600);

pub(super) struct ThrottleQueue {
    throttle: Arc<Throttle>,
    /// By direction.
    waiting: [VecDeque<TakenChain>; 2],
    /// The direction that `next` tries first. The two directions alternate.
    next_direction: Direction,
    timer: TimerFd,
    log_limit: LogLimit,
}

impl ThrottleQueue {
    /// # Errors
    /// The host gives no timer.
    pub(super) fn new(throttle: Arc<Throttle>) -> io::Result<Self> {
        Ok(Self {
            throttle,
            waiting: Default::default(),
            next_direction: Direction::Read,
            timer: TimerFd::new()?,
            log_limit: LogLimit::default(),
        })
    }

    /// How long from `now` until `next` has something. `None`: nothing waits.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        let waits = |direction: &Direction| !self.waiting[*direction as usize].is_empty();
        let waiting = Direction::BOTH.into_iter().filter(waits);
        waiting.map(|direction| self.throttle.wait(direction, now)).min()
    }

    fn set_timer(&mut self, now: Instant) {
        let Some(wait) = self.next_release(now) else { return };
        // A timer set to zero never expires.
        let wait = wait.clamp(Duration::from_micros(1), LONGEST_TIMER);
        if let Err(error) = self.timer.reset(wait, None) {
            let disk = &self.throttle.disk;
            self.log_limit.warn(format_args!(
                "disk {disk}: cannot set the timer of its throttling limits: {error}"
            ));
        }
    }
}

impl Limiter for ThrottleQueue {
    fn is_off(&self) -> bool {
        self.throttle.is_off()
    }

    fn try_start(&mut self, kind: Kind, bytes: u64, origin: Origin, now: Instant) -> bool {
        let is_limited = matches!(kind, Kind::Read | Kind::Write | Kind::WriteZeroes);
        if !is_limited || origin == Origin::Retry {
            return true;
        }
        let direction = direction(kind);
        let waits = |of: Direction| !self.waiting[of as usize].is_empty();
        // No request overtakes those that wait for the same limit.
        let must_wait = || {
            waits(direction)
                || self.throttle.couples_directions() && waits(direction.other())
                || self.throttle.wait(direction, now) > Duration::ZERO
        };
        if origin == Origin::New && must_wait() {
            return false;
        }
        self.throttle.charge(direction, bytes);
        true
    }

    fn hold(&mut self, kind: Kind, taken: TakenChain) {
        let (waiting, now) = (&mut self.waiting[direction(kind) as usize], taken.started);
        waiting.push_back(taken);
        if waiting.len() == 1 {
            self.set_timer(now);
        }
    }

    fn next(&mut self, now: Instant) -> Option<TakenChain> {
        for direction in [self.next_direction, self.next_direction.other()] {
            let waiting = &mut self.waiting[direction as usize];
            if !waiting.is_empty() && self.throttle.wait(direction, now) == Duration::ZERO {
                self.next_direction = direction.other();
                return waiting.pop_front();
            }
        }
        self.set_timer(now);
        None
    }

    fn waiting(&self, queue: usize) -> Vec<u16> {
        let of_queue = self.waiting.iter().flatten().filter(|taken| taken.queue == queue);
        of_queue.map(|taken| taken.chain.head()).collect()
    }

    fn give_up(&mut self, queue: usize) -> Vec<DescriptorChain> {
        let mut given_up = Vec::new();
        for waiting in &mut self.waiting {
            let (gone, left) = waiting.drain(..).partition(|taken| taken.queue == queue);
            let gone: VecDeque<_> = gone;
            *waiting = left;
            given_up.extend(gone.into_iter().map(|taken| taken.chain));
        }
        given_up
    }

    fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

fn direction(kind: Kind) -> Direction {
    if kind == Kind::Read { Direction::Read } else { Direction::Write }
}

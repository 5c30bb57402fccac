//! Whether a worker busy-polls for more work. Sleeping and being woken costs a worker several times what a request does, and
//! the driver's kick costs the guest an exit; but a worker that polls takes a CPU from others.
//!
//! So a worker polls only where that paid lately: after `CONFIDENCE` times in a row that work came within the longest
//! polling window. The window is twice the longest gap that was seen of late, at least `SHORTEST` and at most
//! [`BusyPolling::longest`]. Each window without work takes `IN_VAIN` off the confidence, so a few of them turn polling off,
//! and an idle disk never turns it on.
//!
//! How long a driver takes for its next request, and what a kick and a wake-up would cost, depends on the machine: where the
//! host is a guest itself, both are a hundred times what they are on bare metal. So the longest window is a multiple of
//! what the worker's own interrupts cost, which it measures at each of them.
//!
//! The worker calls `idle` when it has nothing to do, `work` when chains came, `in_vain` when a window passed without, and
//! `interrupted` after it has raised the line. This file decides and counts; the loop that polls is the worker's.

use std::time::Duration;

use crate::clock::Instant;

/// The shortest window: clocks and schedulers are not more exact.
const SHORTEST: Duration = Duration::from_micros(50);
/// The longest window where interrupts cost next to nothing: as long as KVM by default polls for a vCPU's interrupt
/// (`halt_poll_ns`).
const LONGEST: Duration = Duration::from_micros(200);
/// How many interrupts' time the longest window may take. On bare metal an interrupt costs 1 to 2 us, and this comes to
/// `LONGEST`.
const LONGEST_IN_INTERRUPTS: u32 = 100;
/// An interrupt is delayed by at most this part of the longest window.
const MAX_DELAY_DIVISOR: u32 = 4;
/// How often in a row work must have come within the longest window before polling pays, how many of those count, and what
/// a window without work takes off: the guest's timer makes a busy driver late now and then.
const CONFIDENCE: u8 = 4;
const MOST_CONFIDENCE: u8 = 8;
const IN_VAIN: u8 = 2;

#[derive(Debug)]
pub(super) struct BusyPolling {
    /// The longest window that the operator permits.
    permitted: Duration,
    /// What an interrupt costs the worker, measured. The least of late: what took longer was probably preempted.
    interrupt_cost: Duration,
    /// Work that came soon, in a row, up to `MOST_CONFIDENCE`.
    soon: u8,
    /// The longest gap of late, in nanoseconds. A driver that hears of many completions at once submits many requests in a
    /// row, and is silent in between: an average of its gaps would not cover that.
    gap: u64,
    /// The usual gap, in nanoseconds: a moving average.
    usual_gap: u64,
    idle_since: Instant,
}

impl BusyPolling {
    /// `permitted`: the longest window, whatever interrupts cost.
    pub(super) fn new(permitted: Duration) -> Self {
        let gap = permitted.min(LONGEST).as_nanos() as u64;
        let (interrupt_cost, idle_since) = (Duration::ZERO, Instant::now());
        Self { permitted, interrupt_cost, soon: 0, gap, usual_gap: gap, idle_since }
    }

    /// The longest window. It has to cover what a driver does between a completion and its next request.
    fn longest(&self) -> Duration {
        (self.interrupt_cost * LONGEST_IN_INTERRUPTS).max(LONGEST).min(self.permitted)
    }

    /// The longest that an interrupt may be held back.
    pub(super) fn max_interrupt_delay(&self) -> Duration {
        self.longest() / MAX_DELAY_DIVISOR
    }

    /// Raising the line took `cost`.
    pub(super) fn interrupted(&mut self, cost: Duration) {
        // A host that became slower is noticed over a few dozen interrupts.
        let grown = self.interrupt_cost + self.interrupt_cost / 32;
        let is_first = self.interrupt_cost.is_zero();
        self.interrupt_cost = if is_first { cost } else { cost.min(grown) };
    }

    /// There is nothing to do at `now`. Returns the end of the polling window, when polling pays.
    pub(super) fn idle(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since = now;
        (self.soon >= CONFIDENCE)
            .then(|| now + Duration::from_nanos(self.gap * 2).max(SHORTEST).min(self.longest()))
    }

    /// When a driver that has more requests would have submitted one.
    pub(super) fn expected(&self) -> Instant {
        self.idle_since + Duration::from_nanos(self.usual_gap * 4).min(self.longest())
    }

    /// Work came at `now`, whether the worker was polling or had to be woken.
    pub(super) fn work(&mut self, now: Instant) {
        waypoint!();
        let gap = now.saturating_duration_since(self.idle_since);
        if gap > self.longest() {
            self.soon = 0;
        } else {
            self.soon = MOST_CONFIDENCE.min(self.soon + 1);
            let gap = gap.as_nanos() as u64;
            // A long gap is forgotten over a few dozen others.
            self.gap = gap.max(self.gap - self.gap / 32);
            self.usual_gap = (self.usual_gap * 3 + gap) / 4;
        }
    }

    pub(super) fn in_vain(&mut self) {
        self.soon = self.soon.saturating_sub(IN_VAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_millis(1);

    /// On a machine whose interrupts cost a hundredth of `LONGEST`.
    fn new() -> BusyPolling {
        let mut polling = BusyPolling::new(LONGEST * 100);
        polling.interrupted(LONGEST / LONGEST_IN_INTERRUPTS);
        polling
    }

    #[test]
    fn the_longest_window_follows_what_interrupts_cost() {
        let mut polling = BusyPolling::new(LONGEST);
        assert_eq!(polling.longest(), super::LONGEST);
        // A fast machine, a slower one, and one that the operator's limit does not cover.
        for (microseconds, window) in [(1, super::LONGEST), (4, LONGEST * 2 / 5), (40, LONGEST)] {
            polling = BusyPolling::new(LONGEST);
            polling.interrupted(Duration::from_micros(microseconds));
            assert_eq!(polling.longest(), window);
            assert_eq!(polling.max_interrupt_delay(), window / MAX_DELAY_DIVISOR);
        }
        // One that was preempted does not count, and a host that became slower does.
        polling = new();
        polling.interrupted(LONGEST * 20);
        assert!(polling.longest() < LONGEST + LONGEST / 20);
        (0..100).for_each(|_| polling.interrupted(LONGEST / 25));
        assert_eq!(polling.longest(), LONGEST * 4);
    }

    /// Goes idle, and has work after `gap`. Gives how long the worker would have waited for it.
    fn round(polling: &mut BusyPolling, gap: Duration) -> Option<Duration> {
        let now = Instant::now();
        let end = polling.idle(now);
        polling.work(now + gap);
        end.map(|end| end - now)
    }

    #[test]
    fn a_busy_disk_is_waited_for_and_an_idle_one_is_not() {
        let mut polling = new();
        let waits: Vec<bool> = (0..6).map(|_| round(&mut polling, SHORTEST).is_some()).collect();
        assert_eq!(waits, [false, false, false, false, true, true]);
        assert!(
            round(&mut polling, LONGEST * 2).is_some(),
            "the end of the load cannot be known in advance"
        );
        assert_eq!(round(&mut polling, LONGEST * 2), None);
        assert_eq!(round(&mut polling, SHORTEST), None);
    }

    #[test]
    fn a_wait_is_as_long_as_it_takes_and_bounded() {
        let mut polling = new();
        for (gap, wait) in [(1, SHORTEST), (100, Duration::from_micros(200)), (900, LONGEST)] {
            for _ in 0..300 {
                round(&mut polling, Duration::from_micros(gap));
            }
            let found = round(&mut polling, Duration::from_micros(gap)).unwrap();
            assert!(found.abs_diff(wait) < Duration::from_micros(5), "{gap}: {found:?}");
        }
        // One silence in sixteen is covered, too.
        let mut waits = (0..160).map(|turn| {
            round(&mut polling, Duration::from_micros(if turn % 16 == 0 { 300 } else { 10 }))
        });
        assert!(waits.all(|wait| wait.unwrap() > Duration::from_micros(300)));
    }

    #[test]
    fn waits_in_vain_do_not_go_on() {
        let mut polling = new();
        for _ in 0..CONFIDENCE {
            round(&mut polling, SHORTEST);
        }
        assert!(polling.idle(Instant::now()).is_some());
        polling.in_vain();
        assert_eq!(polling.idle(Instant::now()), None);
        for _ in 0..100 {
            round(&mut polling, SHORTEST);
        }
        let waits = std::iter::from_fn(|| polling.idle(Instant::now()).map(|_| polling.in_vain()));
        assert_eq!(waits.count(), 3);
    }

    #[test]
    fn a_worker_may_be_told_not_to() {
        let mut polling = BusyPolling::new(Duration::ZERO);
        assert!((0..10).all(|_| round(&mut polling, SHORTEST).is_none()));
    }
}

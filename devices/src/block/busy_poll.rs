//! Decides whether a worker busy-polls for more work. To sleep and be woken costs a worker several times as much as a request,
//! and the driver's kick costs the guest an exit. But a worker that polls takes a CPU from others.
//!
//! So a worker polls only if that would have paid lately. A *gap* is the time from when the worker went idle until work came.
//! Each gap that is no longer than the longest polling window adds 1 to the `confidence`, and a longer one sets it to 0. From
//! `CONFIDENCE_TO_POLL` on the worker polls. A window without work takes `IDLE_WINDOW_COST` off, so a few of these turn
//! polling off. An idle disk never turns it on. The window is twice the longest recent gap, at least `SHORTEST` and at most
//! [`BusyPolling::longest`].
//!
//! How long a driver takes for its next request, and what a kick and a wake-up cost, depends on the machine. If the host is a
//! guest itself, each is a hundred times what it is on bare metal. So the longest window is a multiple of what the worker's own
//! interrupts cost. The worker measures each of them.
//!
//! The worker calls `idle` when it has nothing to do, `work` when chains came, `in_vain` when a window passed without work,
//! and `interrupted` after it has raised the line. The loop that polls is in the worker (`poll_for_more`).

use std::time::Duration;

use crate::clock::Instant;

/// The shortest window: clocks and schedulers are not more exact.
const SHORTEST: Duration = Duration::from_micros(50);
/// The longest window where interrupts cost next to nothing: as long as KVM by default polls for a vCPU's interrupt
/// (`halt_poll_ns`).
const LONGEST: Duration = Duration::from_micros(200);
/// The longest window takes as long as this many interrupts. On bare metal an interrupt costs 1 to 2 us, so 100 of them take
/// no longer than `LONGEST`.
const LONGEST_IN_INTERRUPTS: u32 = 100;
/// An interrupt is delayed by at most the longest window divided by this.
const MAX_DELAY_DIVISOR: u32 = 4;
/// The confidence from which on the worker polls.
const CONFIDENCE_TO_POLL: u8 = 4;
const MAX_CONFIDENCE: u8 = 8;
/// What a window without work takes off the confidence. Polling survives one of them: the guest's timer makes a busy driver
/// late now and then.
const IDLE_WINDOW_COST: u8 = 2;

#[derive(Debug)]
pub(super) struct BusyPolling {
    /// The longest window that the operator permits.
    permitted: Duration,
    /// What an interrupt costs the worker: the least of recent measurements, since the thread was probably preempted during a
    /// longer one.
    interrupt_cost: Duration,
    /// 0 to `MAX_CONFIDENCE`.
    confidence: u8,
    /// The longest recent gap, in nanoseconds. A driver that learns of many completions at once submits many requests in a
    /// row, and then none for a while. An average would be shorter than that while.
    longest_gap: u64,
    /// The usual gap, in nanoseconds: a moving average.
    usual_gap: u64,
    idle_since: Instant,
}

impl BusyPolling {
    /// `permitted`: the longest window, whatever interrupts cost.
    pub(super) fn new(permitted: Duration) -> Self {
        let gap = permitted.min(LONGEST).as_nanos() as u64;
        let (interrupt_cost, idle_since) = (Duration::ZERO, Instant::now());
        let (longest_gap, usual_gap) = (gap, gap);
        Self { permitted, interrupt_cost, confidence: 0, longest_gap, usual_gap, idle_since }
    }

    /// The longest window. It has to be longer than what a driver does between a completion and its next request.
    fn longest(&self) -> Duration {
        (self.interrupt_cost * LONGEST_IN_INTERRUPTS).max(LONGEST).min(self.permitted)
    }

    /// The longest that an interrupt may be held back.
    pub(super) fn max_interrupt_delay(&self) -> Duration {
        self.longest() / MAX_DELAY_DIVISOR
    }

    /// Raising the line took `cost`.
    pub(super) fn interrupted(&mut self, cost: Duration) {
        // If interrupts have become slower, the estimate follows over a few dozen of them.
        let grown = self.interrupt_cost + self.interrupt_cost / 32;
        let is_first = self.interrupt_cost.is_zero();
        self.interrupt_cost = if is_first { cost } else { cost.min(grown) };
    }

    /// There is nothing to do at `now`. Returns the end of the polling window, when polling pays.
    pub(super) fn idle(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since = now;
        let window = Duration::from_nanos(self.longest_gap * 2).max(SHORTEST).min(self.longest());
        (self.confidence >= CONFIDENCE_TO_POLL).then(|| now + window)
    }

    /// The time by which a driver that has more requests would have submitted one.
    pub(super) fn expected(&self) -> Instant {
        self.idle_since + Duration::from_nanos(self.usual_gap * 4).min(self.longest())
    }

    /// Work came at `now`, whether the worker was polling or had to be woken.
    pub(super) fn work(&mut self, now: Instant) {
        waypoint!();
        let gap = now.saturating_duration_since(self.idle_since);
        if gap > self.longest() {
            self.confidence = 0;
        } else {
            self.confidence = MAX_CONFIDENCE.min(self.confidence + 1);
            let gap = gap.as_nanos() as u64;
            // A long gap loses its effect over a few dozen shorter ones.
            self.longest_gap = gap.max(self.longest_gap - self.longest_gap / 32);
            self.usual_gap = (self.usual_gap * 3 + gap) / 4;
        }
    }

    /// A window has passed without work.
    pub(super) fn in_vain(&mut self) {
        self.confidence = self.confidence.saturating_sub(IDLE_WINDOW_COST);
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
        for _ in 0..CONFIDENCE_TO_POLL {
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

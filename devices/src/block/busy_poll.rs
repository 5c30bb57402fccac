//! Decides whether a worker busy-polls for more work. To sleep and be woken costs a worker several times as much as a request, and the
//! driver's kick costs the guest an exit. But a worker that polls takes a CPU from others.
//!
//! So a worker needs *credit* for the time that it polls in vain, and polls when its credit covers the polling window. Work that it finds
//! by polling adds 1/32 of the longest window, which is roughly what a kick, a sleep and a wake-up cost. Work that woke the worker adds
//! 1/128, if it came within the longest window. So a worker tries to poll now and then, but not for an idle disk. A window that ends
//! without work takes its length off the credit. If the worker polls on a CPU that the guest needs, its windows end without work, so it
//! rarely polls.
//!
//! A *gap* is the time from when the worker went idle until work came. The window is twice the longest recent gap, at least `SHORTEST`
//! and at most [`BusyPolling::longest`]. Gaps longer than that are ignored.
//!
//! How long a driver takes for its next request, and what a kick and a wake-up cost, depends on the machine: on a host that is a guest
//! itself, each is a hundred times what it is on bare metal. So the longest window is a multiple of what the worker's own interrupts
//! cost, which it measures.
//!
//! The worker calls `idle` when it has nothing to do, `work` when chains came, `in_vain` when a window passed without work, and
//! `interrupted` after it has raised the line. The loop that polls is in the worker (`poll_for_more`).

use std::time::Duration;

use crate::clock::Instant;

/// The shortest window: clocks and schedulers are not more exact.
const SHORTEST: Duration = Duration::from_micros(50);
/// The longest window is at least this long, if the operator permits it: as long as KVM by default polls for a vCPU's interrupt
/// (`halt_poll_ns`).
const MIN_OF_LONGEST: Duration = Duration::from_micros(200);
/// The longest window takes as long as this many interrupts. On bare metal an interrupt costs 1 to 2 us, so 100 of them take
/// no longer than `MIN_OF_LONGEST`.
const LONGEST_IN_INTERRUPTS: u32 = 100;
/// An interrupt is delayed by at most the longest window divided by this.
const MAX_DELAY_DIVISOR: u32 = 4;
/// Work that polling finds earns the longest window divided by this: about the time of three interrupts.
const FOUND_DIVISOR: u32 = 32;
/// Work that woke the worker earns the longest window divided by this.
const WOKEN_DIVISOR: u32 = 128;
/// The credit is at most this many of the longest windows.
const MAX_CREDIT: u32 = 2;

#[derive(Debug)]
pub(super) struct BusyPolling {
    /// The longest window that the operator permits.
    permitted: Duration,
    /// What an interrupt costs the worker: the least of recent measurements, since the thread was probably preempted during a
    /// longer one.
    interrupt_cost: Duration,
    /// How long the worker may still poll in windows that find no work.
    credit: Duration,
    /// The worker polls since it went idle, and its window has not ended.
    polls: bool,
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
        let gap = permitted.min(MIN_OF_LONGEST).as_nanos() as u64;
        let (longest_gap, usual_gap, idle_since) = (gap, gap, Instant::now());
        let (interrupt_cost, credit, polls) = (Duration::ZERO, Duration::ZERO, false);
        Self { permitted, interrupt_cost, credit, polls, longest_gap, usual_gap, idle_since }
    }

    /// The longest window. It has to be longer than what a driver does between a completion and its next request.
    fn longest(&self) -> Duration {
        (self.interrupt_cost * LONGEST_IN_INTERRUPTS).max(MIN_OF_LONGEST).min(self.permitted)
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
        let window = Duration::from_nanos(self.longest_gap * 2).max(SHORTEST).min(self.longest());
        (self.idle_since, self.polls) = (now, !window.is_zero() && self.credit >= window);
        self.polls.then(|| now + window)
    }

    /// The time by which a driver that has more requests would have submitted one.
    pub(super) fn expected(&self) -> Instant {
        self.idle_since + Duration::from_nanos(self.usual_gap * 4).min(self.longest())
    }

    /// Work came at `now`, whether the worker was polling or had to be woken. A gap includes a window that ended without work.
    pub(super) fn work(&mut self, now: Instant) {
        waypoint!();
        let gap = now - self.idle_since;
        if gap <= self.longest() {
            let earned = self.longest() / if self.polls { FOUND_DIVISOR } else { WOKEN_DIVISOR };
            self.credit = (self.credit + earned).min(self.longest() * MAX_CREDIT);
            let gap = gap.as_nanos() as u64;
            // A long gap loses its effect over a few dozen shorter ones.
            self.longest_gap = gap.max(self.longest_gap - self.longest_gap / 32);
            self.usual_gap = (self.usual_gap * 3 + gap) / 4;
        }
    }

    /// The window has ended at `now` without work, and the worker goes to sleep.
    pub(super) fn in_vain(&mut self, now: Instant) {
        let polled = now - self.idle_since;
        (self.credit, self.polls) = (self.credit.saturating_sub(polled), false);
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
        assert_eq!(polling.longest(), super::MIN_OF_LONGEST);
        // A fast machine, a slower one, and one that the operator's limit does not cover.
        for (microseconds, window) in
            [(1, super::MIN_OF_LONGEST), (4, LONGEST * 2 / 5), (40, LONGEST)]
        {
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

    /// How many rounds of work that wakes the worker until it polls.
    fn rounds_until_it_polls(polling: &mut BusyPolling, gap: Duration) -> usize {
        (0..1000).find(|_| round(polling, gap).is_some()).expect("it never polls")
    }

    #[test]
    fn a_busy_disk_is_waited_for_and_an_idle_one_is_not() {
        let mut polling = new();
        let polls = rounds_until_it_polls(&mut polling, SHORTEST / 4);
        assert!((4..50).contains(&polls), "{polls}");
        for _ in 0..100 {
            assert!(round(&mut polling, SHORTEST / 4).is_some());
        }
        let mut idle = new();
        assert!((0..100).all(|_| round(&mut idle, LONGEST * 2).is_none()));
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

    /// As `round`, but while the worker polls no work comes: the driver needs its CPU. Returns how long it polled.
    fn contended_round(polling: &mut BusyPolling) -> Duration {
        let now = Instant::now();
        let end = polling.idle(now).unwrap_or(now);
        if end > now {
            polling.in_vain(end);
        }
        polling.work(end + SHORTEST / 4);
        end - now
    }

    #[test]
    fn polling_in_vain_costs_no_more_than_it_saves() {
        let mut polling = new();
        let rounds = 10_000;
        let polled: Duration = (0..rounds).map(|_| contended_round(&mut polling)).sum();
        assert!(polled > Duration::ZERO, "polling is never tried");
        assert!(polled <= LONGEST / WOKEN_DIVISOR * rounds, "{polled:?}");
    }

    #[test]
    fn the_end_of_a_long_load_costs_two_of_the_longest_windows() {
        let mut polling = new();
        for _ in 0..1000 {
            round(&mut polling, SHORTEST / 4);
        }
        let mut polled = Duration::ZERO;
        loop {
            let now = Instant::now();
            let Some(end) = polling.idle(now) else { break };
            polling.in_vain(end);
            polled += end - now;
        }
        assert!(polled > LONGEST && polled <= LONGEST * MAX_CREDIT, "{polled:?}");
    }

    #[test]
    fn a_worker_may_be_told_not_to() {
        let mut polling = BusyPolling::new(Duration::ZERO);
        assert!((0..1000).all(|_| round(&mut polling, Duration::ZERO).is_none()));
    }
}

//! Whether to wait for more work awake. Sleeping and being woken costs a worker several times what a request does, and the
//! driver's kick costs the guest an exit; but a worker that waits awake takes a processor from others.
//!
//! So a worker waits awake, for a short while, only where that was right lately: where work keeps coming soon after the
//! work before it. A few waits in vain turn it off, and an idle disk never turns it on.

use std::time::{Duration, Instant};

/// A wait is not worth being shorter: clocks and schedulers are not more exact.
const SHORTEST: Duration = Duration::from_micros(50);
/// How often in a row work must have come within the longest wait before one is worth it, how much of that is remembered,
/// and what a wait in vain costs of it: the guest's timer makes a busy driver late now and then.
const CONFIDENCE: u8 = 4;
const MOST_CONFIDENCE: u8 = 8;
const IN_VAIN: u8 = 2;

#[derive(Debug)]
pub(super) struct Polling {
    /// The longest wait. It has to cover what a driver does between an answer and its next request.
    longest: Duration,
    /// Work that came soon, in a row, up to `MOST_CONFIDENCE`.
    soon: u8,
    /// The longest that it lately took to come, in nanoseconds. A driver that is told of many answers at once adds many
    /// requests in a row, and is silent in between: an average of its gaps would not cover that.
    gap: u64,
    /// And how long it takes as a rule, smoothed.
    usual_gap: u64,
    /// When the last work was finished.
    idle_since: Instant,
}

impl Polling {
    pub(super) fn new(longest: Duration) -> Self {
        let gap = longest.as_nanos() as u64;
        Self { longest, soon: 0, gap, usual_gap: gap, idle_since: Instant::now() }
    }

    /// There is nothing to do at `now`. Gives the end of the wait, when it is worth one.
    pub(super) fn idle(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since = now;
        (self.soon >= CONFIDENCE).then(|| now + Duration::from_nanos(self.gap * 2).max(SHORTEST).min(self.longest))
    }

    /// When a driver that has more requests would have added one, since there was nothing to do.
    pub(super) fn expected(&self) -> Instant {
        self.idle_since + Duration::from_nanos(self.usual_gap * 4).min(self.longest)
    }

    /// Work came at `now`, whether the worker was awake or had to be woken.
    pub(super) fn work(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.idle_since);
        if gap > self.longest {
            self.soon = 0;
        } else {
            self.soon = MOST_CONFIDENCE.min(self.soon + 1);
            let gap = gap.as_nanos() as u64;
            // A long one is forgotten over a few dozen others.
            self.gap = gap.max(self.gap - self.gap / 32);
            self.usual_gap = (self.usual_gap * 3 + gap) / 4;
        }
    }

    /// The wait was in vain.
    pub(super) fn in_vain(&mut self) {
        self.soon = self.soon.saturating_sub(IN_VAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_millis(1);

    /// Goes idle, and has work after `gap`. Gives how long the worker would have waited for it.
    fn round(polling: &mut Polling, gap: Duration) -> Option<Duration> {
        let now = Instant::now();
        let end = polling.idle(now);
        polling.work(now + gap);
        end.map(|end| end - now)
    }

    #[test]
    fn a_busy_disk_is_waited_for_and_an_idle_one_is_not() {
        let mut polling = Polling::new(LONGEST);
        let waits: Vec<bool> = (0..6).map(|_| round(&mut polling, SHORTEST).is_some()).collect();
        assert_eq!(waits, [false, false, false, false, true, true]);
        assert!(round(&mut polling, LONGEST * 2).is_some(), "nobody can know in advance");
        assert_eq!(round(&mut polling, LONGEST * 2), None);
        assert_eq!(round(&mut polling, SHORTEST), None);
    }

    #[test]
    fn a_wait_is_as_long_as_it_takes_and_bounded() {
        let mut polling = Polling::new(LONGEST);
        for (gap, wait) in [(1, SHORTEST), (100, Duration::from_micros(200)), (900, LONGEST)] {
            for _ in 0..300 {
                round(&mut polling, Duration::from_micros(gap));
            }
            let found = round(&mut polling, Duration::from_micros(gap)).unwrap();
            assert!(found.abs_diff(wait) < Duration::from_micros(5), "{gap}: {found:?}");
        }
        // One silence in sixteen is covered, too.
        let mut waits =
            (0..160).map(|turn| round(&mut polling, Duration::from_micros(if turn % 16 == 0 { 300 } else { 10 })));
        assert!(waits.all(|wait| wait.unwrap() > Duration::from_micros(300)));
    }

    #[test]
    fn waits_in_vain_do_not_go_on() {
        let mut polling = Polling::new(LONGEST);
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
        let mut polling = Polling::new(Duration::ZERO);
        assert!((0..10).all(|_| round(&mut polling, SHORTEST).is_none()));
    }
}

//! Whether to wait for more work awake. Sleeping and being woken costs a worker several times what a request does, and the
//! driver's kick costs the guest an exit; but a worker that waits awake takes a processor from others.
//!
//! So a worker waits awake, for a short while, only where that was right lately: where work keeps coming soon after the
//! work before it. One wait in vain turns it off, and an idle disk never turns it on.

use std::time::{Duration, Instant};

/// The longest wait. It has to cover what a driver does between an answer and its next request.
const WINDOW: Duration = Duration::from_micros(50);
/// How often in a row work must have come within the window.
const CONFIDENCE: u8 = 4;

#[derive(Debug)]
pub(super) struct Polling {
    /// Work that came within the window, in a row, up to `CONFIDENCE`.
    soon: u8,
    /// When the last work was finished.
    idle_since: Instant,
}

impl Polling {
    pub(super) fn new() -> Self {
        Self { soon: 0, idle_since: Instant::now() }
    }

    /// There is nothing to do at `now`. Gives the end of the wait, when it is worth one.
    pub(super) fn idle(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since = now;
        (self.soon == CONFIDENCE).then(|| now + WINDOW)
    }

    /// Work came at `now`, whether the worker was awake or had to be woken.
    pub(super) fn work(&mut self, now: Instant) {
        let soon = now.saturating_duration_since(self.idle_since) <= WINDOW;
        self.soon = if soon { CONFIDENCE.min(self.soon + 1) } else { 0 };
    }

    /// The wait was in vain.
    pub(super) fn in_vain(&mut self) {
        self.soon = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_disk_is_waited_for_and_an_idle_one_is_not() {
        let mut polling = Polling::new();
        let mut now = Instant::now();
        let mut round = |gap| {
            let wait = polling.idle(now);
            now += gap;
            polling.work(now);
            wait.is_some()
        };
        let rounds: Vec<bool> = (0..6).map(|_| round(WINDOW / 2)).collect();
        assert_eq!(rounds, [false, false, false, false, true, true]);
        assert!(round(WINDOW * 2), "nobody can know in advance");
        assert!(!round(WINDOW * 2));
        assert!(!round(WINDOW / 2));
    }

    #[test]
    fn a_wait_in_vain_is_the_last() {
        let mut polling = Polling::new();
        let now = Instant::now();
        for _ in 0..CONFIDENCE {
            polling.idle(now);
            polling.work(now);
        }
        assert_eq!(polling.idle(now), Some(now + WINDOW));
        polling.in_vain();
        assert_eq!(polling.idle(now), None);
    }
}

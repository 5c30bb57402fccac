//! Interrupt coalescing: how many completions one interrupt announces.
//!
//! An interrupt costs a guest several exits. A driver with many requests in flight goes on submitting before it has seen the
//! last completions. For that driver one interrupt for many completions saves most of the cost and delays nothing. A driver
//! that waits for its only request must be interrupted at once.
//!
//! The driver's own behavior tells the two apart. `limit` is the number of completions that one interrupt announces.
//! A completion is *unseen* until the driver has looked at its entry in the used ring.
//!
//! - A submission that arrives while at least `limit` completions are unseen is evidence that the interrupt could have come
//!   later. After `EVIDENCE_TO_DOUBLE` of these the limit doubles, up to `MAX_COMPLETIONS`.
//! - If the driver submits nothing while an interrupt is held back, it was waiting for that interrupt. This takes
//!   `LATE_INTERRUPT_COST` off the evidence, and halves the limit when too little evidence is left.
//! - The same happens when an interrupt has been held back for the longest permitted delay, so a driver that submits slowly
//!   is not delayed for long either.
//!
//! [`SplitQueue`](super::SplitQueue) calls `on_submit` and `on_complete`; the device asks `should_interrupt` while it
//! busy-polls, and calls `take` before it raises the line. The device owns the clock and the line.

use std::time::Duration;

use crate::clock::Instant;

/// Most completions that one interrupt announces: half of 32, a usual depth of drivers that want throughput.
const MAX_COMPLETIONS: u16 = 16;
/// Submissions past the limit after which the limit doubles.
const EVIDENCE_TO_DOUBLE: u8 = 8;
/// What an interrupt that came too late takes off the evidence.
const LATE_INTERRUPT_COST: u8 = 3;

/// The coalescing state of one queue.
#[derive(Debug)]
pub(crate) struct Coalescer {
    /// Completions to wait for before the next interrupt, 1 to `MAX_COMPLETIONS`.
    limit: u16,
    /// Completions that the driver has not looked at.
    unseen: u16,
    /// When the driver first wanted the interrupt that is held back. `None`: none is wanted.
    wanted: Option<Instant>,
    /// Submissions that arrived past the limit, less the costs of late interrupts: 0 to `EVIDENCE_TO_DOUBLE`.
    evidence: u8,
}

impl Coalescer {
    pub(crate) fn new() -> Self {
        Self { limit: 1, unseen: 0, wanted: None, evidence: 0 }
    }

    /// The driver submitted requests before it had looked at the last `unseen` completions.
    pub(crate) fn on_submit(&mut self, unseen: u16) {
        if unseen < self.limit {
            return;
        }
        self.evidence = EVIDENCE_TO_DOUBLE.min(self.evidence + 1);
        if self.evidence == EVIDENCE_TO_DOUBLE && self.limit < MAX_COMPLETIONS {
            (self.limit, self.evidence) = (self.limit * 2, 0);
        }
    }

    /// More completions were published at `now`. The driver has not looked at the last `unseen` of all completions. `wanted`:
    /// it has asked for an interrupt at one of them.
    pub(crate) fn on_complete(&mut self, unseen: u16, wanted: bool, now: Instant) {
        waypoint!();
        self.unseen = unseen;
        if wanted {
            self.wanted.get_or_insert(now);
        }
    }

    /// Whether to interrupt at `now`. `expected`: by then, a driver that has more requests would have submitted one. No
    /// interrupt is held back longer than `max_delay`.
    pub(crate) fn should_interrupt(
        &mut self,
        now: Instant,
        expected: Instant,
        max_delay: Duration,
    ) -> bool {
        let Some(since) = self.wanted else { return false };
        if self.unseen >= self.limit {
            return true;
        }
        if now < expected.min(since + max_delay) {
            return false;
        }
        match self.evidence.checked_sub(LATE_INTERRUPT_COST) {
            Some(rest) => self.evidence = rest,
            None => (self.limit, self.evidence) = ((self.limit / 2).max(1), 0),
        }
        true
    }

    /// The device is about to interrupt. Returns whether the driver wants that; from now on no interrupt is wanted.
    pub(crate) fn take(&mut self) -> bool {
        self.wanted.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_DELAY: Duration = Duration::from_micros(50);

    /// Plays a driver that keeps `depth` requests in flight, submits one each `pace`, and learns of completions only by
    /// interrupts, each of which reaches it after it submitted another `late` requests. Returns the completions an
    /// interrupt, and the longest that an interrupt was held back.
    fn drive(
        coalescer: &mut Coalescer,
        depth: u16,
        pace: Duration,
        late: u16,
        rounds: u32,
    ) -> (f64, Duration) {
        let (mut unseen, mut completions, mut longest) = (0, 0, Duration::ZERO);
        let mut now = Instant::now();
        for _ in 0..rounds {
            let first = now;
            // Until the interrupt is sent.
            loop {
                if unseen == depth {
                    now += pace * 4;
                    assert!(coalescer.should_interrupt(now, now, MAX_DELAY));
                    break;
                }
                coalescer.on_submit(unseen);
                (unseen, completions) = (unseen + 1, completions + 1);
                coalescer.on_complete(unseen, true, now);
                if coalescer.should_interrupt(now, now + pace * 4, MAX_DELAY) {
                    break;
                }
                now += pace;
            }
            longest = longest.max(now - first);
            assert!(coalescer.take());
            // Until it has arrived.
            for _ in 0..late.min(depth - unseen) {
                now += pace;
                coalescer.on_submit(unseen);
                (unseen, completions) = (unseen + 1, completions + 1);
                coalescer.on_complete(unseen, false, now);
            }
            now += pace;
            unseen = 0;
        }
        (f64::from(completions) / f64::from(rounds), longest)
    }

    const FAST: Duration = Duration::from_micros(2);

    fn deep() -> Coalescer {
        let mut coalescer = Coalescer::new();
        drive(&mut coalescer, 32, FAST, 1, 200);
        coalescer
    }

    #[test]
    fn a_deep_queue_gets_one_interrupt_for_many_completions() {
        let (completions, longest) = drive(&mut deep(), 32, FAST, 1, 100);
        assert!(
            completions >= f64::from(MAX_COMPLETIONS) && longest == FAST * 15,
            "{completions} {longest:?}"
        );
    }

    #[test]
    fn a_shallow_queue_is_interrupted_at_once() {
        assert_eq!(drive(&mut Coalescer::new(), 1, FAST, 1, 10_000), (1.0, Duration::ZERO));
        for depth in [2, 4, 8] {
            let (completions, longest) = drive(&mut Coalescer::new(), depth, FAST, 1, 10_000);
            assert!(
                completions <= f64::from(depth) && longest <= FAST * u32::from(depth + 4),
                "depth {depth}: {longest:?}"
            );
        }
        let mut coalescer = deep();
        drive(&mut coalescer, 1, FAST, 1, 20);
        assert_eq!(drive(&mut coalescer, 1, FAST, 1, 100), (1.0, Duration::ZERO));
    }

    #[test]
    fn a_slow_driver_is_interrupted_in_time() {
        let pace = Duration::from_micros(20);
        let (_, longest) = drive(&mut deep(), 32, pace, 0, 100);
        assert!(longest <= MAX_DELAY + pace, "{longest:?}");
        let mut coalescer = deep();
        drive(&mut coalescer, 32, pace, 0, 100);
        let (completions, _) = drive(&mut coalescer, 32, pace, 0, 100);
        assert!(completions <= 4.0, "{completions}");
    }

    #[test]
    fn an_interrupt_without_a_completion_has_no_lasting_effect() {
        // As after a restore: an interrupt is owed, and the driver has seen all completions.
        let mut coalescer = Coalescer::new();
        let now = Instant::now();
        coalescer.on_complete(0, true, now);
        assert!(coalescer.should_interrupt(now + MAX_DELAY, now, MAX_DELAY) && coalescer.take());
        drive(&mut coalescer, 32, FAST, 1, 200);
        let (completions, _) = drive(&mut coalescer, 32, FAST, 1, 100);
        assert!(completions >= f64::from(MAX_COMPLETIONS), "{completions}");
    }

    #[test]
    fn a_driver_that_does_not_want_interrupts_gets_none() {
        let mut coalescer = Coalescer::new();
        let now = Instant::now();
        coalescer.on_complete(40, false, now);
        assert!(!coalescer.should_interrupt(now + MAX_DELAY, now, MAX_DELAY) && !coalescer.take());
    }
}

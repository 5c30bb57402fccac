//! How many answers one interrupt tells a ring's driver of. An interrupt costs a guest several exits. A driver that has more
//! requests in flight than the disk takes time for goes on adding them while it does not know of the answers before; then
//! one interrupt for many answers saves most of that cost, and costs no time.
//!
//! The driver itself shows whether it is such a one: it adds requests while there are answers that it has not looked at.
//! One that waits for its only request never does. Each time that it does with as many as an interrupt tells it of now is
//! evidence that it could have been left alone for longer; each time that it has nothing to add, and waits for what is held
//! back, is stronger evidence to the contrary. So is one that adds requests at its own pace, too slowly to make up for the
//! wait.

use std::time::{Duration, Instant};

/// Answers that an interrupt may wait for: half of what drivers that go for throughput keep in flight.
const MOST: u16 = 16;
/// How much evidence doubles the limit, and what a wait in vain weighs.
const ENOUGH: u8 = 8;
const IN_VAIN: u8 = 3;

#[derive(Debug)]
pub(super) struct Moderation {
    /// Answers that are to be waited for before the next interrupt.
    limit: u16,
    /// Answers that the driver has not looked at.
    unseen: u16,
    /// Since when it wants to hear of them.
    wanted: Option<Instant>,
    /// The longest that an answer is held back.
    longest: Duration,
    /// For a higher limit.
    evidence: u8,
}

impl Moderation {
    pub(super) fn new(longest: Duration) -> Self {
        Self { limit: 1, unseen: 0, wanted: None, longest, evidence: 0 }
    }

    /// The driver added requests, with `unseen` answers that it has not looked at.
    pub(super) fn added(&mut self, unseen: u16) {
        if unseen < self.limit {
            return;
        }
        self.evidence = ENOUGH.min(self.evidence + 1);
        if self.evidence == ENOUGH && self.limit < MOST {
            (self.limit, self.evidence) = (self.limit * 2, 0);
        }
    }

    /// The driver has been shown more answers at `now`, and there are `unseen`; `wanted`: it asked for an interrupt here.
    pub(super) fn shown(&mut self, unseen: u16, wanted: bool, now: Instant) {
        self.unseen = unseen;
        if wanted {
            self.wanted.get_or_insert(now);
        }
    }

    /// Whether an interrupt is due at `now`. A driver that has more requests would have added one by `expected`.
    pub(super) fn is_due(&mut self, now: Instant, expected: Instant) -> bool {
        let Some(since) = self.wanted else { return false };
        if self.unseen >= self.limit {
            return true;
        }
        if now < expected.min(since + self.longest) {
            return false;
        }
        match self.evidence.checked_sub(IN_VAIN) {
            Some(rest) => self.evidence = rest,
            None => (self.limit, self.evidence) = ((self.limit / 2).max(1), 0),
        }
        true
    }

    /// The interrupt is about to be sent. `false`: none is owed.
    pub(super) fn take(&mut self) -> bool {
        self.wanted.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(50);

    /// A driver that keeps `depth` requests in flight, adds one each `pace`, and learns of answers only by interrupts, each
    /// of which reaches it after it added another `late` requests. Gives answers an interrupt, and the longest that one
    /// waited.
    fn drive(moderation: &mut Moderation, depth: u16, pace: Duration, late: u16, rounds: u32) -> (f64, Duration) {
        let (mut unseen, mut answers, mut longest) = (0, 0, Duration::ZERO);
        let mut now = Instant::now();
        for _ in 0..rounds {
            let first = now;
            // Until the interrupt is sent.
            loop {
                if unseen == depth {
                    now += pace * 4;
                    assert!(moderation.is_due(now, now));
                    break;
                }
                moderation.added(unseen);
                (unseen, answers) = (unseen + 1, answers + 1);
                moderation.shown(unseen, true, now);
                if moderation.is_due(now, now + pace * 4) {
                    break;
                }
                now += pace;
            }
            longest = longest.max(now - first);
            assert!(moderation.take());
            // Until it has arrived.
            for _ in 0..late.min(depth - unseen) {
                now += pace;
                moderation.added(unseen);
                (unseen, answers) = (unseen + 1, answers + 1);
                moderation.shown(unseen, false, now);
            }
            now += pace;
            unseen = 0;
        }
        (f64::from(answers) / f64::from(rounds), longest)
    }

    const FAST: Duration = Duration::from_micros(2);

    fn deep() -> Moderation {
        let mut moderation = Moderation::new(LONGEST);
        drive(&mut moderation, 32, FAST, 1, 200);
        moderation
    }

    #[test]
    fn a_deep_queue_is_told_of_many_answers_at_once() {
        let (answers, longest) = drive(&mut deep(), 32, FAST, 1, 100);
        assert!(answers >= f64::from(MOST) && longest == FAST * 15, "{answers} {longest:?}");
    }

    #[test]
    fn a_shallow_queue_is_not_kept_waiting() {
        assert_eq!(drive(&mut Moderation::new(LONGEST), 1, FAST, 1, 10_000), (1.0, Duration::ZERO));
        for depth in [2, 4, 8] {
            let (answers, longest) = drive(&mut Moderation::new(LONGEST), depth, FAST, 1, 10_000);
            assert!(
                answers <= f64::from(depth) && longest <= FAST * u32::from(depth + 4),
                "depth {depth}: {longest:?}"
            );
        }
        let mut moderation = deep();
        drive(&mut moderation, 1, FAST, 1, 20);
        assert_eq!(drive(&mut moderation, 1, FAST, 1, 100), (1.0, Duration::ZERO));
    }

    #[test]
    fn a_driver_with_a_pace_of_its_own_is_not_kept_waiting() {
        let pace = Duration::from_micros(20);
        let (_, longest) = drive(&mut deep(), 32, pace, 0, 100);
        assert!(longest <= LONGEST + pace, "{longest:?}");
        let mut moderation = deep();
        drive(&mut moderation, 32, pace, 0, 100);
        let (answers, _) = drive(&mut moderation, 32, pace, 0, 100);
        assert!(answers <= 4.0, "{answers}");
    }

    #[test]
    fn an_interrupt_for_no_answer_changes_nothing_for_good() {
        // As after a restore: one is owed, and the driver has seen all.
        let mut moderation = Moderation::new(LONGEST);
        let now = Instant::now();
        moderation.shown(0, true, now);
        assert!(moderation.is_due(now + LONGEST, now) && moderation.take());
        drive(&mut moderation, 32, FAST, 1, 200);
        let (answers, _) = drive(&mut moderation, 32, FAST, 1, 100);
        assert!(answers >= f64::from(MOST), "{answers}");
    }

    #[test]
    fn a_driver_that_does_not_want_interrupts_gets_none() {
        let mut moderation = Moderation::new(LONGEST);
        let now = Instant::now();
        moderation.shown(40, false, now);
        assert!(!moderation.is_due(now + LONGEST, now) && !moderation.take());
    }
}

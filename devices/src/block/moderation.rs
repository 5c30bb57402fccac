//! How many answers one interrupt tells the driver of. An interrupt costs a guest several exits. A driver that has more
//! requests in flight than the disk takes time for goes on adding them while it does not know of the answers before; then
//! one interrupt for many answers saves most of that cost, and costs no time.
//!
//! Nobody says how many requests a driver would add. So the limit is found by trying: it doubles as long as requests come
//! before it is reached, and is halved when the driver had nothing more to add and waited for us. A driver that always
//! waits for its only request has a limit of one, which is tried more and more rarely.

/// Answers that an interrupt may wait for.
const MOST: u32 = 16;
/// Interrupts between two attempts at a higher limit: at least, and at most.
const PATIENCE: (u32, u32) = (32, 256);

#[derive(Debug)]
pub(super) struct Moderation {
    /// Answers since the last interrupt that are to be waited for before the next.
    limit: u32,
    /// Answers since the last interrupt.
    answers: u32,
    /// The driver wants to hear of them.
    wanted: bool,
    /// Interrupts since the limit was last changed, and how many it takes to raise it.
    interrupts: u32,
    patience: u32,
}

impl Moderation {
    pub(super) fn new() -> Self {
        Self { limit: 1, answers: 0, wanted: false, interrupts: 0, patience: PATIENCE.0 }
    }

    /// Answers were shown to the driver; `wanted`: it asked for an interrupt when it has so many.
    pub(super) fn shown(&mut self, answers: u32, wanted: bool) {
        self.answers = self.answers.saturating_add(answers);
        self.wanted |= wanted;
    }

    /// The driver waits for an interrupt.
    pub(super) fn is_owed(&self) -> bool {
        self.wanted
    }

    /// As many answers as one interrupt may be for.
    pub(super) fn is_full(&self) -> bool {
        self.wanted && self.answers >= self.limit
    }

    /// The driver has nothing to add: it waits for what is held back.
    pub(super) fn in_vain(&mut self) {
        self.limit = (self.answers / 2).clamp(1, self.limit);
        self.interrupts = 0;
        self.patience = (self.patience * 2).min(PATIENCE.1);
    }

    /// The interrupt is about to be sent. `false`: none is owed.
    pub(super) fn take(&mut self) -> bool {
        if !std::mem::take(&mut self.wanted) {
            return false;
        }
        // More at once than the limit says nothing about what would come after.
        if self.answers >= self.limit {
            self.interrupts += 1;
        }
        self.answers = 0;
        if self.interrupts >= self.patience && self.limit < MOST {
            // It went well, if it was an attempt.
            self.patience = if self.limit > 1 { PATIENCE.0 } else { self.patience };
            (self.limit, self.interrupts) = (self.limit * 2, 0);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that keeps `depth` requests in flight, told of its answers as the worker does it, for `rounds` interrupts.
    /// Gives answers an interrupt, and waits in vain an interrupt.
    fn drive(moderation: &mut Moderation, depth: u32, rounds: u32) -> (f64, f64) {
        let (mut answers, mut in_vain) = (0, 0);
        for _ in 0..rounds {
            for held in 1..=depth {
                answers += 1;
                moderation.shown(1, true);
                if moderation.is_full() {
                    break;
                }
                if held == depth {
                    moderation.in_vain();
                    in_vain += 1;
                }
            }
            assert!(moderation.take());
        }
        (f64::from(answers) / f64::from(rounds), f64::from(in_vain) / f64::from(rounds))
    }

    #[test]
    fn a_deep_queue_is_told_of_many_answers_at_once() {
        let mut moderation = Moderation::new();
        drive(&mut moderation, 32, 200);
        assert_eq!(drive(&mut moderation, 32, 100), (16.0, 0.0));
    }

    #[test]
    fn a_shallow_queue_is_not_kept_waiting() {
        for depth in [1, 2, 4, 8] {
            let (_, in_vain) = drive(&mut Moderation::new(), depth, 10_000);
            assert!(in_vain < 0.02, "depth {depth}: {in_vain}");
        }
        let mut moderation = Moderation::new();
        drive(&mut moderation, 32, 200);
        let (answers, in_vain) = drive(&mut moderation, 1, 10_000);
        assert!(answers < 1.01 && in_vain < 0.02, "{answers} {in_vain}");
    }

    #[test]
    fn a_driver_that_does_not_want_interrupts_gets_none() {
        let mut moderation = Moderation::new();
        moderation.shown(40, false);
        assert!(!moderation.is_owed() && !moderation.is_full() && !moderation.take());
    }
}

//! How many answers one interrupt tells a ring's driver of. An interrupt costs a guest several exits. A driver that has more
//! requests in flight than the disk takes time for goes on adding them while it does not know of the answers before; then
//! one interrupt for many answers saves most of that cost, and costs no time.
//!
//! The driver itself shows whether it is such a one: it adds requests while there are answers that it has not looked at.
//! One that waits for its only request never does. Each time that it does with as many as an interrupt tells it of now is
//! evidence that it could have been left alone for longer; each time that it has nothing to add, and waits for what is held
//! back, is stronger evidence to the contrary.

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
    /// It wants to hear of them.
    wanted: bool,
    /// For a higher limit.
    evidence: u8,
}

impl Moderation {
    pub(super) fn new() -> Self {
        Self { limit: 1, unseen: 0, wanted: false, evidence: 0 }
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

    /// The driver has been shown more answers, and now there are `unseen`; `wanted`: it asked for an interrupt here.
    pub(super) fn shown(&mut self, unseen: u16, wanted: bool) {
        self.unseen = unseen;
        self.wanted |= wanted;
    }

    /// As many answers as one interrupt may be for.
    pub(super) fn is_full(&self) -> bool {
        self.wanted && self.unseen >= self.limit
    }

    /// The driver has nothing to add: if an answer is held back, it may be waiting for that.
    pub(super) fn in_vain(&mut self) {
        if !self.wanted {
            return;
        }
        match self.evidence.checked_sub(IN_VAIN) {
            Some(rest) => self.evidence = rest,
            None => (self.limit, self.evidence) = ((self.limit / 2).max(1), 0),
        }
    }

    /// The interrupt is about to be sent. `false`: none is owed.
    pub(super) fn take(&mut self) -> bool {
        std::mem::take(&mut self.wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that keeps `depth` requests in flight, and learns of answers only by interrupts, each of which reaches it
    /// after it added another `late` requests. Gives answers an interrupt, and waits in vain an interrupt.
    fn drive(moderation: &mut Moderation, depth: u16, late: u16, rounds: u32) -> (f64, f64) {
        let (mut unseen, mut answers, mut in_vain) = (0, 0, 0);
        for _ in 0..rounds {
            // Until the interrupt is sent.
            loop {
                if unseen == depth {
                    moderation.in_vain();
                    in_vain += 1;
                    break;
                }
                moderation.added(unseen);
                (unseen, answers) = (unseen + 1, answers + 1);
                moderation.shown(unseen, true);
                if moderation.is_full() {
                    break;
                }
            }
            assert!(moderation.take());
            // Until it has arrived.
            for _ in 0..late.min(depth - unseen) {
                moderation.added(unseen);
                (unseen, answers) = (unseen + 1, answers + 1);
                moderation.shown(unseen, false);
            }
            unseen = 0;
        }
        (f64::from(answers) / f64::from(rounds), f64::from(in_vain) / f64::from(rounds))
    }

    #[test]
    fn a_deep_queue_is_told_of_many_answers_at_once() {
        let mut moderation = Moderation::new();
        drive(&mut moderation, 32, 1, 200);
        let (answers, in_vain) = drive(&mut moderation, 32, 1, 100);
        assert!(answers >= f64::from(MOST) && in_vain == 0.0, "{answers} {in_vain}");
    }

    #[test]
    fn a_shallow_queue_is_not_kept_waiting() {
        assert_eq!(drive(&mut Moderation::new(), 1, 1, 10_000), (1.0, 0.0));
        for depth in [2, 4, 8] {
            let (answers, in_vain) = drive(&mut Moderation::new(), depth, 1, 10_000);
            assert!(answers <= f64::from(depth) && in_vain < 0.2, "depth {depth}: {answers} {in_vain}");
        }
        let mut moderation = Moderation::new();
        drive(&mut moderation, 32, 1, 200);
        drive(&mut moderation, 1, 1, 20);
        assert_eq!(drive(&mut moderation, 1, 1, 100), (1.0, 0.0));
    }

    #[test]
    fn a_driver_that_does_not_want_interrupts_gets_none() {
        let mut moderation = Moderation::new();
        moderation.shown(40, false);
        moderation.in_vain();
        assert!(!moderation.is_full() && !moderation.take());
    }
}

//! The user ends the machine by a signal or a key, and may do so again if that takes too long.
//!
//! A capability: `signals` and the console's input call it.

use std::time::Duration;

use super::{Machine, Outcome};
use crate::signals::ALWAYS;

/// How long the end may take in all, if a further SIGTERM, SIGINT, SIGQUIT or `Ctrl-A x` comes. It is not zero, because timeout(1) sends its signal twice:
/// to the process and to its group. If all disks answer, the end takes a fraction of this time.
const HURRIED_END: Duration = Duration::from_secs(1);

impl Machine {
    /// Ends the machine. If its end has begun already, this limits it to [`HURRIED_END`].
    pub(crate) fn end_by_user(&mut self, outcome: Outcome) {
        if let Some(end) = &mut self.end
            && end.limit > HURRIED_END
            // The others are sent more than once without impatience: SIGHUP by the shell and the kernel when a terminal closes, SIGALRM by
            // a timer with an interval, SIGXCPU each second.
            && !matches!(outcome, Outcome::Signal(signal) if !ALWAYS.contains(&signal))
        {
            end.limit = HURRIED_END;
            let left = HURRIED_END.saturating_sub(end.began.elapsed());
            self.start_deadline(left);
        }
        self.end(Ok(outcome));
    }
}

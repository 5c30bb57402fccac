//! What was found, as text and as JSON.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::choice::{Choice, Presence};
use super::history::{Change, History, Walk};
use super::judge::Failure;

/// Lines of a command's output that the text shows.
const LINES_MAX: usize = 8;
/// Dropped changes that the text names.
const NAMED_MAX: usize = 8;

/// All that a report says.
pub(super) struct Report<'a> {
    pub(super) log: &'a Path,
    pub(super) base: &'a Path,
    pub(super) history: &'a History,
    pub(super) states: usize,
    /// How many states failed.
    pub(super) failed: usize,
    /// The smallest failing state of an epoch, and how many failed at it.
    pub(super) failures: Vec<(Failure, usize)>,
    pub(super) is_stopped: bool,
}

/// The changes that a state lacks, wholly or in part.
fn dropped<'a>(history: &'a History, choice: &Choice) -> Vec<(&'a Change, &'static str)> {
    let mut walk = Walk::new(history);
    while walk.epoch < choice.epoch {
        walk.step(history);
    }
    let open = walk.open(history);
    let lacking = open.into_iter().zip(&choice.parts).filter_map(|(index, part)| match part {
        Presence::Whole => None,
        Presence::Absent => Some((&history.changes[index], "missing")),
        Presence::Torn(_) => Some((&history.changes[index], "torn")),
    });
    lacking.collect()
}

impl Report<'_> {
    /// The log and the number of states.
    pub(super) fn summary(&self) -> String {
        let Self { history, states, failed, .. } = self;
        format!(
            "{}: {} changes, {} flushes, {} epochs; {states} states: {failed} failed",
            self.log.display(),
            history.changes.len(),
            history.flushes,
            history.epochs(),
        )
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.summary() + "\n";
        if self.is_stopped {
            text += "stopped by a signal: not all states were looked at\n";
        }
        for (failure, count) in &self.failures {
            // Writing to a string does not fail.
            let _ = self.failure(&mut text, failure, *count);
        }
        text
    }

    fn failure(&self, text: &mut String, failure: &Failure, count: usize) -> std::fmt::Result {
        let how = match (failure.status, failure.signal) {
            (Some(status), _) => format!("exit status {status}"),
            (None, signal) => format!("signal {}", signal.unwrap_or(0)),
        };
        let (epoch, history) = (failure.choice.epoch, self.history);
        writeln!(
            text,
            "\nfailed {}: {how}\n  the power is cut after entry {} of the log; states that fail there: {count}",
            failure.choice,
            history.entries_at(epoch),
        )?;
        let dropped = dropped(history, &failure.choice);
        for (change, how) in dropped.iter().take(NAMED_MAX) {
            let Change { entry, sector, sectors, .. } = change;
            writeln!(text, "  {how}: entry {entry}, sectors {sector} to {}", sector + sectors - 1)?;
        }
        match dropped.len() {
            0 => writeln!(text, "  nothing is missing: what was written fails as it is")?,
            all if all > NAMED_MAX => writeln!(text, "  and {} more", all - NAMED_MAX)?,
            _ => {}
        }
        let lines: Vec<_> = failure.output.lines().collect();
        for line in &lines[lines.len().saturating_sub(LINES_MAX)..] {
            writeln!(text, "  | {}", line.escape_debug())?;
        }
        writeln!(
            text,
            "  the same again: minivmm powercut {} --base {} --state {} --output FILE",
            self.log.display(),
            self.base.display(),
            failure.choice
        )
    }

    pub(super) fn json(&self) -> Value {
        let failures = self.failures.iter().map(|(failure, count)| {
            let dropped = dropped(self.history, &failure.choice);
            let dropped = dropped.iter().map(|(change, how)| {
                let Change { entry, sector, sectors, .. } = change;
                json!({ "entry": entry, "sector": sector, "sectors": sectors, "how": how })
            });
            json!({
                "state": failure.choice.to_string(),
                "entries": self.history.entries_at(failure.choice.epoch),
                "states-of-this-epoch": count,
                "exit-status": failure.status,
                "signal": failure.signal,
                "dropped": dropped.collect::<Vec<_>>(),
                "output": failure.output,
            })
        });
        json!({
            "log": self.log.to_string_lossy(),
            "base": self.base.to_string_lossy(),
            "log-is-complete": !self.history.is_incomplete,
            "changes": self.history.changes.len(),
            "flushes": self.history.flushes,
            "epochs": self.history.epochs(),
            "states": self.states,
            "failed": self.failed,
            "stopped": self.is_stopped,
            "failures": failures.collect::<Vec<_>>(),
        })
    }
}

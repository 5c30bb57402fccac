//! What a program said so far, collected by a thread and waited for without polling.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How many times `bound` a program may go on talking without saying what it should.
const PATIENCE: u32 = 3;

/// The output of one program, one pipe or one socket.
#[derive(Clone, Debug)]
pub struct Transcript {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// Up to here `expect` has found what it looked for.
    seen: usize,
    ended: bool,
}

impl Transcript {
    /// Reads `source` to its end on a thread of its own. A pseudo-terminal's master ends with an error when its last user
    /// has gone; that, too, is an end.
    pub fn of(mut source: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        thread::spawn(move || {
            let (state, changed) = &*writer;
            let mut chunk = [0; 4096];
            loop {
                let count = source.read(&mut chunk).unwrap_or(0);
                let mut state = state.lock().unwrap();
                state.bytes.extend_from_slice(&chunk[..count]);
                state.ended = count == 0;
                changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Self { shared }
    }

    /// Waits for `text` after what was found before, and returns everything up to and including it. A program that says
    /// something meanwhile is slow, not stuck, and gets up to `PATIENCE` times as long.
    ///
    /// # Errors
    /// The end of the output, or `bound` without any, came first; the text says which, with the last of what there was.
    pub fn expect(&self, text: &str, bound: Duration) -> Result<String, String> {
        let found = self.wait(bound, |state| {
            let new = &state.bytes[state.seen..];
            new.windows(text.len())
                .position(|window| window == text.as_bytes())
                .map(|at| at + text.len())
        });
        match found {
            Ok((mut state, length)) => {
                let start = state.seen;
                state.seen += length;
                Ok(String::from_utf8_lossy(&state.bytes[start..state.seen]).into_owned())
            }
            Err(why) => Err(format!("{text:?} did not come: {why}")),
        }
    }

    /// Waits until there are at least `count` bytes in all, and returns everything.
    ///
    /// # Errors
    /// As [`expect`](Self::expect).
    pub fn expect_bytes(&self, count: usize, bound: Duration) -> Result<Vec<u8>, String> {
        self.wait(bound, |state| (state.bytes.len() >= count).then_some(()))
            .map(|(state, ())| state.bytes.clone())
            .map_err(|why| format!("{count} bytes did not come: {why}"))
    }

    /// Waits for the end and returns everything.
    ///
    /// # Errors
    /// `bound` came first.
    pub fn to_end(&self, bound: Duration) -> Result<Vec<u8>, String> {
        let (state, changed) = &*self.shared;
        let (state, timeout) =
            changed.wait_timeout_while(state.lock().unwrap(), bound, |state| !state.ended).unwrap();
        if timeout.timed_out() {
            Err(format!("it goes on\n{}", tail(&state.bytes)))
        } else {
            Ok(state.bytes.clone())
        }
    }

    /// The last lines so far, for a message.
    pub fn tail(&self) -> String {
        tail(&self.shared.0.lock().unwrap().bytes)
    }

    fn wait<T>(
        &self,
        bound: Duration,
        look: impl Fn(&State) -> Option<T>,
    ) -> Result<(std::sync::MutexGuard<'_, State>, T), String> {
        let (state, changed) = &*self.shared;
        let last_word = Instant::now() + PATIENCE * bound;
        let mut state = state.lock().unwrap();
        loop {
            if let Some(found) = look(&state) {
                return Ok((state, found));
            }
            let left = bound.min(last_word.saturating_duration_since(Instant::now()));
            let count = state.bytes.len();
            let silent = |state: &mut State| state.bytes.len() == count && !state.ended;
            let timeout;
            (state, timeout) = changed.wait_timeout_while(state, left, silent).unwrap();
            if state.ended && look(&state).is_none() || timeout.timed_out() {
                let why = if state.ended { "the output ended" } else { "the time is up" };
                return Err(format!("{why}\n{}", tail(&state.bytes)));
            }
        }
    }
}

fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(40);
    format!("---- last output\n{}\n----", lines[from..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BOUND;

    #[test]
    fn finds_texts_in_order_and_reports_the_end() {
        let transcript = Transcript::of(&b"one two three"[..]);
        assert_eq!(transcript.expect("two", BOUND).unwrap(), "one two");
        assert_eq!(transcript.expect("three", BOUND).unwrap(), " three");
        let error = transcript.expect("one", BOUND).unwrap_err();
        assert!(
            error.contains("\"one\" did not come: the output ended")
                && error.contains("one two three"),
            "{error}"
        );
        assert_eq!(transcript.to_end(BOUND).unwrap(), b"one two three");
        assert_eq!(transcript.expect_bytes(3, BOUND).unwrap().len(), 13);
    }

    #[test]
    fn reports_the_bound() {
        let (silent, _kept) = std::io::pipe().unwrap();
        let transcript = Transcript::of(silent);
        assert!(transcript.expect("x", Duration::ZERO).unwrap_err().contains("the time is up"));
        assert!(transcript.to_end(Duration::ZERO).is_err());
    }
}

//! A limit for messages that a guest can provoke: one a second for each place that has its own limit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Instant;

/// Shortest time between two messages.
const INTERVAL: Duration = Duration::from_secs(1);

/// Decides whether a message may be written now, and counts those that may not. The first message is admitted at once. Shared by
/// reference between threads.
///
/// ```
/// let limit = devices::log_limit::LogLimit::default();
/// for _ in 0..1000 {
///     limit.warn(format_args!("a bad request")); // is logged once
/// }
/// ```
#[derive(Debug, Default)]
pub struct LogLimit {
    /// When the next message is due, as an [`Instant`]'s number.
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// Logs a warning if one may be written now, with the number of those that were suppressed since the last.
    pub fn warn(&self, message: std::fmt::Arguments<'_>) {
        match self.admit() {
            None => {}
            Some(0) => tracing::warn!("{message}"),
            Some(count) => tracing::warn!("{message} ({count} more like this not printed)"),
        }
    }

    /// `Some(n)`: write the message; n earlier ones were suppressed since the last. `None`: stay silent.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        use Ordering::Relaxed;
        let (next, after) = (self.next.load(Relaxed), (now + INTERVAL).0);
        // The exchange lets one of several threads that arrive together through.
        if now.0 < next || self.next.compare_exchange(next, after, Relaxed, Relaxed).is_err() {
            self.suppressed.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.suppressed.swap(0, Relaxed))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Arc, Mutex, OnceLock};

    use super::*;

    /// A log that a test can read.
    #[derive(Clone, Default)]
    pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

    impl Log {
        /// Takes what this thread logs until the guard is dropped.
        pub(crate) fn listen(&self) -> tracing::subscriber::DefaultGuard {
            // With one subscriber alone, `tracing` asks the thread that first reaches a place whether anybody listens, and never asks
            // again.
            static SECOND: OnceLock<tracing::Dispatch> = OnceLock::new();
            SECOND.get_or_init(|| tracing::Dispatch::new(Self::default()));
            tracing::subscriber::set_default(self.clone())
        }

        pub(crate) fn lines(&self) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
    }

    impl tracing::Subscriber for Log {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            // What users see: no trace events.
            metadata.level() <= &tracing::Level::INFO
        }

        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }

        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            struct Text(String);
            impl tracing::field::Visit for Text {
                fn record_debug(
                    &mut self,
                    field: &tracing::field::Field,
                    value: &dyn std::fmt::Debug,
                ) {
                    self.0 += &format!("{}={value:?} ", field.name());
                }
            }
            let mut text = Text(event.metadata().level().to_string());
            event.record(&mut text);
            self.0.lock().unwrap().push(text.0);
        }
    }

    #[test]
    fn one_message_an_interval_and_the_rest_counted() {
        let (limit, start) = (LogLimit::default(), Instant::now());
        let at = |milliseconds| limit.admit_at(start + Duration::from_millis(milliseconds));
        assert_eq!(at(0), Some(0));
        assert_eq!(at(1), None);
        assert_eq!(at(999), None);
        assert_eq!(at(1000), Some(2));
        assert_eq!(at(1999), None);
        assert_eq!(at(60_000), Some(1));
    }

    #[test]
    fn a_warning_has_the_number_of_those_before_it_that_were_not_printed() {
        let log = Log::default();
        let _logging = log.listen();
        let limit = LogLimit::default();
        limit.warn(format_args!("disk vda: bad"));
        limit.warn(format_args!("disk vda: bad"));
        limit.next.store(0, Ordering::Relaxed);
        limit.warn(format_args!("disk vda: bad"));
        let expected = ["disk vda: bad", "disk vda: bad (1 more like this not printed)"];
        assert_eq!(log.lines(), expected.map(|line| format!("WARNmessage={line} ")));
    }
}

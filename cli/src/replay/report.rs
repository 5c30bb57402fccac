//! What a replay measured, next to what the trace recorded.
//!
//! Both sides are computed alike. A percentile is the latency at its nearest rank, from all latencies and not from bins. MB/s are the bytes
//! of one kind of request, in millions, by the time from the first request's beginning to the last one's end.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use devices::disk::DiskError;
use serde_json::{Value, json};

use super::load::{Kind, Load, Request};
use super::player::Played;

const PERCENTILES: [(f64, &str); 3] = [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")];

pub(super) struct Report<'a> {
    pub(super) trace: &'a Path,
    pub(super) disk: &'a Path,
    pub(super) no_stall: bool,
    pub(super) load: &'a Load,
    pub(super) played: &'a Played,
}

struct Figures {
    requests: usize,
    mb_per_second: f64,
    percentiles_us: [Option<f64>; PERCENTILES.len()],
}

impl Figures {
    fn new(bytes: u64, over: Duration, mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        let at = |share: f64| {
            let rank = (share * latencies.len() as f64).ceil() as usize;
            latencies.get(rank.saturating_sub(1)).map(|latency| latency.as_secs_f64() * 1e6)
        };
        let mb_per_second = bytes as f64 / 1e6 / over.as_secs_f64().max(1e-9);
        let percentiles_us = PERCENTILES.map(|(share, _)| at(share));
        Self { requests: latencies.len(), mb_per_second, percentiles_us }
    }

    fn row(&self, text: &mut String, name: &str, errors: Option<usize>) {
        let errors = errors.map_or(String::new(), |errors| errors.to_string());
        let _ =
            write!(text, "{name:<14}{:>9}{errors:>8}{:>10.2}", self.requests, self.mb_per_second);
        for latency in self.percentiles_us {
            let latency = latency.map_or("-".to_owned(), |latency| format!("{latency:.1}"));
            let _ = write!(text, "{latency:>12}");
        }
        text.push('\n');
    }

    fn json(&self) -> Value {
        let mut json = json!({ "requests": self.requests, "mb-per-second": self.mb_per_second });
        for ((_, name), latency) in PERCENTILES.iter().zip(self.percentiles_us) {
            json[format!("{name}-us")] = json!(latency);
        }
        json
    }
}

impl Report<'_> {
    fn outcomes(&self) -> impl Iterator<Item = (&Request, &Result<Duration, DiskError>)> {
        self.load.requests.iter().zip(&self.played.latencies)
    }

    /// From the first request's beginning to the last known end.
    fn recorded_time(&self) -> Duration {
        let end = |request: &Request| request.begin + request.recorded.unwrap_or_default();
        self.load.requests.iter().map(end).max().unwrap_or_default()
    }

    pub(super) fn errors(&self) -> usize {
        self.played.latencies.iter().filter(|outcome| outcome.is_err()).count()
    }

    /// Of one kind: the replay, how many failed, and the trace. `None`: there are no such requests.
    fn figures(&self, kind: Kind) -> Option<(Figures, usize, Figures)> {
        let of_kind = || self.outcomes().filter(|(request, _)| request.kind == kind);
        of_kind().next()?;
        let replayed =
            || of_kind().filter_map(|(request, outcome)| Some((request, (*outcome).ok()?)));
        let recorded = || of_kind().filter_map(|(request, _)| Some((request, request.recorded?)));
        let bytes = |sum: u64, request: &Request| sum.saturating_add(request.length);
        let ours = Figures::new(
            replayed().map(|(request, _)| request).fold(0, bytes),
            self.played.duration,
            replayed().map(|(_, latency)| latency).collect(),
        );
        let theirs = Figures::new(
            recorded().map(|(request, _)| request).fold(0, bytes),
            self.recorded_time(),
            recorded().map(|(_, latency)| latency).collect(),
        );
        Some((ours, of_kind().filter(|(_, outcome)| outcome.is_err()).count(), theirs))
    }

    pub(super) fn text(&self) -> String {
        let Played { duration, in_flight_max, late, .. } = self.played;
        let mut text = format!(
            "{} on {}: {} requests in {:.3} s (recorded: {:.3} s), at most {in_flight_max} in flight\n",
            self.trace.display(),
            self.disk.display(),
            self.load.requests.len(),
            duration.as_secs_f64(),
            self.recorded_time().as_secs_f64(),
        );
        if !self.no_stall {
            let late = late.as_secs_f64() * 1e3;
            let _ = writeln!(text, "the latest request began {late:.3} ms after its time");
        }
        let _ = write!(text, "{:<14}{:>9}{:>8}{:>10}", "", "requests", "errors", "MB/s");
        for (_, name) in PERCENTILES {
            let _ = write!(text, "{:>12}", format!("{name} us"));
        }
        text.push('\n');
        for (kind, name) in Kind::ALL {
            if let Some((ours, errors, theirs)) = self.figures(kind) {
                ours.row(&mut text, name, Some(errors));
                theirs.row(&mut text, "  recorded", None);
            }
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let mut kinds = json!({});
        for (kind, name) in Kind::ALL {
            if let Some((ours, errors, theirs)) = self.figures(kind) {
                kinds[name] =
                    json!({ "replayed": ours.json(), "errors": errors, "recorded": theirs.json() });
            }
        }
        let late = (!self.no_stall).then_some(self.played.late.as_secs_f64());
        json!({
            "trace": self.trace.to_string_lossy(),
            "disk": self.disk.to_string_lossy(),
            "requests": self.load.requests.len(),
            "events-lost": self.load.lost,
            "seconds": self.played.duration.as_secs_f64(),
            "recorded-seconds": self.recorded_time().as_secs_f64(),
            "in-flight-max": self.played.in_flight_max,
            "late-seconds-max": late,
            "kinds": kinds,
        })
    }
}

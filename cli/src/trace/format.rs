//! The formats of a trace: text, one JSON object in each line, and the trace event format for ui.perfetto.dev.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::time::{Duration, Instant};

use vmm::trace::{Decoded, EVENTS, decode};

use super::record::{Record, ThreadId, Value};
use super::requests::{EngineSpan, Requests, Station};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    #[default]
    Text,
    Json,
    Perfetto,
}

/// How long an event is in Perfetto, in microseconds: long enough for an arrow to begin and end at it, and shorter than the time to the
/// thread's next event.
const STATION_US: f64 = 0.05;

/// Converts records to bytes. Each record is one line.
pub(super) struct Formatter {
    format: Format,
    start: Instant,
    process: u32,
    requests: Requests,
    named: HashSet<u32>,
    /// For each thread that waits for the host's disk: for what, and since when.
    waiting: HashMap<u32, (f64, Fields)>,
}

impl Formatter {
    /// Times count from `start`.
    pub(super) fn new(format: Format, start: Instant) -> Self {
        let (process, requests) = (std::process::id(), Requests::default());
        let (named, waiting) = (HashSet::new(), HashMap::new());
        Self { format, start, process, requests, named, waiting }
    }

    /// The text before the first record.
    pub(super) fn begin(&self, out: &mut Vec<u8>) {
        if self.format == Format::Perfetto {
            let process = self.process;
            let _ = write!(
                out,
                r#"[{{"ph":"M","name":"process_name","pid":{process},"args":{{"name":"minivmm"}}}}"#
            );
        }
    }

    /// The text after the last record. Perfetto also opens a file without it.
    pub(super) fn end(&self, out: &mut Vec<u8>) {
        if self.format == Format::Perfetto {
            out.extend_from_slice(b"\n]\n");
        }
    }

    /// A line which says that this many events are missing.
    pub(super) fn lost(&self, count: u64, out: &mut Vec<u8>) {
        let (time, process) = (micros(self.start.elapsed()), self.process);
        let _ = match self.format {
            Format::Text => writeln!(out, "(events lost: {count})"),
            Format::Json => {
                writeln!(out, r#"{{"time_us":{time:.3},"event":"lost","count":{count}}}"#)
            }
            Format::Perfetto => write!(
                out,
                ",\n{{\"ph\":\"i\",\"s\":\"p\",\"name\":\"events lost: {count}\",\"pid\":{process},\"tid\":{process},\"ts\":{time:.3}}}"
            ),
        };
    }

    /// A record.
    pub(super) fn record(&mut self, record: &Record, out: &mut Vec<u8>) {
        let name = EVENTS[record.event].name;
        let station = self.requests.station(name, record);
        let fields = fields(record, &station);
        match self.format {
            Format::Text => self.text(name, record, &fields, out),
            Format::Json => self.json(name, record, &fields, out),
            Format::Perfetto => {
                self.name_thread(&record.thread, out);
                let (id, time) = (record.thread.id, self.time(record.time));
                match name {
                    "disk_io_begin" => drop(self.waiting.insert(id, (time, fields))),
                    "disk_io_end" => {
                        if let Some((begun, fields)) = self.waiting.remove(&id) {
                            self.slice("disk_io", id, (begun, time - begun), &fields, out);
                        }
                    }
                    _ => {
                        self.slice(name, id, (time, STATION_US), &fields, out);
                        self.arrows(name, record, &station, out);
                    }
                }
            }
        }
    }

    fn time(&self, time: Instant) -> f64 {
        micros(time.saturating_duration_since(self.start))
    }

    fn text(&self, name: &str, record: &Record, fields: &Fields, out: &mut Vec<u8>) {
        let (time, thread) = (self.time(record.time) / 1e6, record.thread.name.as_str());
        let _ = write!(out, "{time:>11.6} {thread:<10} {name}");
        for (name, value) in fields {
            let _ = match value {
                Shown::Number(number) => write!(out, " {name}={number}"),
                Shown::Hex(number) => write!(out, " {name}={number:#x}"),
                Shown::Time(time) => write!(out, " {name}={time:.1}"),
                Shown::Text(text) if text.contains(' ') => write!(out, " {name}={text:?}"),
                Shown::Text(text) => write!(out, " {name}={text}"),
                Shown::Numbers(numbers) => write!(out, " {name}={}", list(numbers)),
            };
        }
        out.push(b'\n');
    }

    fn json(&self, name: &str, record: &Record, fields: &Fields, out: &mut Vec<u8>) {
        let (time, thread) = (self.time(record.time), quoted(record.thread.name.as_str()));
        let id = record.thread.id;
        let _ =
            write!(out, r#"{{"time_us":{time:.3},"thread":{thread},"tid":{id},"event":"{name}""#);
        for (name, value) in fields {
            let _ = write!(out, ",\"{name}\":{}", value.as_json());
        }
        out.extend_from_slice(b"}\n");
    }

    fn name_thread(&mut self, thread: &ThreadId, out: &mut Vec<u8>) {
        if self.named.insert(thread.id) {
            let (process, id, name) = (self.process, thread.id, quoted(thread.name.as_str()));
            let _ = write!(
                out,
                ",\n{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{process},\"tid\":{id},\"args\":{{\"name\":{name}}}}}"
            );
        }
    }

    /// A slice on a thread's track: when it begins, and how long it is.
    fn slice(
        &self,
        name: &str,
        thread: u32,
        (time, length): (f64, f64),
        fields: &Fields,
        out: &mut Vec<u8>,
    ) {
        let (process, category) = (self.process, name.split('_').next().unwrap_or_default());
        let _ = write!(
            out,
            ",\n{{\"ph\":\"X\",\"cat\":\"{category}\",\"name\":\"{name}\",\"pid\":{process},\"tid\":{thread},\"ts\":{time:.3},\"dur\":{length:.3},\"args\":{{"
        );
        for (index, (name, value)) in fields.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(out, "{comma}\"{name}\":{}", value.as_json());
        }
        out.extend_from_slice(b"}}");
    }

    /// A request's arrow from the kick through its events to the interrupt, and its time with the engine as a slice on the track of the
    /// engine.
    fn arrows(&self, name: &str, record: &Record, station: &Station, out: &mut Vec<u8>) {
        let (process, id) = (self.process, record.thread.id);
        let mut arrow = |phase: &str, request: u64, time: Instant| {
            let time = self.time(time) + STATION_US / 2.0;
            let _ = write!(
                out,
                ",\n{{\"ph\":\"{phase}\",\"bp\":\"e\",\"cat\":\"request\",\"name\":\"request\",\"id\":{request},\"pid\":{process},\"tid\":{id},\"ts\":{time:.3}}}"
            );
        };
        for request in &station.interrupts_for {
            arrow("f", *request, record.time);
        }
        let Some(request) = station.request else { return };
        match (name.starts_with("virtio_blk_handle_"), station.kick) {
            (true, Some(kick)) => {
                arrow("s", request, kick);
                arrow("t", request, record.time);
            }
            (true, None) => arrow("s", request, record.time),
            (false, _) => arrow("t", request, record.time),
        }
        let (time, worker) = (self.time(record.time), record.thread.name.as_str());
        let phase = match station.engine {
            Some(EngineSpan::Begins) => "b",
            Some(EngineSpan::Ends) => "e",
            None => return,
        };
        let _ = write!(
            out,
            ",\n{{\"ph\":\"{phase}\",\"cat\":\"engine\",\"name\":\"{worker} engine\",\"id\":{request},\"pid\":{process},\"tid\":{id},\"ts\":{time:.3}}}"
        );
    }
}

enum Shown {
    Number(u64),
    Hex(u64),
    /// Microseconds.
    Time(f64),
    Text(String),
    Numbers(Vec<u64>),
}

impl Shown {
    fn as_json(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            // Beyond 2^53 a number in JSON is not exact everywhere.
            Self::Hex(number) => format!("\"{number:#x}\""),
            Self::Time(time) => format!("{time:.3}"),
            Self::Text(text) => quoted(text),
            Self::Numbers(numbers) => format!("[{}]", list(numbers)),
        }
    }
}

type Fields = Vec<(&'static str, Shown)>;

/// The fields as they are shown: the request's number instead of its descriptor, and what an address means.
fn fields(record: &Record, station: &Station) -> Fields {
    let mut fields: Fields = Vec::new();
    for (name, value) in record.fields() {
        fields.push(match (name, value) {
            ("req", _) => match station.request {
                Some(request) => ("req", Shown::Number(request)),
                // It was taken from its ring while that was not traced.
                None => continue,
            },
            ("message", Value::Text(text)) => ("phase", Shown::Text(text.as_str().to_owned())),
            ("address" | "value", Value::Number(number)) => (name, Shown::Hex(number)),
            (_, Value::Number(number)) => (name, Shown::Number(number)),
            (_, Value::Text(text)) => (name, Shown::Text(text.as_str().to_owned())),
        });
    }
    let is_port = record.text("reason").is_some_and(|reason| reason.starts_with("port"));
    let found = record.number("address").and_then(|address| decode(address, is_port));
    if let Some(Decoded { device, number, register, clause }) = found {
        fields.push(("device", Shown::Text(format!("{device}{number}"))));
        fields.push(("register", Shown::Text(register.to_owned())));
        fields.push(("clause", Shown::Text(clause.to_owned())));
    }
    if !station.interrupts_for.is_empty() {
        fields.push(("reqs", Shown::Numbers(station.interrupts_for.clone())));
    }
    if let Some(since) = station.since {
        fields.push(("since_us", Shown::Time(micros(since))));
    }
    fields
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

fn list(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

//! `minivmm trace-view FILE --svg`: the first requests of a trace (`format=json`) as a picture, for a page or a report.
//!
//! A program of its own, as `minivmm ctl` is: it reads the file line by line, and knows the trace only by the names in it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::Value;

use crate::arguments::parse_as;
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, print_text};

/// Draw the first requests of a trace.
///
/// The trace has to be one of format=json, with the events virtio_*. Exits of the same time are drawn, too, if it has kvm_*.
#[derive(Debug, Parser)]
#[command(name = "minivmm trace-view", max_term_width = 120)]
struct Arguments {
    /// The file that --trace wrote.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Draw an SVG image, to standard output.
    #[arg(long, required = true)]
    svg: bool,

    /// How many requests to draw.
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=100))]
    requests: u16,
}

/// Why a trace cannot be drawn.
#[derive(Debug, thiserror::Error)]
enum ViewError {
    #[error("{0}")]
    File(#[from] std::io::Error),
    #[error("line {0} is no event; record the trace with format=json")]
    Line(usize),
    #[error("it has no request from its ring to its used ring; record 'virtio_*'")]
    NoRequest,
}

/// The stretches of a request's life: until which event, what it is spent on, and its color.
const STRETCHES: [(&str, &str, &str); 5] = [
    ("virtio_blk_handle_", "kick to ring", "#b0b7c3"),
    ("virtio_blk_submit", "to the engine", "#5b8def"),
    ("virtio_blk_rw_complete", "host's disk", "#f2a33a"),
    ("virtio_blk_req_complete", "to the used ring", "#3fa66b"),
    ("virtio_notify", "to the interrupt", "#c95f8f"),
];

/// A request: when each stretch ended, in microseconds, the first of them where the kick came.
struct Life {
    name: String,
    start: f64,
    ends: [Option<f64>; STRETCHES.len()],
}

/// What is drawn.
#[derive(Default)]
struct Trace {
    lives: BTreeMap<u64, Life>,
    /// Exits and interrupts: when, on which thread, and what.
    marks: Vec<(f64, String, String)>,
}

pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { file, requests, .. } = match parse_as("minivmm trace-view", arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    match read(&file, requests.into()) {
        Ok(trace) => ExitCode::from(if print_text(&trace.svg()) { EXIT_CLEAN } else { EXIT_HOST }),
        Err(error) => {
            print_message(&format!("trace-view {}: {error}", file.display()));
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn read(file: &Path, requests: u64) -> Result<Trace, ViewError> {
    let mut trace = Trace::default();
    for (number, line) in (1..).zip(BufReader::new(File::open(file)?).lines()) {
        let event: Value = serde_json::from_str(&line?).map_err(|_| ViewError::Line(number))?;
        let (Some(name), Some(time)) = (event["event"].as_str(), event["time_us"].as_f64()) else {
            return Err(ViewError::Line(number));
        };
        trace.add(name, time, &event, requests);
    }
    trace.lives.retain(|_, life| life.ends[3].is_some());
    if trace.lives.is_empty() { Err(ViewError::NoRequest) } else { Ok(trace) }
}

impl Trace {
    fn add(&mut self, name: &str, time: f64, event: &Value, requests: u64) {
        let stretch = STRETCHES.iter().position(|(until, ..)| name.starts_with(until));
        let text = |field: &str| event[field].as_str().unwrap_or_default();
        match (name, stretch, event["req"].as_u64()) {
            ("kvm_run_exit" | "irq_pulse", ..) => {
                let what = format!("{name} {} {}", text("reason"), text("register"));
                self.marks.push((time, text("thread").to_owned(), what));
            }
            ("virtio_notify", ..) => {
                let interrupted = event["reqs"].as_array().into_iter().flatten();
                for request in interrupted.filter_map(Value::as_u64) {
                    if let Some(life) = self.lives.get_mut(&request) {
                        life.ends[4] = Some(time);
                    }
                }
            }
            (_, Some(0), Some(request)) if (self.lives.len() as u64) < requests => {
                let kind = name.trim_start_matches(STRETCHES[0].0);
                let name = match event["sector"].as_u64() {
                    Some(sector) => format!("{request}: {kind} {sector}"),
                    None => format!("{request}: {kind}"),
                };
                let start = time - event["since_us"].as_f64().unwrap_or(0.0);
                let ends = [Some(time), None, None, None, None];
                self.lives.insert(request, Life { name, start, ends });
            }
            // The engine's transfers have no request, and their name begins as that of a stretch.
            (_, Some(at), Some(request)) if at > 0 => {
                if let Some(life) = self.lives.get_mut(&request) {
                    life.ends[at] = Some(time);
                }
            }
            _ => {}
        }
    }

    fn svg(&self) -> String {
        let scale = Scale::new(self.lives.values());
        let marks: Vec<_> = self.marks.iter().filter(|(time, ..)| scale.has(*time)).collect();
        let mut threads: Vec<&str> = marks.iter().map(|(_, thread, _)| &thread[..]).collect();
        threads.sort_unstable();
        threads.dedup();
        let rows = threads.len() + self.lives.len();
        let height = TOP + ROW * rows as f64 + 40.0;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
            LEFT + WIDTH + 20.0
        );
        scale.draw(&mut out, height - 36.0);
        for (row, thread) in threads.iter().enumerate() {
            let y = TOP + ROW * row as f64;
            label(&mut out, y, thread);
            for (time, _, what) in marks.iter().filter(|(_, of, _)| of == thread) {
                let (at, what) = (scale.x(*time), escaped(what));
                let _ = writeln!(
                    out,
                    "<rect x=\"{at:.1}\" y=\"{:.1}\" width=\"1.5\" height=\"14\" fill=\"#7a5cc9\"><title>{what}</title></rect>",
                    y + 3.0
                );
            }
        }
        for (row, life) in (threads.len()..).zip(self.lives.values()) {
            life.draw(&mut out, TOP + ROW * row as f64, &scale);
        }
        for (index, (_, name, color)) in STRETCHES.iter().enumerate() {
            let (at, y) = (LEFT + 150.0 * index as f64, height - 24.0);
            let _ = writeln!(
                out,
                "<rect x=\"{at}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{color}\"/><text x=\"{}\" y=\"{}\">{name}</text>",
                at + 18.0,
                y + 11.0
            );
        }
        out + "</svg>\n"
    }
}

/// Pixels: of the names on the left, of the time, above the first row, and of a row.
const LEFT: f64 = 150.0;
const WIDTH: f64 = 800.0;
const TOP: f64 = 28.0;
const ROW: f64 = 24.0;
/// Pixels for a time in which no request was under way.
const GAP: f64 = 12.0;

/// Where a time is drawn. Times in which no request was under way are cut out, or requests would be too narrow to be seen.
struct Scale {
    /// In order: from when to when any request was under way.
    busy: Vec<(f64, f64)>,
    /// Pixels for a microsecond.
    zoom: f64,
}

impl Scale {
    fn new<'a>(lives: impl Iterator<Item = &'a Life>) -> Self {
        let whole = |life: &Life| {
            (life.start, life.ends.iter().flatten().copied().fold(life.start, f64::max))
        };
        let mut all: Vec<_> = lives.map(whole).collect();
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        let mut busy: Vec<(f64, f64)> = Vec::new();
        for (start, end) in all {
            match busy.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => busy.push((start, end)),
            }
        }
        let length: f64 = busy.iter().map(|(start, end)| end - start).sum();
        let room = WIDTH - GAP * busy.len().saturating_sub(1) as f64;
        Self { busy, zoom: room.max(WIDTH / 4.0) / length.max(1.0) }
    }

    fn has(&self, time: f64) -> bool {
        self.busy.iter().any(|(start, end)| (start..=end).contains(&&time))
    }

    fn x(&self, time: f64) -> f64 {
        let mut left = LEFT;
        for (start, end) in &self.busy {
            if time <= *end {
                return left + (time - start).max(0.0) * self.zoom;
            }
            left += (end - start) * self.zoom + GAP;
        }
        left - GAP
    }

    /// A line where time is cut out, and how long a tenth of the width takes.
    fn draw(&self, out: &mut String, bottom: f64) {
        for (_, end) in self.busy.iter().rev().skip(1) {
            let at = self.x(*end) + GAP / 2.0;
            let _ = writeln!(
                out,
                "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#b0b7c3\" stroke-dasharray=\"2 3\"/>"
            );
        }
        let (right, time) = (LEFT + WIDTH / 10.0, WIDTH / 10.0 / self.zoom);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"14\" x2=\"{right}\" y2=\"14\" stroke=\"#555555\"/>\
             <text x=\"{}\" y=\"18\" fill=\"#555555\">{time:.0} us; time without requests is cut out</text>",
            right + 8.0
        );
    }
}

impl Life {
    /// A bar of the stretches, one behind the other.
    fn draw(&self, out: &mut String, y: f64, scale: &Scale) {
        label(out, y, &self.name);
        let mut begin = self.start;
        for ((_, name, color), end) in STRETCHES.iter().zip(self.ends) {
            let Some(end) = end else { continue };
            let (left, right, time) = (scale.x(begin), scale.x(end), end - begin);
            // A stretch that is too short to be seen is drawn all the same.
            let _ = writeln!(
                out,
                "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{color}\"><title>{name}: {time:.1} us</title></rect>",
                y + 3.0,
                (right - left).max(0.5)
            );
            begin = end;
        }
    }
}

fn label(out: &mut String, y: f64, text: &str) {
    let (x, y, text) = (LEFT - 10.0, y + 15.0, escaped(text));
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{text}</text>");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

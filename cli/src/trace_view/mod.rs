//! `minivmm trace-view FILE --svg`: the first requests of a trace (`format=json`) as a picture, for a page or a report.
//!
//! It is a program of its own, as `minivmm ctl` is. It reads the file line by line, and refers to trace events only by their names.

#[cfg(test)]
mod fuzz;
pub(crate) mod lines;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::Value;

use crate::arguments::parse_as;
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, print_text};
use crate::svg::Svg;
use lines::LineError;

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

/// Most exits and interrupts in a picture. One with more could not be read.
const MARKS_MAX: usize = 10_000;

/// Why a trace cannot be drawn.
#[derive(Debug, thiserror::Error)]
enum ViewError {
    #[error("{0}")]
    Lines(#[from] LineError),
    #[error("it has no request with its start and its end; record it with --trace 'virtio_*'")]
    NoRequest,
}

/// The phases of a request: the event that ends the phase, what happens in it, and its color.
const STRETCHES: [(&str, &str, &str); 5] = [
    ("virtio_blk_handle_", "kick to ring", "#b0b7c3"),
    ("virtio_blk_submit", "to the engine", "#5b8def"),
    ("virtio_blk_rw_complete", "host's disk", "#f2a33a"),
    ("virtio_blk_req_complete", "to the used ring", "#3fa66b"),
    ("virtio_notify", "to the interrupt", "#c95f8f"),
];

/// A request: the times at which its phases ended, in microseconds. The first time is that of the kick.
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
    marks: VecDeque<(f64, String, String)>,
}

/// The command line's definition, for man pages and completions.
#[allow(dead_code, reason = "an example makes the files that are installed")]
pub(crate) fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { file, requests, .. } = match parse_as("minivmm trace-view", arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    let opened = File::open(&file).map_err(|error| LineError::from(error).into());
    match opened.and_then(|file| read(BufReader::new(file), requests.into())) {
        Ok(trace) => ExitCode::from(if print_text(&trace.svg()) { EXIT_CLEAN } else { EXIT_HOST }),
        Err(error) => {
            print_message(&format!("trace-view {}: {}", file.display(), vmm::WithCauses(&error)));
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// Reads a trace up to its end.
fn read(file: impl BufRead, requests: u64) -> Result<Trace, ViewError> {
    let mut trace = Trace::default();
    lines::each(file, |name, time, event| trace.add(name, time, event, requests))?;
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
                self.mark((time, text("thread").to_owned(), what));
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
                let since = event["since_us"].as_f64().filter(|since| (0.0..=time).contains(since));
                let start = time - since.unwrap_or(0.0);
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

    /// Records an exit or an interrupt. If there are too many, those before the first request are dropped, and then the latest ones.
    fn mark(&mut self, mark: (f64, String, String)) {
        let begin = self.lives.values().map(|life| life.start).fold(f64::INFINITY, f64::min);
        if self.marks.len() == MARKS_MAX {
            if self.marks[0].0 >= begin {
                return;
            }
            self.marks.pop_front();
        }
        self.marks.push_back(mark);
    }

    fn svg(&self) -> String {
        let scale = Scale::new(self.lives.values());
        let marks: Vec<_> = self.marks.iter().filter(|(time, ..)| scale.has(*time)).collect();
        let mut threads: Vec<&str> = marks.iter().map(|(_, thread, _)| &thread[..]).collect();
        threads.sort_unstable();
        threads.dedup();
        let rows = threads.len() + self.lives.len();
        let height = TOP + ROW * rows as f64 + 40.0;
        let mut svg = Svg::new(scale.right() + 20.0, height);
        scale.draw(&mut svg, height - 36.0);
        for (row, thread) in threads.iter().enumerate() {
            let y = TOP + ROW * row as f64;
            label(&mut svg, y, thread);
            for (time, _, what) in marks.iter().filter(|(_, of, _)| of == thread) {
                svg.rect((scale.x(*time), y + 3.0), (1.5, 14.0), "#7a5cc9", what);
            }
        }
        for (row, life) in (threads.len()..).zip(self.lives.values()) {
            life.draw(&mut svg, TOP + ROW * row as f64, &scale);
        }
        for (index, (until, name, color)) in STRETCHES.iter().enumerate() {
            let (at, y) = (LEFT + 150.0 * index as f64, height - 24.0);
            svg.rect((at, y), (12.0, 12.0), color, &format!("until {until}"));
            svg.text((at + 18.0, y + 11.0), "start", TEXT, name);
        }
        svg.finish()
    }
}

const TEXT: &str = "#222222";
const FAINT: &str = "#555555";
/// Pixels: of the names on the left, of the time, above the first row, and of a row.
const LEFT: f64 = 150.0;
const WIDTH: f64 = 800.0;
const TOP: f64 = 28.0;
const ROW: f64 = 24.0;
/// Pixels for a time in which no request was under way.
const GAP: f64 = 12.0;

/// Computes where a time is drawn. Times without a request in flight are cut out, because requests would otherwise be too narrow to be seen.
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

    /// Where the last time is, or the width of the legend if that is more.
    fn right(&self) -> f64 {
        self.busy.last().map_or(0.0, |(_, end)| self.x(*end)).max(LEFT + WIDTH)
    }

    /// A line where time is cut out, and how long a tenth of the width takes.
    fn draw(&self, svg: &mut Svg, bottom: f64) {
        for (_, end) in self.busy.iter().rev().skip(1) {
            let at = self.x(*end) + GAP / 2.0;
            svg.line((at, TOP), (at, bottom), "#b0b7c3", "2 3");
        }
        let (right, time) = (LEFT + WIDTH / 10.0, WIDTH / 10.0 / self.zoom);
        let words = format!("{time:.0} us; time without requests is cut out");
        svg.line((LEFT, 14.0), (right, 14.0), FAINT, "none");
        svg.text((right + 8.0, 18.0), "start", FAINT, &words);
    }
}

impl Life {
    /// A bar of a request's phases, one after the other.
    fn draw(&self, svg: &mut Svg, y: f64, scale: &Scale) {
        label(svg, y, &self.name);
        let mut begin = self.start;
        for ((_, name, color), end) in STRETCHES.iter().zip(self.ends) {
            let Some(end) = end else { continue };
            let (left, right, time) = (scale.x(begin), scale.x(end), end - begin);
            // A stretch that is too short to be seen is drawn all the same.
            let size = ((right - left).max(0.5), 14.0);
            svg.rect((left, y + 3.0), size, color, &format!("{name}: {time:.1} us"));
            begin = end;
        }
    }
}

fn label(svg: &mut Svg, y: f64, text: &str) {
    svg.text((LEFT - 10.0, y + 15.0), "end", TEXT, text);
}

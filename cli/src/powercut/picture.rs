//! `--picture`: the log as a timeline in SVG, with the cuts that fail, and what is missing at each.
//!
//! Time is counted in entries of the log, as in `history`. The upper part has all of the log: a dot for each write at its place on the disk,
//! a line for each flush. Below, each failing state of the report has a panel with a row for each write around its cut.

use std::collections::HashSet;

use super::choice::Presence;
use super::history::{Change, History, Walk};
use super::judge::Failure;
use crate::svg::Svg;

/// Pixels: of the names on the left, of the time, of a row, and of the picture of the whole log.
const LEFT: f64 = 230.0;
const WIDTH: f64 = 760.0;
const ROW: f64 = 18.0;
const WHOLE: f64 = 130.0;
/// The size of a dot. Dots of one place are drawn once, so that the picture of a long log has no more elements than it has places.
const DOT: f64 = 3.0;
const OPEN_MAX: usize = 40;
const AROUND: usize = 4;

const TEXT: &str = "#222222";
const FAINT: &str = "#b0b7c3";
const FLUSH: &str = "#3fa66b";
const CUT: &str = "#d62f2f";
const COLORS: [(&str, &str); 5] = [
    ("durable", "#8a93a3"),
    ("there, not durable", "#5b8def"),
    ("torn", "#f2a33a"),
    ("missing", CUT),
    ("after the cut", "#e3e7ee"),
];

pub(super) fn draw(title: &str, history: &History, failures: &[(Failure, usize)]) -> String {
    let panels: Vec<_> = failures.iter().map(|(failure, _)| Panel::new(history, failure)).collect();
    let heights = panels.iter().map(Panel::height).sum::<f64>();
    let mut svg = Svg::new(LEFT + WIDTH + 30.0, 80.0 + WHOLE + heights);
    svg.text((10.0, 20.0), "start", TEXT, title);
    for (index, (name, color)) in COLORS.iter().enumerate() {
        let x = LEFT + 136.0 * index as f64;
        svg.rect((x, 30.0), (12.0, 12.0), color, name);
        svg.text((x + 18.0, 41.0), "start", TEXT, name);
    }
    svg.line((LEFT + 680.0, 36.0), (LEFT + 704.0, 36.0), FLUSH, "4 2");
    svg.text((LEFT + 710.0, 41.0), "start", TEXT, "flush");
    whole(&mut svg, 56.0, history, failures);
    let mut y = 76.0 + WHOLE;
    for panel in &panels {
        panel.draw(&mut svg, y, history);
        y += panel.height();
    }
    svg.finish()
}

struct Scale {
    first: u64,
    last: u64,
}

impl Scale {
    fn x(&self, entry: u64) -> f64 {
        let span = (self.last - self.first).max(1) as f64;
        LEFT + entry.clamp(self.first, self.last).saturating_sub(self.first) as f64 / span * WIDTH
    }

    fn has(&self, entry: u64) -> bool {
        (self.first..=self.last).contains(&entry)
    }

    /// Lines where flushes end, each pixel once.
    fn flushes(&self, svg: &mut Svg, history: &History, (top, bottom): (f64, f64)) {
        let mut drawn = HashSet::new();
        for (_, done) in history.flush_spans().filter(|(_, done)| self.has(*done)) {
            let x = self.x(done);
            if drawn.insert(x as u64) {
                svg.line((x, top), (x, bottom), FLUSH, "4 2");
            }
        }
    }

    fn cut(&self, svg: &mut Svg, entry: u64, (top, bottom): (f64, f64), title: &str) {
        svg.rect((self.x(entry) - 1.0, top), (2.0, bottom - top), CUT, title);
    }
}

/// All of the log: writes by their place on the disk, from sector 0 at the top.
fn whole(svg: &mut Svg, top: f64, history: &History, failures: &[(Failure, usize)]) {
    let last = history.entries_at(history.epochs() - 1);
    let scale = Scale { first: 0, last };
    let sectors = history.changes.iter().map(|change| change.sector + change.sectors).max();
    let sectors = sectors.unwrap_or(1).max(1);
    let bottom = top + WHOLE;
    svg.text((LEFT - 10.0, top + 12.0), "end", TEXT, "sector 0");
    svg.text((LEFT - 10.0, bottom), "end", TEXT, &format!("sector {sectors}"));
    svg.text((LEFT, bottom + 14.0), "start", TEXT, "entry 0");
    svg.text((LEFT + WIDTH, bottom + 14.0), "end", TEXT, &format!("entry {last}"));
    scale.flushes(svg, history, (top, bottom));
    for (failure, _) in failures {
        let entry = history.entries_at(failure.choice.epoch);
        scale.cut(svg, entry, (top - 4.0, bottom), &format!("{} fails", failure.choice));
    }
    let mut drawn = HashSet::new();
    for change in &history.changes {
        let y = change.sector as f64 / sectors as f64 * (WHOLE - DOT);
        let at = (scale.x(change.entry) - DOT / 2.0, top + y);
        if drawn.insert(((at.0 / DOT) as u64, (y / DOT) as u64)) {
            svg.rect(at, (DOT, DOT), COLORS[1].1, &describe(change));
        }
    }
}

/// A failing state: the writes around its cut, each with its place in [`COLORS`].
struct Panel {
    title: String,
    cut: u64,
    rows: Vec<(Change, usize)>,
    /// Open writes that have no row, since there are more than [`OPEN_MAX`]: those that are on the medium and farthest from the cut.
    hidden: usize,
}

impl Panel {
    fn new(history: &History, failure: &Failure) -> Self {
        let choice = &failure.choice;
        let mut walk = Walk::new(history);
        while walk.epoch < choice.epoch {
            walk.step(history);
        }
        let open = walk.open(history);
        let parts = choice.parts.iter().map(|part| match part {
            Presence::Whole => 1,
            Presence::Torn(_) => 2,
            Presence::Absent => 3,
        });
        let mut states: Vec<_> = open.iter().copied().zip(parts).collect();
        // Those that are missing matter most, then those near the cut.
        states.sort_by_key(|(index, state)| (*state == 1, std::cmp::Reverse(*index)));
        let hidden = states.split_off(states.len().min(OPEN_MAX)).len();
        let cut = history.entries_at(choice.epoch);
        let is_open = |index: &usize| open.binary_search(index).is_ok();
        let end = history.changes.partition_point(|change| change.entry < cut);
        let before = (0..end).rev().filter(|index| !is_open(index)).take(AROUND);
        let after = (end..history.changes.len()).filter(|index| !is_open(index)).take(AROUND);
        states.extend(before.map(|index| (index, 0)));
        states.extend(after.map(|index| (index, 4)));
        states.sort_unstable();
        let row = |(index, state): (usize, usize)| (history.changes[index].clone(), state);
        Self {
            title: format!("state {choice}: the power is cut after entry {cut}"),
            cut,
            rows: states.into_iter().map(row).collect(),
            hidden,
        }
    }

    fn height(&self) -> f64 {
        ROW * self.rows.len() as f64 + 56.0
    }

    fn draw(&self, svg: &mut Svg, top: f64, history: &History) {
        let entries = || self.rows.iter().flat_map(|(change, _)| [change.begun, change.entry]);
        let scale = Scale {
            first: entries().chain([self.cut]).min().unwrap_or(0),
            last: entries().chain([self.cut]).max().unwrap_or(0) + 1,
        };
        let mut title = self.title.clone();
        if title.len() > 140 {
            let end = (0..=140).rev().find(|at| title.is_char_boundary(*at)).unwrap_or(0);
            title.truncate(end);
            title += "...";
        }
        if self.hidden > 0 {
            title += &format!(" ({} more writes are there, not durable)", self.hidden);
        }
        svg.text((10.0, top + 20.0), "start", TEXT, &title);
        let rows = top + 30.0;
        let bottom = rows + ROW * self.rows.len() as f64;
        svg.line((LEFT, bottom), (LEFT + WIDTH, bottom), FAINT, "none");
        scale.flushes(svg, history, (rows, bottom));
        for (row, (change, state)) in self.rows.iter().enumerate() {
            let y = rows + ROW * row as f64;
            let (name, color) = COLORS[*state];
            let words = describe(change);
            svg.text((LEFT - 10.0, y + 13.0), "end", TEXT, &words);
            let (begin, end) = (scale.x(change.begun), scale.x(change.entry + 1));
            let size = ((end - begin).max(DOT), ROW - 6.0);
            svg.rect((begin, y + 3.0), size, color, &format!("{words}: {name}"));
        }
        scale.cut(svg, self.cut, (rows - 4.0, bottom + 4.0), "the power is cut");
        svg.text((scale.x(self.cut), bottom + 16.0), "middle", CUT, "power cut");
    }
}

fn describe(change: &Change) -> String {
    let Change { entry, sector, sectors, data, .. } = change;
    let what = if data.is_some() { "" } else { ", zeroes" };
    format!("{entry}: sectors {sector} to {}{what}", sector + sectors - 1)
}

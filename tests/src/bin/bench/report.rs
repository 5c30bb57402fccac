//! All parts of a run as tables, one file and one picture; and beside an earlier run.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use crate::counters::EVENTS;
use crate::results::{Results, directory};
use crate::table::{self, Target};
use crate::{chart, clones, guests, native, options, saved, scale};

/// What the parts save.
const PARTS: [&str; 7] = [
    "driver.json",
    "native.json",
    options::PART,
    saved::PART,
    scale::PART,
    guests::PART,
    clones::PART,
];
const ALL: &str = "results.json";

/// Shows the parts that there are, and keeps them as one; the run before becomes the one to compare with.
pub(crate) fn run() {
    let directory = directory();
    let mut results: Option<Results> = None;
    for part in PARTS.map(|part| directory.join(part)).into_iter().filter(|part| part.exists()) {
        let part = Results::load(&part);
        match &mut results {
            Some(results) => results.merge(part),
            None => results = Some(part),
        }
    }
    let results = results.expect("nothing has been measured yet");
    let all = directory.join(ALL);
    if all.exists() {
        fs::rename(&all, directory.join("previous.json")).unwrap();
    }
    results.save(&all);
    show(&results);
    let picture = directory.join("results.svg");
    fs::write(&picture, chart::draw(&results)).unwrap();
    println!("\nSaved as {} and {}", all.display(), picture.display());
}

/// Holds the last run against the one at `old`. Fails if something of minivmm's is worse by more than both runs' spread.
pub(crate) fn compare(old: &Path) -> ExitCode {
    let worse = table::compare(&Results::load(old), &Results::load(&directory().join(ALL)));
    println!("{worse} of minivmm's are worse");
    if worse == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show(results: &Results) {
    results.machine.iter().for_each(|(name, value)| println!("{name}: {value}"));
    for group in results.distinct(|key| Some(&key.group)) {
        let in_group = |of: &dyn Fn(&str) -> bool| {
            results.distinct(|key| (key.group == group && of(&key.system)).then_some(&key.system))
        };
        // Ours first, and the host at the end.
        let mut systems = in_group(&|system| !system.contains("host") && !system.contains("fio"));
        systems.extend(in_group(&|system| system.contains("host") || system.contains("fio")));
        for metric in results.distinct(|key| (key.group == group).then_some(&key.metric)) {
            table::print(results, group, metric, &systems, |row| target(group, metric, row));
        }
    }
}

/// What the first system has to reach, and whether that is its ratio to QEMU's best.
fn target(group: &str, metric: &str, row: &str) -> Option<(Target, bool)> {
    if group == native::group("in memory") {
        return native::target(row)
            .filter(|_| [native::IOPS, "ms", "KiB"].contains(&metric))
            .map(|target| (target, false));
    }
    if let Some(target) = saved::target(group, row) {
        return Some((target, false));
    }
    if group.starts_with("driver") {
        return driver_target(metric, row).map(|target| (target, false));
    }
    if row.starts_with("PSS") {
        return Some((Target::AtMost(3072.0), false));
    }
    let single = !row.contains("jobs");
    let exits = match (metric, row) {
        (metric, _) if metric == EVENTS[1].0 => Some(0.005),
        // None for a request; the guest's timers cause some.
        (metric, row) if metric == EVENTS[0].0 && row.ends_with(", polled") => Some(0.05),
        (metric, "4k random read, depth 1" | "4k random write, depth 1")
            if metric == EVENTS[0].0 =>
        {
            Some(2.5)
        }
        (metric, "4k random read, depth 32" | "4k random write, depth 32")
            if metric == EVENTS[0].0 =>
        {
            Some(0.2)
        }
        _ => None,
    };
    if let Some(limit) = exits.filter(|_| single) {
        return Some((Target::AtMost(limit), false));
    }
    let ratio = match row {
        _ if metric != guests::IOPS => return None,
        "4k random read, depth 1" | "4k random write, depth 1" => 2.5,
        "4k random read, depth 32" | "4k random write, depth 32" => 2.5,
        "128k read, depth 4" | "128k write, depth 4" => 2.0,
        _ => 1.0,
    };
    Some((Target::AtLeast(ratio), true))
}

/// The driver in its own process against fio's io_uring engine.
fn driver_target(metric: &str, row: &str) -> Option<Target> {
    match metric {
        "ratio to fio" if row.ends_with("depth 32") => Some(Target::AtLeast(0.95)),
        "us added to fio's" if row.ends_with("depth 1") => Some(Target::AtMost(3.0)),
        "allocations a request" => Some(Target::AtMost(0.0)),
        _ => None,
    }
}

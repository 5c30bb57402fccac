//! `--explain=svg`: the guest-physical memory and the threads of a machine as a picture.
//!
//! Addresses are not to scale, since tables of 40 bytes and RAM of gigabytes would not fit on one page. One row is from an address at
//! which something begins or ends to the next.

use vmm::{Explanation, Part, Region};

use crate::svg::Svg;

const TEXT: &str = "#222222";
const FAINT: &str = "#777777";
/// Where the columns are: addresses end at the first, and the parts of the memory begin at the others.
const ADDRESSES: f64 = 130.0;
const PARTS: [(Part, f64, &str); 3] = [
    (Part::Map, 145.0, "#cfe3ff"),
    (Part::Content, 315.0, "#ffe2b8"),
    (Part::Registers, 485.0, "#d8f0d8"),
];
const PART_WIDTH: f64 = 160.0;
const THREADS: f64 = 690.0;
const THREAD_WIDTH: f64 = 420.0;
/// Where the rows begin, and how high they are.
const TOP: f64 = 56.0;
const ROW: f64 = 18.0;
/// A thread's color, by its kind.
const KINDS: [(&str, &str); 6] = [
    ("main", "#e6d9f7"),
    ("vcpu", "#f7d4e4"),
    ("disk", "#d8f0d8"),
    ("disk-io", "#e6efc9"),
    ("console", "#ffe2b8"),
    ("registers", "#cfe3ff"),
];
const OTHER_KIND: &str = "#e6e6e6";

pub(crate) fn draw(machine: &Explanation) -> String {
    let ends = |region: &Region| [region.start, region.start.saturating_add(region.length)];
    let mut addresses: Vec<u64> = machine.regions.iter().flat_map(ends).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let row = |address: u64| addresses.partition_point(|at| *at < address) as f64;
    let rows = addresses.len().max(machine.threads.len() + 1) as f64;
    let mut svg = Svg::new(THREADS + THREAD_WIDTH + 20.0, TOP + ROW * rows + 30.0);
    let summary = machine.text.lines().next().unwrap_or_default();
    svg.text((15.0, 20.0), "start", TEXT, summary);
    for (part, x, _) in PARTS {
        svg.text((x, TOP - 10.0), "start", FAINT, part.title());
    }
    svg.text((THREADS, TOP - 10.0), "start", FAINT, "threads");
    for (address, y) in addresses.iter().zip(0..).map(|(at, row)| (at, TOP + ROW * f64::from(row)))
    {
        svg.line((ADDRESSES + 5.0, y), (PARTS[2].1 + PART_WIDTH, y), "#dddddd", "2 3");
        svg.text((ADDRESSES, y + 4.0), "end", FAINT, &format!("{address:#x}"));
    }
    for region in &machine.regions {
        let Some((_, x, color)) = PARTS.iter().find(|(part, ..)| *part == region.part) else {
            continue;
        };
        let [top, bottom] = ends(region).map(|address| TOP + ROW * row(address));
        svg.rect((*x, top + 0.5), (PART_WIDTH, bottom - top - 1.0), color, &region.to_string());
        svg.text((x + 6.0, top + 13.5), "start", TEXT, &region.name);
    }
    for (thread, row) in machine.threads.iter().zip(0..) {
        let y = TOP + ROW * f64::from(row);
        let kind = thread.purpose.split(':').next().unwrap_or_default();
        let color = KINDS.iter().find(|(name, _)| *name == kind).map_or(OTHER_KIND, |(_, at)| at);
        let words = format!("{}: {}", thread.name, thread.purpose);
        svg.rect((THREADS, y + 0.5), (THREAD_WIDTH, ROW - 1.0), color, &words);
        svg.text((THREADS + 6.0, y + 13.5), "start", TEXT, &thread.name);
        svg.text((THREADS + 110.0, y + 13.5), "start", TEXT, thread.purpose);
    }
    let bottom = TOP + ROW * rows + 14.0;
    svg.text((15.0, bottom), "start", FAINT, "Addresses are guest-physical, and not to scale.");
    svg.finish()
}

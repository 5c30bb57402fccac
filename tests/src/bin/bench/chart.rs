//! The rates as bars, in one SVG: a row for each workload, the longest bar of each row as long as the picture allows.

use std::fmt::Write;

use crate::results::{Key, Results};
use crate::table::number;
use crate::{driver, guests, native};

const LABEL: f64 = 260.0;
const BAR: f64 = 480.0;
const WIDTH: f64 = LABEL + BAR + 140.0;
const THICKNESS: f64 = 13.0;
const COLOURS: [&str; 5] = ["#1f77b4", "#d62728", "#ff9896", "#7f7f7f", "#bcbd22"];

pub(crate) fn draw(results: &Results) -> String {
    let systems = results.distinct(|key| rate(key).then_some(&key.system));
    let mut body = String::new();
    let mut y = 24.0;
    for (system, (number, colour)) in systems.iter().zip((0..).zip(COLOURS.iter().cycle())) {
        let x = 10.0 + 150.0 * f64::from(number);
        body += &format!("<rect x='{x}' y='{}' width='10' height='10' fill='{colour}'/>", y - 9.0);
        text(&mut body, x + 14.0, y, "start", system);
    }
    for group in results.distinct(|key| rate(key).then_some(&key.group)) {
        y += 34.0;
        let metric = results
            .keys()
            .find(|key| key.group == group && rate(key))
            .map_or("", |key| &key.metric);
        text(&mut body, 10.0, y, "start", &format!("{group}: {metric}"));
        y += 8.0;
        for row in results.distinct(|key| (key.group == group && rate(key)).then_some(&key.row)) {
            let bars: Vec<_> = systems
                .iter()
                .zip(COLOURS.iter().cycle())
                .filter_map(|(system, colour)| {
                    Some((results.get(&Key::new(group, row, system, metric))?, colour))
                })
                .collect();
            let longest = bars.iter().map(|((median, _), _)| *median).fold(0.0, f64::max);
            text(&mut body, LABEL - 8.0, y + 11.0, "end", row);
            for ((median, spread), colour) in bars {
                let width = if longest > 0.0 { median / longest * BAR } else { 0.0 };
                write!(
                    body,
                    "<rect x='{LABEL}' y='{y}' width='{width:.1}' height='{}' fill='{colour}'/>",
                    THICKNESS - 2.0
                )
                .unwrap();
                text(
                    &mut body,
                    LABEL + width + 6.0,
                    y + 10.0,
                    "start",
                    &format!("{} ±{spread:.0}%", number(median)),
                );
                y += THICKNESS;
            }
            y += 7.0;
        }
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{h}' viewBox='0 0 {WIDTH} {h}' \
         font-family='sans-serif' font-size='12'><rect width='100%' height='100%' fill='white'/>{body}</svg>\n",
        h = y + 20.0
    )
}

/// A rate: more is better.
fn rate(key: &Key) -> bool {
    [driver::RATE, native::IOPS, guests::IOPS].contains(&key.metric.as_str())
}

fn text(body: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    write!(body, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}'>{words}</text>").unwrap();
}

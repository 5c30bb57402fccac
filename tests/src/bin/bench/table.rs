//! Results as text, and beside those of an earlier run.

use crate::results::{Key, Results};

/// What the host can do at best, as a system; and an earlier minivmm.
pub(crate) const LIMIT: &str = "the host's limit";
pub(crate) const BEFORE: &str = "before";

/// Where a target bounds a measurement.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    /// The bound, and whether `value` keeps it.
    fn judge(self, value: f64) -> String {
        let (sign, bound, met) = match self {
            Self::AtLeast(bound) => (">=", bound, value >= bound),
            Self::AtMost(bound) => ("<=", bound, value <= bound),
        };
        format!("{sign}{bound}{}", if met { " met" } else { " MISSED" })
    }
}

/// One table: the systems side by side, and the first one's ratio to the best of QEMU's, to the host's limit, and to the
/// earlier minivmm. `target` tells, for a row, what the first system has to reach; with a flag whether that is for the ratio.
pub(crate) fn print(
    results: &Results,
    group: &str,
    metric: &str,
    systems: &[&str],
    target: impl Fn(&str) -> Option<(Target, bool)>,
) {
    let rows =
        results.distinct(|key| (key.group == group && key.metric == metric).then_some(&key.row));
    if rows.is_empty() {
        return;
    }
    println!("\n{group}: {metric}");
    print!("{:<34}", "");
    systems.iter().for_each(|system| print!("{system:>22}"));
    println!("{:>9}{:>10}{:>10}  target", "ratio", "of limit", "before");
    for row in rows {
        print!("{row:<34}");
        let value = |system: &str| results.get(&Key::new(group, row, system, metric));
        for system in systems {
            match value(system) {
                Some((median, spread)) => {
                    print!("{:>22}", format!("{} (±{spread:.0}%)", number(median)))
                }
                None => print!("{:>22}", "-"),
            }
        }
        let ratio = ratio(results, group, row, metric, systems);
        print!("{:>9}", ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
        let ours = systems.first().and_then(|system| value(system)).map(|(median, _)| median);
        for (system, width) in [(LIMIT, 10), (BEFORE, 10)] {
            let share = ours.zip(value(system)).map(|(ours, (other, _))| ours / other);
            print!("{:>width$}", share.map_or("-".to_owned(), |share| format!("{share:.2}")));
        }
        let judged = target(row).and_then(|(target, of_ratio)| {
            Some(target.judge(if of_ratio { ratio? } else { ours? }))
        });
        println!("  {}", judged.unwrap_or_default());
    }
}

/// The first system's value over the best of QEMU's.
fn ratio(results: &Results, group: &str, row: &str, metric: &str, systems: &[&str]) -> Option<f64> {
    let value = |system: &str| Some(results.get(&Key::new(group, row, system, metric))?.0);
    let rivals = systems
        .iter()
        .filter(|system| system.starts_with("microvm"))
        .filter_map(|system| value(system));
    let best = if is_better_larger(metric) {
        rivals.max_by(f64::total_cmp)
    } else {
        rivals.min_by(f64::total_cmp)
    };
    Some(value(systems.first()?)? / best?)
}

/// Three significant digits.
pub(crate) fn number(value: f64) -> String {
    let decimals = if value.abs() >= 100.0 || value == 0.0 {
        0
    } else {
        (2 - value.abs().log10().floor() as i32).clamp(0, 3) as usize
    };
    format!("{value:.decimals$}")
}

/// Prints what differs from an earlier run by more than both runs' spreads. Returns how many of minivmm's quantities are worse.
pub(crate) fn compare(old: &Results, new: &Results) -> u32 {
    for (name, value) in &new.machine {
        let before = old.machine.get(name).map_or("unknown", String::as_str);
        if before != value {
            println!("{name}: was {before}, is {value}");
        }
    }
    println!(
        "{:<22} {:<34} {:<18} {:<28} {:>10} {:>10} {:>8}",
        "", "", "", "", "before", "now", "change"
    );
    let (mut same, mut worse) = (0, 0);
    for key in new.keys() {
        let (Some((before, spread)), Some((now, noise))) = (old.get(key), new.get(key)) else {
            continue;
        };
        let change = (now / before - 1.0) * 100.0;
        if before == now || change.abs() <= spread + noise {
            same += 1;
            continue;
        }
        let Key { group, row, system, metric } = key;
        worse += u32::from(system == "minivmm" && (change > 0.0) != is_better_larger(metric));
        let (before, now) = (number(before), number(now));
        println!(
            "{group:<22} {row:<34} {system:<18} {metric:<28} {before:>10} {now:>10} {change:>+7.0}%"
        );
    }
    println!("{same} others are the same within their spread");
    worse
}

/// Rates and ratios; everything else is a cost.
fn is_better_larger(metric: &str) -> bool {
    metric.contains("a second") || metric.contains("ratio")
}

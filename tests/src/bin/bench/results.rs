//! What was measured, as one flat list: that is what is saved, compared, shown as a table and drawn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// Everything that one run measured.
pub(crate) struct Results {
    /// On what: names and values.
    pub(crate) machine: BTreeMap<String, String>,
    list: Vec<Measurement>,
}

/// One quantity of one system, once for each repetition.
struct Measurement {
    key: Key,
    values: Vec<f64>,
}

/// What was measured of whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// The part of the benchmark, and where the file lay.
    pub(crate) group: String,
    /// The workload.
    pub(crate) row: String,
    /// Who did it.
    pub(crate) system: String,
    /// The quantity and its unit.
    pub(crate) metric: String,
}

impl Key {
    pub(crate) fn new(group: &str, row: &str, system: &str, metric: &str) -> Self {
        Self { group: group.into(), row: row.into(), system: system.into(), metric: metric.into() }
    }
}

impl Results {
    pub(crate) fn new() -> Self {
        Self { machine: machine(), list: Vec::new() }
    }

    /// Adds a repetition's value. What is not a number was not measured.
    pub(crate) fn add(&mut self, key: Key, value: f64) {
        if !value.is_finite() {
            return;
        }
        match self.list.iter_mut().find(|measurement| measurement.key == key) {
            Some(measurement) => measurement.values.push(value),
            None => self.list.push(Measurement { key, values: vec![value] }),
        }
    }

    /// The middle value, and half the distance between the extremes in percent of it.
    pub(crate) fn get(&self, key: &Key) -> Option<(f64, f64)> {
        let mut sorted =
            self.list.iter().find(|measurement| measurement.key == *key)?.values.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2];
        let spread = (sorted.last()? - sorted.first()?) / 2.0;
        Some((median, if spread == 0.0 { 0.0 } else { spread / median.abs() * 100.0 }))
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.list.iter().map(|measurement| &measurement.key)
    }

    /// The different values of a part of the keys that `select` gives, in the order of their first appearance.
    pub(crate) fn distinct<'a>(
        &'a self,
        select: impl Fn(&'a Key) -> Option<&'a str>,
    ) -> Vec<&'a str> {
        let mut found = Vec::new();
        for value in self.keys().filter_map(select) {
            if !found.contains(&value) {
                found.push(value);
            }
        }
        found
    }

    /// Takes over what another part of the benchmark measured.
    pub(crate) fn merge(&mut self, other: Self) {
        self.machine.extend(other.machine);
        self.list.extend(other.list);
    }

    pub(crate) fn save(&self, path: &Path) {
        let entry = |Measurement { key, values }: &Measurement| json!({ "group": key.group, "row": key.row, "system": key.system, "metric": key.metric, "values": values });
        let list: Vec<Value> = self.list.iter().map(entry).collect();
        let text =
            serde_json::to_string_pretty(&json!({ "machine": self.machine, "measurements": list }))
                .unwrap();
        std::fs::write(path, text).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
    }

    pub(crate) fn load(path: &Path) -> Self {
        let text = std::fs::read(path).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        let value: Value =
            serde_json::from_slice(&text).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let machine = value["machine"].as_object().into_iter().flatten();
        let list =
            value["measurements"].as_array().into_iter().flatten().map(|entry| Measurement {
                key: Key {
                    group: text(&entry["group"]),
                    row: text(&entry["row"]),
                    system: text(&entry["system"]),
                    metric: text(&entry["metric"]),
                },
                values: entry["values"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_f64)
                    .collect(),
            });
        Self {
            machine: machine.map(|(name, value)| (name.clone(), text(value))).collect(),
            list: list.filter(|measurement| !measurement.values.is_empty()).collect(),
        }
    }
}

/// Where results go.
pub(crate) fn directory() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let directory = target.join("bench");
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

fn machine() -> BTreeMap<String, String> {
    let first_line = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().ok()?;
        String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
    };
    let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu_info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let lab = if std::env::var_os("MINIVMM_LAB").is_some() { " in the lab" } else { "" };
    let facts = [
        ("processor", Some(model.trim_start_matches([':', '\t', ' ']).to_owned())),
        (
            "processors",
            Some(cpu_info.lines().filter(|line| line.starts_with("processor")).count().to_string()),
        ),
        ("kernel", first_line("uname", "-r")),
        ("qemu", first_line("qemu-system-x86_64", "--version")),
        ("fio", first_line("fio", "--version")),
    ];
    facts.into_iter().filter_map(|(name, value)| Some((format!("{name}{lab}"), value?))).collect()
}

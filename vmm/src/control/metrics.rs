//! The machine's counters in Prometheus' text format (version 0.0.4), for `x-query-metrics`.
//!
//! A capability: only the table in `commands` refers to it.

use std::fmt::Write;

use devices::block::{BlockHandle, Kind};
use serde_json::{Value, json};

use crate::machine::{Machine, RunState};

const KINDS: [(Kind, &str); 7] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Flush, "flush"),
    (Kind::Discard, "discard"),
    (Kind::WriteZeroes, "write_zeroes"),
    (Kind::SecureErase, "secure_erase"),
    (Kind::Other, "other"),
];

/// All metrics, as QEMU's HumanReadableText.
pub(super) fn query(machine: &Machine) -> Value {
    let mut page = Page::default();
    page.family("minivmm_running", "gauge", "1 while the guest runs");
    page.sample("minivmm_running", "", u64::from(machine.state() == RunState::Running));
    page.family("minivmm_vcpu_exits_total", "counter", "exits to user space");
    for (index, vcpu) in machine.hardware.vcpus.iter().enumerate() {
        for (reason, count) in vcpu.exits.by_reason() {
            page.sample(
                "minivmm_vcpu_exits_total",
                &format!("vcpu=\"{index}\",reason=\"{reason}\""),
                count,
            );
        }
    }
    let disks: Vec<_> =
        machine.hardware.disks.iter().map(|disk| (label(&disk.config.id), &disk.handle)).collect();
    by_kind(&mut page, &disks);
    by_disk(&mut page, &disks);
    latencies(&mut page, &disks);
    json!({ "human-readable-text": page.0 })
}

fn by_kind(page: &mut Page, disks: &[(String, &BlockHandle)]) {
    type Count = fn(&devices::block::KindStats) -> String;
    let families: [(&str, &str, Count); 6] = [
        ("operations", "requests that succeeded", |stats| stats.operations.to_string()),
        ("bytes", "bytes of disk in these requests", |stats| stats.bytes.to_string()),
        ("merged", "of these requests, those merged into the transfer of another one", |stats| {
            stats.merged.to_string()
        }),
        ("errors", "requests that failed with a host error", |stats| stats.errors.to_string()),
        ("invalid", "requests that were refused as invalid", |stats| stats.invalid.to_string()),
        ("seconds", "time from the available ring to the used ring", |stats| {
            stats.time.as_secs_f64().to_string()
        }),
    ];
    for (name, help, count) in families {
        let name = format!("minivmm_disk_{name}_total");
        page.family(&name, "counter", help);
        for (disk, handle) in disks {
            let stats = handle.stats();
            for (kind, word) in KINDS {
                page.sample(
                    &name,
                    &format!("disk=\"{disk}\",kind=\"{word}\""),
                    count(stats.kind(kind)),
                );
            }
        }
    }
}

fn by_disk(page: &mut Page, disks: &[(String, &BlockHandle)]) {
    type Count = fn(&devices::block::BlockStats) -> u64;
    let families: [(&str, &str, Count); 3] = [
        ("interrupts", "interrupts raised for used rings", |stats| stats.interrupts),
        ("unanswerable", "chains without a byte for the status", |stats| stats.unanswerable),
        ("broken_rings", "rings that the driver corrupted", |stats| stats.broken_rings),
    ];
    for (name, help, count) in families {
        let name = format!("minivmm_disk_{name}_total");
        page.family(&name, "counter", help);
        for (disk, handle) in disks {
            page.sample(&name, &format!("disk=\"{disk}\""), count(&handle.stats()));
        }
    }
}

/// The histograms that `block-latency-histogram-set` has set. In this format each bucket includes those below it.
fn latencies(page: &mut Page, disks: &[(String, &BlockHandle)]) {
    const NAME: &str = "minivmm_disk_latency_seconds";
    page.family(
        NAME,
        "histogram",
        "time from the available ring to the used ring, since the bins were set",
    );
    for (disk, handle) in disks {
        for (kind, word) in &KINDS[..3] {
            let Some(histogram) = handle.histogram(*kind) else { continue };
            let mut sum = 0;
            let ends = histogram.boundaries.iter().map(|end| (*end as f64 / 1e9).to_string());
            for (end, count) in ends.chain(["+Inf".to_owned()]).zip(&histogram.bins) {
                sum += count;
                let labels = format!("disk=\"{disk}\",kind=\"{word}\",le=\"{end}\"");
                page.sample(&format!("{NAME}_bucket"), &labels, sum);
            }
            page.sample(&format!("{NAME}_count"), &format!("disk=\"{disk}\",kind=\"{word}\""), sum);
        }
    }
}

/// Escapes a label's value. The user chooses a disk's name, which may have any characters.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing into a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        };
    }
}

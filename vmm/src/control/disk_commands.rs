//! The QMP commands about disks: their arguments and functions, for the table in `commands`.
//!
//! Limits, thresholds and histograms take effect at once. A resize is answered when its job is done.

use devices::block::{
    BlockHandle, ErrorPolicy, Histogram, IoStatus, Kind, KindStats, Limit, Rate, Throttling,
};
use devices::disk::BackingImage;
use serde_json::{Value, json};

use super::arguments::{Argument, ArgumentKind, Arguments, optional, required};
use super::protocol::{Answer, Failure};
use crate::machine::{Machine, MachineDisk};

pub(super) const BLOCKSTATS: &[Argument] = &[optional("query-nodes", ArgumentKind::Boolean)];
pub(super) const NODES: &[Argument] = &[optional("flat", ArgumentKind::Boolean)];
pub(super) const RESIZE: &[Argument] = &[
    optional("device", ArgumentKind::Text),
    optional("node-name", ArgumentKind::Text),
    required("size", ArgumentKind::Integer),
];
pub(super) const HISTOGRAM: &[Argument] = &[
    required("id", ArgumentKind::Text),
    optional("boundaries", ArgumentKind::Integers),
    optional("boundaries-read", ArgumentKind::Integers),
    optional("boundaries-write", ArgumentKind::Integers),
    optional("boundaries-flush", ArgumentKind::Integers),
];
pub(super) const WRITE_THRESHOLD: &[Argument] = &[
    required("node-name", ArgumentKind::Text),
    required("write-threshold", ArgumentKind::Integer),
];
pub(super) const EJECT: &[Argument] = &[
    optional("device", ArgumentKind::Text),
    optional("id", ArgumentKind::Text),
    optional("force", ArgumentKind::Boolean),
];
pub(super) const CHANGE_MEDIUM: &[Argument] = &[
    optional("device", ArgumentKind::Text),
    optional("id", ArgumentKind::Text),
    required("filename", ArgumentKind::Text),
    optional("format", ArgumentKind::Text),
    optional("force", ArgumentKind::Boolean),
    optional("read-only-mode", ArgumentKind::Text),
];
pub(super) const THROTTLE: &[Argument] = &[
    optional("device", ArgumentKind::Text),
    optional("id", ArgumentKind::Text),
    required("bps", ArgumentKind::Integer),
    required("bps_rd", ArgumentKind::Integer),
    required("bps_wr", ArgumentKind::Integer),
    required("iops", ArgumentKind::Integer),
    required("iops_rd", ArgumentKind::Integer),
    required("iops_wr", ArgumentKind::Integer),
    optional("bps_max", ArgumentKind::Integer),
    optional("bps_rd_max", ArgumentKind::Integer),
    optional("bps_wr_max", ArgumentKind::Integer),
    optional("iops_max", ArgumentKind::Integer),
    optional("iops_rd_max", ArgumentKind::Integer),
    optional("iops_wr_max", ArgumentKind::Integer),
    optional("bps_max_length", ArgumentKind::Integer),
    optional("bps_rd_max_length", ArgumentKind::Integer),
    optional("bps_wr_max_length", ArgumentKind::Integer),
    optional("iops_max_length", ArgumentKind::Integer),
    optional("iops_rd_max_length", ArgumentKind::Integer),
    optional("iops_wr_max_length", ArgumentKind::Integer),
    optional("iops_size", ArgumentKind::Integer),
    optional("group", ArgumentKind::Text),
];

/// Finds a disk by its `id=`, by the path of that id in QEMU's object tree (`/machine/peripheral/ID`), or by the guest's name (`vda`).
pub(super) fn find<'a>(machine: &'a Machine, name: &str) -> Result<&'a MachineDisk, Failure> {
    let id = name.strip_prefix("/machine/peripheral/").unwrap_or(name);
    let disks = &machine.hardware.disks;
    let by_id = disks.iter().find(|disk| disk.config.id == id);
    // The guest's name comes last, because `vda` may be the id of another disk.
    let found = by_id.or_else(|| disks.iter().find(|disk| disk.handle.name() == name));
    found.ok_or_else(|| Failure::device_not_found(name))
}

/// `block_resize`: gives the disk another size, and tells the guest's driver.
pub(super) fn resize(machine: &mut Machine, arguments: &Arguments<'_>) -> Result<Answer, Failure> {
    // As in QEMU: `device` is tried first, and then `node-name`.
    let (device, node) = (arguments.text("device"), arguments.text("node-name"));
    let disk = match (device.map(|name| find(machine, name)), node.map(|name| find(machine, name)))
    {
        (Some(Ok(disk)), _) | (_, Some(Ok(disk))) => disk,
        (Some(Err(failure)), _) | (_, Some(Err(failure))) => return Err(failure),
        (None, None) => return Err(Failure::generic("Need one of 'device' and 'node-name'")),
    };
    let size = arguments.integer("size").unwrap_or_default();
    let id = disk.config.id.clone();
    machine.resize(&id, size).map(Answer::WhenDone).ok_or_else(|| Failure::device_not_found(&id))
}

/// `block-set-write-threshold`: one event when the guest next changes the disk past this offset. 0 turns it off.
pub(super) fn set_write_threshold(
    machine: &mut Machine,
    arguments: &Arguments<'_>,
) -> Result<Answer, Failure> {
    let disk = find(machine, arguments.text("node-name").unwrap_or_default())?;
    disk.handle
        .set_write_threshold(arguments.integer("write-threshold").filter(|offset| *offset > 0));
    Ok(Answer::empty())
}

/// `eject` and `blockdev-change-medium`: always refused. As in QEMU, a virtio disk has no removable medium.
pub(super) fn change_medium(
    machine: &mut Machine,
    arguments: &Arguments<'_>,
) -> Result<Answer, Failure> {
    let id = &device_or_id(machine, arguments)?.config.id;
    Err(Failure::generic(format!("Device '{id}' is not removable")))
}

/// The disk that exactly one of `device` and `id` names.
fn device_or_id<'a>(
    machine: &'a Machine,
    arguments: &Arguments<'_>,
) -> Result<&'a MachineDisk, Failure> {
    let ((Some(name), None) | (None, Some(name))) =
        (arguments.text("device"), arguments.text("id"))
    else {
        return Err(Failure::generic("Need exactly one of 'device' and 'id'"));
    };
    find(machine, name)
}

/// `block_set_io_throttle`: replaces all limits of the disk's group, or of another group to which the disk moves. A limit that is not
/// named is removed. A disk without limits is in no group.
pub(super) fn throttle(
    machine: &mut Machine,
    arguments: &Arguments<'_>,
) -> Result<Answer, Failure> {
    let disk = device_or_id(machine, arguments)?;
    let integer = |name: String| arguments.integer(&name);
    let rates = Limit::ALL.map(|limit| {
        let name = limit.qmp();
        Rate {
            average: integer(name.to_owned()).unwrap_or_default(),
            max: integer(format!("{name}_max")).unwrap_or_default(),
            max_length: integer(format!("{name}_max_length")).unwrap_or(1),
        }
    });
    let operation_size = arguments.integer("iops_size").unwrap_or_default();
    let group = arguments.text("group").map(str::to_owned);
    let limits = Throttling { rates, operation_size, group };
    let disks = machine.hardware.disks.iter().map(|disk| &disk.handle);
    disk.handle
        .set_throttling(limits, &disk.config.id, disks)
        .map_err(|error| Failure::of(&error))?;
    Ok(Answer::empty())
}

/// `block-latency-histogram-set`: `boundaries-KIND` sets the bins of one kind of request, and `boundaries` those of the other kinds.
/// Without any boundaries, all histograms are removed.
pub(super) fn set_histogram(
    machine: &mut Machine,
    arguments: &Arguments<'_>,
) -> Result<Answer, Failure> {
    let disk = find(machine, arguments.text("id").unwrap_or_default())?;
    let all = arguments.integers("boundaries");
    let own = HISTOGRAMS.map(|(_, name)| arguments.integers(&format!("boundaries-{name}")));
    let remove = all.is_none() && own.iter().all(Option::is_none);
    let mut wanted = Vec::new();
    for ((kind, _), own) in HISTOGRAMS.into_iter().zip(own) {
        if let Some(boundaries) = own.or_else(|| all.clone()) {
            let histogram = Histogram::new(boundaries);
            wanted.push((
                kind,
                histogram.ok_or_else(|| {
                    Failure::generic("Boundaries must ascend, and not begin at 0")
                })?,
            ));
        }
    }
    if remove {
        HISTOGRAMS.iter().for_each(|(kind, _)| disk.handle.set_histogram(*kind, None));
    }
    wanted.iter().for_each(|(kind, histogram)| disk.handle.set_histogram(*kind, Some(histogram)));
    Ok(Answer::empty())
}

/// The kinds of request with histograms, and their names in arguments.
const HISTOGRAMS: [(Kind, &str); 3] =
    [(Kind::Read, "read"), (Kind::Write, "write"), (Kind::Flush, "flush")];

pub(super) fn query_block(machine: &Machine) -> Value {
    machine.hardware.disks.iter().map(block_info).collect()
}

/// `query-named-block-nodes`: each disk is one node.
pub(super) fn query_nodes(machine: &Machine) -> Value {
    machine.hardware.disks.iter().map(node_info).collect()
}

fn node_info(disk: &MachineDisk) -> Value {
    let MachineDisk { config, handle, image, .. } = disk;
    let path = config.image.path.to_string_lossy();
    let (cache, below) = (config.image.cache, &image.info().backing_images);
    let mut inserted = json!({
        "node-name": config.id,
        "file": path,
        "drv": config.image.format.unwrap_or_default().to_string(),
        "ro": image.info().read_only,
        "backing_file_depth": below.len(),
        "encrypted": false,
        "detect_zeroes": config.image.detect_zeroes.to_string(),
        "cache": { "writeback": handle.write_cache(), "direct": cache.direct(), "no-flush": cache.ignores_flush() },
        "write_threshold": handle.write_threshold().unwrap_or_default(),
        "image": {
            "filename": path,
            "format": config.image.format.unwrap_or_default().to_string(),
            "virtual-size": image.capacity(),
            "actual-size": image.allocated(),
            "dirty-flag": false,
        },
    });
    name_backing(&mut inserted["image"], below);
    if let Some(nearest) = below.first() {
        inserted["backing_file"] = nearest.path.to_string_lossy().into();
    }
    let throttling = handle.throttling();
    for (limit, Rate { average, max, max_length }) in Limit::ALL.into_iter().zip(throttling.rates) {
        let name = limit.qmp();
        inserted[name] = average.into();
        if max > 0 {
            inserted[format!("{name}_max")] = max.into();
            inserted[format!("{name}_max_length")] = max_length.into();
        }
    }
    if throttling.operation_size > 0 {
        inserted["iops_size"] = throttling.operation_size.into();
    }
    if let Some(group) = throttling.group {
        inserted["group"] = group.into();
    }
    inserted
}

/// Adds the backing images `below` to the description of `image`. Each is a member of the image that builds on it. The length of a chain is
/// limited when it is opened.
fn name_backing(image: &mut Value, below: &[BackingImage]) {
    let mut above = image;
    for BackingImage { path, format, capacity, allocated } in below {
        let path = path.to_string_lossy();
        above["backing-filename"] = path.as_ref().into();
        above["full-backing-filename"] = path.as_ref().into();
        above["backing-filename-format"] = format.to_string().into();
        above["backing-image"] = json!({
            "filename": path,
            "format": format.to_string(),
            "virtual-size": capacity,
            "actual-size": allocated,
            "dirty-flag": false,
        });
        above = &mut above["backing-image"];
    }
}

fn block_info(disk: &MachineDisk) -> Value {
    let MachineDisk { config, handle, .. } = disk;
    let mut info = json!({
        "device": config.id,
        "qdev": config.id,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "inserted": node_info(disk),
    });
    // As in QEMU: a disk whose errors never stop the VM has no `io-status`.
    let stops = |policy| matches!(policy, ErrorPolicy::Stop | ErrorPolicy::Enospc);
    if stops(config.device.read_errors) || stops(config.device.write_errors) {
        info["io-status"] = match handle.io_status() {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
        .into();
    }
    info
}

/// `query-blockstats`, of devices or (`query-nodes`) of block nodes. Each disk is one node, so the numbers are the same.
pub(super) fn query_blockstats(machine: &Machine, arguments: &Arguments<'_>) -> Value {
    let of_nodes = arguments.boolean("query-nodes").unwrap_or_default();
    let stats = |MachineDisk { config, handle, .. }: &MachineDisk| {
        let mut stats = json!({ "node-name": config.id, "stats": device_stats(handle) });
        if !of_nodes {
            stats["device"] = config.id.as_str().into();
            stats["qdev"] = config.id.as_str().into();
        }
        stats
    };
    machine.hardware.disks.iter().map(stats).collect()
}

/// QEMU counts four kinds of request: write-zeroes are writes, and secure erases are unmaps.
fn device_stats(handle: &BlockHandle) -> Value {
    let stats = handle.stats();
    let sum = |kinds: &[Kind]| {
        kinds.iter().map(|kind| stats.kind(*kind)).fold(KindStats::default(), |sum, kind| {
            KindStats {
                operations: sum.operations + kind.operations,
                bytes: sum.bytes + kind.bytes,
                merged: sum.merged + kind.merged,
                errors: sum.errors + kind.errors,
                invalid: sum.invalid + kind.invalid,
                time: sum.time + kind.time,
            }
        })
    };
    let kinds = [
        ("rd", sum(&[Kind::Read])),
        ("wr", sum(&[Kind::Write, Kind::WriteZeroes])),
        ("flush", sum(&[Kind::Flush])),
        ("unmap", sum(&[Kind::Discard, Kind::SecureErase])),
    ];
    let mut all = json!({
        "account_invalid": true,
        "account_failed": true,
        "timed_stats": [],
        "wr_highest_offset": stats.highest_write,
    });
    for ((kind, _), name) in HISTOGRAMS.into_iter().zip(["rd", "wr", "flush"]) {
        if let Some(Histogram { boundaries, bins }) = handle.histogram(kind) {
            all[format!("{name}_latency_histogram")] =
                json!({ "boundaries": boundaries, "bins": bins });
        }
    }
    for (name, kind) in kinds {
        all[format!("{name}_operations")] = kind.operations.into();
        all[format!("{name}_total_time_ns")] =
            u64::try_from(kind.time.as_nanos()).unwrap_or(u64::MAX).into();
        all[format!("failed_{name}_operations")] = kind.errors.into();
        all[format!("invalid_{name}_operations")] = kind.invalid.into();
        if name != "flush" {
            all[format!("{name}_bytes")] = kind.bytes.into();
            all[format!("{name}_merged")] = kind.merged.into();
        }
    }
    all
}

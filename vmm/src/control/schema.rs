//! The schema of what is implemented, for `query-qmp-schema` (QEMU, qapi/introspect.json). The types of commands come from their table in
//! `commands`. Those of results and events are here, and tests compare real messages with them.

use serde_json::{Value, json};

use super::arguments::{Argument, ArgumentKind};
use super::event_messages::REASONS;
use super::trace_commands::STATES;

/// A command's name, arguments and result type. Requests are checked against the same value that `query-qmp-schema`
/// shows, so that the two cannot differ.
pub(super) struct CommandTypes {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [Argument],
    /// The type of its result; empty for none.
    pub(super) returns: &'static str,
}

/// Objects: a name, and members `name:type` of which those with `?` may be absent. `[type]` is a list.
const OBJECTS: &[(&str, &str)] = &[
    ("VersionInfo", "qemu:VersionTriple package:str"),
    ("VersionTriple", "major:int minor:int micro:int"),
    ("CommandInfo", "name:str"),
    ("EventInfo", "name:str"),
    ("SchemaInfo", "name:str meta-type:str"),
    ("StatusInfo", "running:bool status:RunState"),
    (
        "CpuInfoFast",
        "cpu-index:int qom-path:str thread-id:int target:str props:CpuInstanceProperties",
    ),
    ("CpuInstanceProperties", "socket-id:int core-id:int thread-id:int"),
    ("HumanReadableText", "human-readable-text:str"),
    ("NameInfo", "name?:str"),
    ("UuidInfo", "UUID:str"),
    ("GuidInfo", "guid:str"),
    ("KvmInfo", "enabled:bool present:bool"),
    (
        "MachineInfo",
        "name:str is-default?:bool cpu-max:int hotpluggable-cpus:bool numa-mem-supported:bool deprecated:bool acpi:bool",
    ),
    ("IOThreadInfo", "id:str thread-id:int"),
    ("BlockJobInfo", "type:str device:str len:int offset:int busy:bool paused:bool speed:int"),
    ("JobInfo", "id:str type:str status:str current-progress:int total-progress:int"),
    ("ChardevInfo", "label:str filename:str frontend-open:bool"),
    ("TraceEventInfo", "name:str state:TraceEventState vcpu:bool"),
    ("MemoryInfo", "base-memory:int plugged-memory:int"),
    (
        "BlockInfo",
        "device:str qdev?:str type:str removable:bool locked:bool inserted?:BlockDeviceInfo io-status?:BlockDeviceIoStatus",
    ),
    (
        "BlockDeviceInfo",
        "node-name:str file:str drv:str ro:bool backing_file?:str backing_file_depth:int encrypted:bool detect_zeroes:str \
         cache:BlockdevCacheInfo write_threshold:int image:ImageInfo bps:int bps_rd:int bps_wr:int iops:int iops_rd:int \
         iops_wr:int bps_max?:int bps_rd_max?:int bps_wr_max?:int iops_max?:int iops_rd_max?:int iops_wr_max?:int \
         bps_max_length?:int bps_rd_max_length?:int bps_wr_max_length?:int iops_max_length?:int \
         iops_rd_max_length?:int iops_wr_max_length?:int iops_size?:int group?:str",
    ),
    ("BlockdevCacheInfo", "writeback:bool direct:bool no-flush:bool"),
    (
        "ImageInfo",
        "filename:str format:str virtual-size:int actual-size:int dirty-flag:bool backing-filename?:str \
         full-backing-filename?:str backing-filename-format?:str backing-image?:ImageInfo",
    ),
    ("BlockStats", "device?:str node-name?:str qdev?:str stats:BlockDeviceStats"),
    (
        "BlockDeviceStats",
        "account_invalid:bool account_failed:bool timed_stats:[any] wr_highest_offset:int \
         rd_operations:int rd_total_time_ns:int failed_rd_operations:int invalid_rd_operations:int rd_bytes:int \
         rd_merged:int wr_operations:int wr_total_time_ns:int failed_wr_operations:int invalid_wr_operations:int \
         wr_bytes:int wr_merged:int flush_operations:int flush_total_time_ns:int failed_flush_operations:int \
         invalid_flush_operations:int unmap_operations:int unmap_total_time_ns:int failed_unmap_operations:int \
         invalid_unmap_operations:int unmap_bytes:int unmap_merged:int \
         rd_latency_histogram?:BlockLatencyHistogramInfo wr_latency_histogram?:BlockLatencyHistogramInfo \
         flush_latency_histogram?:BlockLatencyHistogramInfo",
    ),
    ("BlockLatencyHistogramInfo", "boundaries:[int] bins:[int]"),
    ("FaultId", "id:int"),
    ("FaultInfo", "device:str rules:[FaultRuleInfo]"),
    ("FaultRuleInfo", "id:int rule:str seen:int hits:int"),
    ("ShutdownData", "guest:bool reason:ShutdownCause"),
    ("PanicData", "action:GuestPanicAction"),
    (
        "BlockIoErrorData",
        "device:str node-name:str operation:IoOperationType action:BlockErrorAction nospace:bool reason:str",
    ),
    ("ImageCorruptedData", "device:str node-name:str msg:str offset:int size:int fatal:bool"),
    ("WriteThresholdData", "node-name:str amount-exceeded:int write-threshold:int"),
    ("CapabilitiesData", "enable?:[str]"),
    (
        "MigrationInfo",
        "status?:MigrationStatus ram?:MigrationStats total-time?:int downtime?:int error-desc?:str",
    ),
    (
        "MigrationStats",
        "transferred:int remaining:int total:int duplicate:int normal:int normal-bytes:int page-size:int",
    ),
    ("MigrationCapabilityStatus", "capability:MigrationCapability state:bool"),
    ("MigrationData", "status:MigrationStatus"),
];

const RUN_STATES: &[&str] = &[
    "prelaunch",
    "running",
    "paused",
    "io-error",
    "inmigrate",
    "finish-migrate",
    "postmigrate",
    "shutdown",
];

/// The statuses of a save, in QEMU's order.
pub(super) const STATUSES: [&str; 7] =
    ["none", "setup", "active", "completed", "failed", "cancelling", "cancelled"];
pub(super) const CAPABILITY_NAMES: [&str; 4] =
    ["events", "mapped-ram", "background-snapshot", "x-minivmm-incremental"];

const ENUMS: &[(&str, &[&str])] = &[
    ("RunState", RUN_STATES),
    ("BlockDeviceIoStatus", &["ok", "failed", "nospace"]),
    ("ShutdownCause", &REASONS),
    ("GuestPanicAction", &["poweroff", "run"]),
    ("IoOperationType", &["read", "write"]),
    ("BlockErrorAction", &["report", "ignore", "stop"]),
    ("TraceEventState", &STATES),
    ("MigrationStatus", &STATUSES),
    ("MigrationCapability", &CAPABILITY_NAMES),
];

/// Events and the types of their data.
const EVENTS: &[(&str, &str)] = &[
    ("STOP", ""),
    ("RESUME", ""),
    ("POWERDOWN", ""),
    ("SHUTDOWN", "ShutdownData"),
    ("RESET", "ShutdownData"),
    ("GUEST_PANICKED", "PanicData"),
    ("GUEST_CRASHLOADED", "PanicData"),
    ("BLOCK_IO_ERROR", "BlockIoErrorData"),
    ("BLOCK_IMAGE_CORRUPTED", "ImageCorruptedData"),
    ("BLOCK_WRITE_THRESHOLD", "WriteThresholdData"),
    ("MIGRATION", "MigrationData"),
];

const CAPABILITIES: &str = "qmp_capabilities";
/// The type of a command's arguments or result, or of an event's data, without members.
const EMPTY: &str = "Empty";

pub(super) fn command_names<'a>(commands: impl Iterator<Item = &'a CommandTypes>) -> Value {
    names(std::iter::once(CAPABILITIES).chain(commands.map(|command| command.name)))
}

pub(super) fn event_names() -> Value {
    names(EVENTS.iter().map(|(name, _)| *name))
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Value {
    names.map(|name| json!({ "name": name })).collect()
}

/// The members of an object type: name, type, and whether it may be absent.
fn members(text: &str) -> impl Iterator<Item = (&str, &str, bool)> {
    text.split_whitespace().filter_map(|member| {
        let (name, kind) = member.split_once(':')?;
        Some(name.strip_suffix('?').map_or((name, kind, false), |name| (name, kind, true)))
    })
}

fn or_empty(name: &str) -> &str {
    if name.is_empty() { EMPTY } else { name }
}

fn argument_type(command: &str) -> String {
    format!("{command}-arg")
}

fn member(name: &str, kind: &str, optional: bool) -> Value {
    if optional {
        json!({ "name": name, "type": kind, "default": null })
    } else {
        json!({ "name": name, "type": kind })
    }
}

fn object(name: &str, members: Vec<Value>) -> Value {
    json!({ "name": name, "meta-type": "object", "members": members })
}

pub(super) fn schema<'a>(commands: impl Iterator<Item = &'a CommandTypes>) -> Value {
    let mut all = vec![object(EMPTY, Vec::new())];
    let command = |name: &str, takes: &str, returns: &str| json!({ "name": name, "meta-type": "command", "arg-type": takes, "ret-type": or_empty(returns) });
    all.push(command(CAPABILITIES, "CapabilitiesData", ""));
    for entry in commands {
        let takes =
            if entry.arguments.is_empty() { EMPTY.to_owned() } else { argument_type(entry.name) };
        all.push(command(entry.name, &takes, entry.returns));
        if !entry.arguments.is_empty() {
            let members = entry.arguments.iter().map(|argument| {
                let kind = match argument.kind {
                    ArgumentKind::Text => "str",
                    ArgumentKind::Integer => "int",
                    ArgumentKind::Boolean => "bool",
                    ArgumentKind::Integers => "[int]",
                    ArgumentKind::Any => "any",
                };
                member(argument.name, kind, !argument.required)
            });
            all.push(object(&takes, members.collect()));
        }
    }
    for (name, data) in EVENTS {
        all.push(json!({ "name": name, "meta-type": "event", "arg-type": or_empty(data) }));
    }
    for (name, text) in OBJECTS {
        all.push(object(
            name,
            members(text).map(|(name, kind, optional)| member(name, kind, optional)).collect(),
        ));
    }
    for (name, words) in ENUMS {
        let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
        all.push(json!({ "name": name, "meta-type": "enum", "members": members, "values": words }));
    }
    for (name, kind) in [
        ("str", "string"),
        ("int", "int"),
        ("number", "number"),
        ("bool", "boolean"),
        ("any", "value"),
    ] {
        all.push(json!({ "name": name, "meta-type": "builtin", "json-type": kind }));
    }
    for name in lists(&all) {
        all.push(json!({ "name": name, "meta-type": "array", "element-type": name.trim_matches(['[', ']']) }));
    }
    Value::Array(all)
}

/// The list types to which members and results refer.
fn lists(all: &[Value]) -> Vec<String> {
    let of_members = all
        .iter()
        .filter_map(|entry| entry["members"].as_array())
        .flatten()
        .map(|member| &member["type"]);
    let of_commands = all.iter().map(|entry| &entry["ret-type"]);
    let mut names: Vec<String> = of_members
        .chain(of_commands)
        .filter_map(Value::as_str)
        .filter(|name| name.starts_with('['))
        .map(Into::into)
        .collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use devices::block::{BlockEvent, ErrorAction, Kind};
    use devices::disk::{Corruption, DiskError};

    use super::*;
    use crate::control::arguments::optional;
    use crate::control::event_messages::message;
    use crate::machine::{MachineEvent, Outcome};

    /// Panics where `value` is not of type `kind`.
    fn conforms(value: &Value, kind: &str) {
        if let Some(element) = kind.strip_prefix('[').and_then(|kind| kind.strip_suffix(']')) {
            return value.as_array().unwrap().iter().for_each(|value| conforms(value, element));
        }
        if let Some((_, words)) = ENUMS.iter().find(|(name, _)| *name == kind) {
            assert!(words.contains(&value.as_str().unwrap()), "{kind}: {value}");
            return;
        }
        match kind {
            "str" => assert!(value.is_string(), "{value}"),
            "int" => assert!(value.is_u64() || value.is_i64(), "{value}"),
            "number" => assert!(value.is_number(), "{value}"),
            "bool" => assert!(value.is_boolean(), "{value}"),
            "any" => {}
            "" => assert!(value.is_null(), "{value}"),
            _ => {
                let (_, text) = OBJECTS
                    .iter()
                    .find(|(name, _)| *name == kind)
                    .unwrap_or_else(|| panic!("no type {kind}"));
                let object = value.as_object().unwrap();
                for (name, kind, optional) in members(text) {
                    match object.get(name) {
                        Some(value) => conforms(value, kind),
                        None => assert!(optional, "{name} is missing in {value}"),
                    }
                }
                let known: HashSet<_> = members(text).map(|(name, ..)| name).collect();
                assert!(object.keys().all(|name| known.contains(name.as_str())), "{kind}: {value}");
            }
        }
    }

    #[test]
    fn every_type_is_defined_once() {
        const ARGUMENTS: &[Argument] = &[optional("sizes", ArgumentKind::Integers)];
        let command =
            CommandTypes { name: "command", arguments: ARGUMENTS, returns: "[BlockStats]" };
        let schema = schema([command].iter());
        let entries = schema.as_array().unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        let defined: HashSet<_> = names.iter().copied().collect();
        assert_eq!(names.len(), defined.len(), "a name is defined twice");
        for entry in entries {
            for key in ["arg-type", "ret-type", "element-type"] {
                assert!(
                    entry.get(key).is_none_or(|name| defined.contains(name.as_str().unwrap())),
                    "{entry}"
                );
            }
            for member in entry["members"].as_array().into_iter().flatten() {
                assert!(
                    member.get("type").is_none_or(|name| defined.contains(name.as_str().unwrap())),
                    "{entry}"
                );
            }
        }
    }

    #[test]
    fn events_are_as_described() {
        let io_error = |operation, action| {
            MachineEvent::Disk(BlockEvent::IoError {
                device: "vda".to_owned(),
                operation,
                action,
                error: DiskError::NoSpace,
            })
        };
        let threshold =
            BlockEvent::WriteThreshold { device: "vda".to_owned(), exceeded: 1, threshold: 512 };
        let damage = Corruption { message: "damaged".to_owned(), range: 0..512 };
        let events = [
            MachineEvent::Stop,
            MachineEvent::Resume,
            MachineEvent::Powerdown,
            MachineEvent::Shutdown(Some(Outcome::Timeout)),
            MachineEvent::Reset { by_guest: true },
            MachineEvent::GuestPanicked,
            MachineEvent::GuestCrashloaded,
            MachineEvent::Disk(threshold),
            MachineEvent::ImageCorrupted("vda".to_owned(), damage),
            io_error(Kind::Read, ErrorAction::Stop),
            io_error(Kind::Flush, ErrorAction::Report),
        ];
        for event in events {
            let message = message(&event).unwrap();
            let name = message["event"].as_str().unwrap();
            let (_, kind) = EVENTS.iter().find(|(known, _)| *known == name).unwrap();
            conforms(&message["data"], kind);
        }
    }
}

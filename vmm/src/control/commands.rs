//! The table of commands, with QEMU's names, arguments and results. The functions of commands about disks, faults and traces are in
//! modules of their own, and the commands about saving in `migration`.

use arch::layout::POWER_BUTTON_GSI;
use serde_json::{Map, Value, json};

use super::arguments::{Argument, Arguments};
use super::disk_commands as disks;
use super::fault_commands as faults;
use super::metrics;
use super::migration::{self, Migration};
use super::protocol::{Answer, Failure, version};
use super::schema::{self, CommandTypes};
use super::trace_commands as trace;
use crate::attach;
use crate::error::Error;
use crate::machine::{Machine, MachineEvent, Outcome, RunState};

struct CommandRow {
    types: CommandTypes,
    run: fn(&mut Machine, &Arguments<'_>) -> Result<Answer, Failure>,
}

const fn command(
    name: &'static str,
    arguments: &'static [Argument],
    returns: &'static str,
    run: fn(&mut Machine, &Arguments<'_>) -> Result<Answer, Failure>,
) -> CommandRow {
    CommandRow { types: CommandTypes { name, arguments, returns }, run }
}

/// A command that only reads the machine's state.
macro_rules! query {
    ($name:literal, $arguments:expr, $returns:literal, $query:expr) => {
        command($name, $arguments, $returns, |machine, arguments| {
            let query: fn(&Machine, &Arguments<'_>) -> Value = $query;
            Ok(Answer::Now(query(machine, arguments)))
        })
    };
}

/// The commands, except for `qmp_capabilities` (which [`Client`](super::client::Client) executes) and those in `migration`.
const COMMANDS: &[CommandRow] = &[
    query!("query-version", &[], "VersionInfo", |_, _| version()),
    query!("query-commands", &[], "[CommandInfo]", |_, _| names()),
    query!("query-events", &[], "[EventInfo]", |_, _| schema::event_names()),
    query!("query-qmp-schema", &[], "[SchemaInfo]", |_, _| schema::schema(types())),
    query!("query-status", &[], "StatusInfo", |machine, _| query_status(machine)),
    command("stop", &[], "", |machine, _| {
        Ok(machine.stop(RunState::Paused).map_or_else(Answer::empty, Answer::WhenDone))
    }),
    command("cont", &[], "", |machine, _| done(machine.resume())),
    command("system_reset", &[], "", |machine, _| {
        machine.reset().map(Answer::WhenDone).map_err(|error| Failure::of(&error))
    }),
    command("system_powerdown", &[], "", |machine, _| done(power_down(machine))),
    command("quit", &[], "", |machine, _| {
        machine.end(Ok(Outcome::ControlQuit));
        Ok(Answer::empty())
    }),
    query!("query-cpus-fast", &[], "[CpuInfoFast]", |machine, _| query_cpus_fast(machine)),
    query!("query-memory-size-summary", &[], "MemoryInfo", |machine, _| {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let bytes: u64 = machine.hardware.memory.iter().map(GuestMemoryRegion::len).sum();
        json!({ "base-memory": bytes, "plugged-memory": 0 })
    }),
    // Queries that QEMU's clients send first. Their answers are the same for every machine.
    query!("query-name", &[], "NameInfo", |_, _| json!({})),
    query!("query-uuid", &[], "UuidInfo", |_, _| {
        json!({ "UUID": "00000000-0000-0000-0000-000000000000" })
    }),
    query!("query-kvm", &[], "KvmInfo", |_, _| json!({ "enabled": true, "present": true })),
    query!("query-machines", &[], "[MachineInfo]", |_, _| {
        json!([{
            "name": "minivmm", "is-default": true, "cpu-max": arch::layout::CPUS_MAX, "acpi": true,
            "hotpluggable-cpus": false, "numa-mem-supported": false, "deprecated": false,
        }])
    }),
    query!("query-iothreads", &[], "[IOThreadInfo]", |_, _| json!([])),
    query!("query-block-jobs", &[], "[BlockJobInfo]", |_, _| json!([])),
    query!("query-jobs", &[], "[JobInfo]", |_, _| json!([])),
    query!("query-chardev", &[], "[ChardevInfo]", |_, _| trace::query_chardev()),
    command("trace-event-get-state", trace::GET_STATE, "[TraceEventInfo]", trace::get_state),
    command("trace-event-set-state", trace::SET_STATE, "", trace::set_state),
    query!("query-block", &[], "[BlockInfo]", |machine, _| disks::query_block(machine)),
    query!("query-named-block-nodes", disks::NODES, "[BlockDeviceInfo]", |machine, _| {
        disks::query_nodes(machine)
    }),
    query!("query-blockstats", disks::BLOCKSTATS, "[BlockStats]", disks::query_blockstats),
    query!("x-query-metrics", &[], "HumanReadableText", |machine, _| metrics::query(machine)),
    command("block_resize", disks::RESIZE, "", disks::resize),
    command("block_set_io_throttle", disks::THROTTLE, "", disks::throttle),
    command("eject", disks::EJECT, "", disks::change_medium),
    command("blockdev-change-medium", disks::CHANGE_MEDIUM, "", disks::change_medium),
    command("block-set-write-threshold", disks::WRITE_THRESHOLD, "", disks::set_write_threshold),
    command("block-latency-histogram-set", disks::HISTOGRAM, "", disks::set_histogram),
    command("x-minivmm-fault-add", faults::ADD, "FaultId", faults::add),
    command("x-minivmm-fault-remove", faults::REMOVE, "", faults::remove),
    query!("x-minivmm-query-faults", &[], "[FaultInfo]", |machine, _| faults::query(machine)),
];

fn types() -> impl Iterator<Item = &'static CommandTypes> {
    let migration = migration::COMMANDS.iter().map(|command| &command.types);
    COMMANDS.iter().map(|command| &command.types).chain(migration)
}

/// The arguments of the command `name`.
#[cfg(test)]
pub(super) fn arguments_of(name: &str) -> Option<&'static [Argument]> {
    types().find(|types| types.name == name).map(|types| types.arguments)
}

/// The answer to `query-commands`.
pub(super) fn names() -> Value {
    schema::command_names(types())
}

/// Executes a command.
///
/// # Errors
/// There is no command of this name, its arguments are wrong, or it failed.
pub(super) fn execute(
    machine: &mut Machine,
    migration: &mut Migration,
    name: &str,
    arguments: &Map<String, Value>,
) -> Result<Answer, Failure> {
    if let Some(answer) = migration.execute(machine, name, arguments) {
        return answer;
    }
    let command = COMMANDS.iter().find(|command| command.types.name == name);
    let not_found = || Failure::command_not_found(format!("The command {name} has not been found"));
    let command = command.ok_or_else(not_found)?;
    let arguments = Arguments::check(command.types.arguments, arguments)?;
    tracing::debug!(command = name, "control");
    (command.run)(machine, &arguments)
}

fn done(result: Result<(), Error>) -> Result<Answer, Failure> {
    result.map(|()| Answer::empty()).map_err(|error| Failure::of(&error))
}

/// Presses the ACPI power button.
fn power_down(machine: &mut Machine) -> Result<(), Error> {
    let button = attach::line(&machine.hardware.vm, POWER_BUTTON_GSI);
    button.pulse().map_err(Error::host("press the power button"))?;
    machine.emit(MachineEvent::Powerdown);
    Ok(())
}

fn query_status(machine: &Machine) -> Value {
    let status = match machine.state() {
        RunState::Prelaunch => "prelaunch",
        RunState::Paused => "paused",
        RunState::Debug => "debug",
        RunState::Running => "running",
        RunState::IoError => "io-error",
        RunState::FinishMigrate => "finish-migrate",
        RunState::PostMigrate => "postmigrate",
        RunState::Shutdown => "shutdown",
    };
    json!({ "running": status == "running", "status": status })
}

fn query_cpus_fast(machine: &Machine) -> Value {
    let cpu = |(index, thread_id): (usize, i32)| {
        json!({
            "cpu-index": index,
            "qom-path": format!("/machine/unattached/device[{index}]"),
            "thread-id": thread_id,
            "target": "x86_64",
            "props": { "socket-id": 0, "core-id": index, "thread-id": 0 },
        })
    };
    machine.hardware.vcpus.iter().map(|vcpu| *vcpu.id).enumerate().map(cpu).collect()
}

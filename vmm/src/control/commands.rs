//! What a control client can ask for: one table of commands, with QEMU's names, arguments and results.

use serde_json::{Map, Value, json};

use super::block;
use super::metrics;
use super::protocol::{Event, Failure, version};
use super::schema;
use super::server::Handler;
use crate::error::Error;
use crate::event_loop::Outcome;
use crate::machine::{Life, Machine};

/// A command of the table.
pub(super) struct Command {
    /// Its name.
    pub(super) name: &'static str,
    /// What it takes.
    pub(super) arguments: &'static [Argument],
    /// The type of its result, in the schema's words.
    pub(super) returns: &'static str,
    run: fn(&mut Operator<'_>, &Arguments<'_>) -> Result<Value, Failure>,
}

/// An argument of a command.
pub(super) struct Argument {
    /// Its name.
    pub(super) name: &'static str,
    /// What it has to be.
    pub(super) kind: ArgumentKind,
    /// It may not be left out.
    pub(super) required: bool,
}

/// JSON types of arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArgumentKind {
    Text,
    /// Never negative in any command here.
    Integer,
    Boolean,
    Integers,
}

pub(super) const fn required(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, required: true }
}

pub(super) const fn optional(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, required: false }
}

const fn command(
    name: &'static str,
    arguments: &'static [Argument],
    returns: &'static str,
    run: fn(&mut Operator<'_>, &Arguments<'_>) -> Result<Value, Failure>,
) -> Command {
    Command { name, arguments, returns, run }
}

/// Every command but `qmp_capabilities`, which belongs to the connection.
pub(super) const COMMANDS: &[Command] = &[
    command("query-version", &[], "VersionInfo", |_, _| Ok(version())),
    command("query-commands", &[], "[CommandInfo]", |_, _| Ok(names(schema::command_names()))),
    command("query-events", &[], "[EventInfo]", |_, _| Ok(names(schema::event_names()))),
    command("query-qmp-schema", &[], "[SchemaInfo]", |_, _| Ok(schema::schema())),
    command("query-status", &[], "StatusInfo", |operator, _| operator.query_status()),
    command("stop", &[], "", |operator, _| operator.stop()),
    command("cont", &[], "", |operator, _| operator.cont()),
    command("system_reset", &[], "", |operator, _| operator.system_reset()),
    command("system_powerdown", &[], "", |operator, _| operator.system_powerdown()),
    command("quit", &[], "", |operator, _| operator.end(Outcome::ControlQuit)),
    command("query-cpus-fast", &[], "[CpuInfoFast]", |operator, _| operator.query_cpus_fast()),
    command("query-memory-size-summary", &[], "MemoryInfo", |operator, _| operator.query_memory_size_summary()),
    command("query-block", &[], "[BlockInfo]", |operator, _| Ok(block::query_block(operator.machine))),
    command("query-named-block-nodes", block::NODES, "[BlockDeviceInfo]", |operator, _| {
        Ok(block::query_nodes(operator.machine))
    }),
    command("query-blockstats", block::BLOCKSTATS, "[BlockStats]", |operator, arguments| {
        Ok(block::query_blockstats(operator.machine, arguments))
    }),
    command("x-query-metrics", &[], "HumanReadableText", |operator, _| Ok(metrics::query(operator.machine))),
    command("block_resize", block::RESIZE, "", |operator, arguments| block::resize(operator.machine, arguments)),
    command("block_set_io_throttle", block::THROTTLE, "", |operator, arguments| {
        block::throttle(operator.machine, arguments)
    }),
    command("block-set-write-threshold", block::WRITE_THRESHOLD, "", |operator, arguments| {
        block::set_write_threshold(operator.machine, arguments)
    }),
    command("block-latency-histogram-set", block::HISTOGRAM, "", |operator, arguments| {
        block::set_histogram(operator.machine, arguments)
    }),
];

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Value {
    names.map(|name| json!({ "name": name })).collect()
}

/// The arguments of a command, checked against the table.
pub(super) struct Arguments<'a>(&'a Map<String, Value>);

impl<'a> Arguments<'a> {
    fn check(command: &Command, given: &'a Map<String, Value>) -> Result<Self, Failure> {
        for name in given.keys() {
            if !command.arguments.iter().any(|argument| argument.name == name) {
                return Err(Failure::generic(format!("Parameter '{name}' is unexpected")));
            }
        }
        for Argument { name, kind, required } in command.arguments {
            let expected = match (given.get(*name), kind) {
                (None, _) if *required => return Err(Failure::generic(format!("Parameter '{name}' is missing"))),
                (None, _) => continue,
                (Some(value), ArgumentKind::Text) if value.is_string() => continue,
                (Some(value), ArgumentKind::Integer) if value.is_u64() => continue,
                (Some(value), ArgumentKind::Boolean) if value.is_boolean() => continue,
                (Some(Value::Array(items)), ArgumentKind::Integers) if items.iter().all(Value::is_u64) => continue,
                (_, ArgumentKind::Text) => "string",
                (Some(value), ArgumentKind::Integer) if value.is_i64() => {
                    return Err(Failure::generic(format!("Parameter '{name}' expects a non-negative integer")));
                }
                (_, ArgumentKind::Integer) => "integer",
                (_, ArgumentKind::Boolean) => "boolean",
                (_, ArgumentKind::Integers) => "array of non-negative integers",
            };
            return Err(Failure::generic(format!("Invalid parameter type for '{name}', expected: {expected}")));
        }
        Ok(Self(given))
    }

    pub(super) fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name)?.as_str()
    }

    pub(super) fn integer(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }

    pub(super) fn boolean(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    pub(super) fn integers(&self, name: &str) -> Option<Vec<u64>> {
        self.0.get(name)?.as_array().map(|items| items.iter().filter_map(Value::as_u64).collect())
    }
}

/// A client's hand on the machine.
pub(crate) struct Operator<'a> {
    machine: &'a mut Machine,
    outcome: Option<Outcome>,
}

impl<'a> Operator<'a> {
    /// A hand on `machine`.
    pub(crate) fn new(machine: &'a mut Machine) -> Self {
        Self { machine, outcome: None }
    }

    /// How a command ended the VM, if one did.
    pub(crate) fn outcome(self) -> Option<Outcome> {
        self.outcome
    }

    /// The first reason wins.
    fn end(&mut self, outcome: Outcome) -> Result<Value, Failure> {
        self.outcome.get_or_insert(outcome);
        Ok(json!({}))
    }

    fn query_status(&mut self) -> Result<Value, Failure> {
        let status = match self.machine.life() {
            _ if self.outcome.is_some() => "shutdown",
            Life::Prelaunch => "prelaunch",
            Life::Paused => "paused",
            Life::Running => "running",
            Life::IoError => "io-error",
        };
        Ok(json!({ "running": status == "running", "status": status }))
    }

    fn stop(&mut self) -> Result<Value, Failure> {
        let stopped = self.machine.pause(Life::Paused);
        self.or_end(stopped)
    }

    fn system_reset(&mut self) -> Result<Value, Failure> {
        let reset = self.machine.reset();
        self.or_end(reset)
    }

    /// A machine that failed at this cannot go on.
    fn or_end(&mut self, result: Result<(), Error>) -> Result<Value, Failure> {
        result.map(|()| json!({})).map_err(|error| {
            self.outcome.get_or_insert(Outcome::Failed(error.to_string()));
            Failure::generic(error.to_string())
        })
    }

    fn cont(&mut self) -> Result<Value, Failure> {
        self.machine.resume();
        Ok(json!({}))
    }

    fn system_powerdown(&mut self) -> Result<Value, Failure> {
        self.machine.parts.power_button.write(1).map_err(|error| Failure::generic(error.to_string()))?;
        self.machine.announce(&Event::Powerdown);
        Ok(json!({}))
    }

    fn query_cpus_fast(&mut self) -> Result<Value, Failure> {
        let cpu = |(index, thread_id): (usize, i32)| {
            json!({
                "cpu-index": index,
                "qom-path": format!("/machine/unattached/device[{index}]"),
                "thread-id": thread_id,
                "target": "x86_64",
                "props": { "socket-id": 0, "core-id": index, "thread-id": 0 },
            })
        };
        Ok(self.machine.parts.vcpus.iter().map(|vcpu| vcpu.thread_id()).enumerate().map(cpu).collect())
    }

    fn query_memory_size_summary(&mut self) -> Result<Value, Failure> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let bytes: u64 = self.machine.parts.memory.iter().map(GuestMemoryRegion::len).sum();
        Ok(json!({ "base-memory": bytes, "plugged-memory": 0 }))
    }
}

impl Handler for Operator<'_> {
    fn execute(&mut self, name: &str, arguments: &Map<String, Value>) -> Result<Value, Failure> {
        let command = COMMANDS.iter().find(|command| command.name == name);
        let not_found = || Failure::command_not_found(format!("The command {name} has not been found"));
        let command = command.ok_or_else(not_found)?;
        let arguments = Arguments::check(command, arguments)?;
        tracing::debug!(command = name, "control");
        (command.run)(self, &arguments)
    }

    fn news(&mut self) -> Vec<Value> {
        self.machine.take_news()
    }
}

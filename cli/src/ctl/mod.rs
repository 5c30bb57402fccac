//! `minivmm ctl SOCKET COMMAND`: a control client for people.
//!
//! `main` passes the words after `ctl`. Each command is one or a few QMP commands over [`client::Client`], and prints what a person wants
//! to see of the answers (several disks as a `table`). Nothing here knows the machine, which is another process.

mod client;
mod error;
mod save;
mod table;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};

use self::client::Client;
use self::error::CtlError;
use self::table::{human, table, word};
use crate::arguments::parse_as;
use crate::arguments::value::{self, ValueError, os_text, text};
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::print_message;

/// Control a VM that was started with --qmp unix:SOCKET.
#[derive(Debug, Parser)]
#[command(name = "minivmm ctl", max_term_width = 120)]
struct Arguments {
    /// The VM's control socket.
    #[arg(value_name = "SOCKET", value_parser = os_text(socket))]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print whether the VM runs, and its vCPUs, memory and disks.
    ///
    /// For each disk: its size, the space that the image occupies on the host, the state after I/O errors, format and file.
    Status,
    /// Pause the VM.
    ///
    /// The vCPUs leave the guest and the disks finish what they have begun; then nothing changes until the VM is resumed.
    #[command(visible_alias = "pause")]
    Stop,
    /// Resume the VM; requests that an I/O error stopped are tried again.
    #[command(visible_alias = "resume")]
    Cont,
    /// Press the ACPI power button.
    ///
    /// The guest decides what to do about it; most power off cleanly.
    Powerdown,
    /// Reset the VM: the guest boots again.
    Reset,
    /// End the VM at once, with its disks flushed.
    ///
    /// The guest gets no chance to write what it still holds in its own caches.
    Quit,
    /// Print the disks' statistics.
    ///
    /// For each disk and kind of request: how many, how many bytes, how many were merged, failed or invalid, and the mean time.
    Disks,
    /// Change the size of a disk.
    ///
    /// The guest is told, and a Linux guest uses the new size at once.
    Resize {
        /// The disk's name, such as vda.
        disk: String,
        /// The new size: 10G, 1.5G, 512M; a plain number counts bytes.
        #[arg(value_parser = text(value::bytes::<u64>))]
        size: u64,
        /// Allow a smaller size than the present one: what is behind it is lost.
        #[arg(long)]
        shrink: bool,
    },
    /// Limit the speed of a disk, or of its throttle group. Limits that are not given are removed.
    Throttle {
        /// The disk's name, such as vda.
        disk: String,
        /// bps, bps_rd, bps_wr, iops, iops_rd or iops_wr=N per second; also with _max and _max_length, iops_size, and group=NAME.
        #[arg(value_name = "LIMIT=N")]
        limits: Vec<String>,
    },
    /// Inject faults into a disk: add a rule and print its number, or remove rules.
    ///
    /// This needs a disk with the key fault=, such as fault=none. `minivmm --help` has the form of a rule.
    Fault {
        /// The disk's name, such as vda.
        disk: String,
        /// The rule, as for fault=, such as hang:read.
        #[arg(required_unless_present = "remove")]
        rule: Option<String>,
        /// Remove the rule with this number, or `all`. Requests that it holds back complete.
        #[arg(long, value_name = "NUMBER", conflicts_with = "rule", value_parser = text(rules))]
        remove: Option<Rules>,
    },
    /// Print the rules of disks with fault=, and how many requests each has seen and hit.
    Faults,
    /// Save the VM to a file, from which `minivmm --incoming file:PATH` starts it again.
    ///
    /// The VM stands still meanwhile, and goes on afterwards if it ran before. With --background it stands still for a moment only.
    Save {
        /// The file. If it is a saved machine, it is replaced. Any other file is refused.
        path: PathBuf,
        /// End the VM once it is saved.
        #[arg(long)]
        quit: bool,
        /// Let the VM go on while its memory is written. It must have been started with --sandbox on,spawn=allow.
        ///
        /// If the VM has writable disks, pause it first, copy their images during the save, and then resume it.
        #[arg(long, conflicts_with = "quit")]
        background: bool,
        /// Write only what changed since the VM was restored (--incoming file:BASE). BASE must not be changed or removed afterwards.
        ///
        /// The memory of the VM must be mapped from BASE. BASE may be an increment itself, with up to 16 files in the chain.
        #[arg(long)]
        incremental: bool,
    },
    /// Print all counters, in Prometheus' text format.
    Metrics,
    /// Print events as they come, until the VM ends.
    ///
    /// Each line has the time in seconds, the event's QMP name and its data as JSON.
    Events,
}

/// Which rules to remove.
#[derive(Clone, Copy, Debug)]
enum Rules {
    All,
    Number(u64),
}

fn rules(text: &str) -> Result<Rules, ValueError> {
    if text == "all" { Ok(Rules::All) } else { value::number(text).map(Rules::Number) }
}

/// The path, with `unix:` before it or not.
fn socket(text: &OsStr) -> Result<PathBuf, ValueError> {
    let bytes = text.as_bytes();
    Ok(OsStr::from_bytes(bytes.strip_prefix(b"unix:").unwrap_or(bytes)).into())
}

/// The command line's definition, for man pages and completions.
#[allow(dead_code, reason = "an example makes the files that are installed")]
pub(crate) fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Runs `minivmm ctl` with the arguments behind that word.
pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { socket, command } = match parse_as("minivmm ctl", arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    let Err(error) = run(&socket, command) else { return ExitCode::from(EXIT_CLEAN) };
    print_message(&format!("ctl {}: {}", socket.display(), vmm::WithCauses(&error)));
    ExitCode::from(match error {
        CtlError::Shrink { .. } | CtlError::LimitWithoutValue(_) | CtlError::Limit { .. } => {
            EXIT_USAGE
        }
        _ => EXIT_HOST,
    })
}

fn run(socket: &Path, command: Command) -> Result<(), CtlError> {
    let vm = &mut Client::connect(socket)?;
    let (name, arguments) = match command {
        Command::Status => return print(&status(vm)?),
        Command::Disks => return print(&disks(vm)?),
        Command::Metrics => {
            let answer = vm.execute("x-query-metrics", json!({}))?;
            return print(answer["human-readable-text"].as_str().unwrap_or_default());
        }
        Command::Events => return events(vm),
        Command::Faults => return print(&faults(vm)?),
        Command::Fault { disk, remove: Some(rules), .. } => {
            let mut arguments = json!({ "device": disk });
            if let Rules::Number(number) = rules {
                arguments["id"] = number.into();
            }
            ("x-minivmm-fault-remove", arguments)
        }
        Command::Fault { disk, rule, .. } => {
            let arguments = json!({ "device": disk, "rule": rule.unwrap_or_default() });
            let added = vm.execute("x-minivmm-fault-add", arguments)?;
            return print(&format!("{}\n", added["id"]));
        }
        Command::Save { path, quit, background, incremental } => {
            return save::save(vm, &path, quit, background, incremental);
        }
        Command::Stop => ("stop", json!({})),
        Command::Cont => ("cont", json!({})),
        Command::Powerdown => ("system_powerdown", json!({})),
        Command::Reset => ("system_reset", json!({})),
        Command::Quit => ("quit", json!({})),
        Command::Resize { disk, size, shrink } => {
            if !shrink {
                check_growth(vm, &disk, size)?;
            }
            ("block_resize", json!({ "device": disk, "size": size }))
        }
        Command::Throttle { disk, limits } => ("block_set_io_throttle", throttle(&disk, &limits)?),
    };
    vm.execute(name, arguments).map(|_| ())
}

/// Fails if `disk` is larger than `size`. A disk that does not exist is left to the VM to refuse.
fn check_growth(vm: &mut Client, disk: &str, size: u64) -> Result<(), CtlError> {
    let disks = vm.execute("query-block", json!({}))?;
    let named = disks.as_array().into_iter().flatten().find(|found| found["device"] == disk);
    let present = named.map_or(&Value::Null, |disk| &disk["inserted"]["image"]["virtual-size"]);
    if present.as_u64().is_some_and(|present| present > size) {
        return Err(CtlError::Shrink { disk: disk.to_owned(), present: human(present) });
    }
    Ok(())
}

fn print(text: &str) -> Result<(), CtlError> {
    // A reader that has seen enough, as head(1) does, is no error.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn events(vm: &mut Client) -> Result<(), CtlError> {
    while let Some(message) = vm.receive()? {
        let seconds = &message["timestamp"]["seconds"];
        let data = message.get("data").map(Value::to_string).unwrap_or_default();
        if writeln!(io::stdout(), "{seconds} {} {data}", word(&message["event"])).is_err() {
            break;
        }
    }
    Ok(())
}

fn status(vm: &mut Client) -> Result<String, CtlError> {
    let state = vm.execute("query-status", json!({}))?;
    let memory = vm.execute("query-memory-size-summary", json!({}))?;
    let cpus = vm.execute("query-cpus-fast", json!({}))?;
    let disks = vm.execute("query-block", json!({}))?;
    let mut text = format!(
        "{}, {} vCPUs, {} of memory\n",
        word(&state["status"]),
        cpus.as_array().map_or(0, Vec::len),
        human(&memory["base-memory"])
    );
    let mut rows = vec![
        ["DISK", "SIZE", "USED", "STATE", "ACCESS", "FORMAT", "FILE"].map(str::to_owned).to_vec(),
    ];
    for disk in disks.as_array().into_iter().flatten() {
        let inserted = &disk["inserted"];
        rows.push(vec![
            word(&disk["device"]),
            human(&inserted["image"]["virtual-size"]),
            human(&inserted["image"]["actual-size"]),
            disk.get("io-status").map_or("ok".to_owned(), word),
            if inserted["ro"] == true { "read-only" } else { "read-write" }.to_owned(),
            word(&inserted["drv"]),
            word(&inserted["file"]),
        ]);
    }
    if rows.len() > 1 {
        text.push_str(&table(&rows));
    }
    disks.as_array().into_iter().flatten().filter_map(limits).for_each(|line| text.push_str(&line));
    Ok(text)
}

/// The limits of a disk in QEMU's words, if it has any.
fn limits(disk: &Value) -> Option<String> {
    let inserted = disk["inserted"].as_object()?;
    let is_limit = |key: &str| key.starts_with("iops") || key.starts_with("bps");
    let limits = inserted.iter().filter(|(key, value)| is_limit(key) && value.as_u64() > Some(0));
    let mut words: Vec<_> = limits.map(|(key, value)| format!("{key}={value}")).collect();
    words.sort();
    let group = inserted.get("group").map(|group| format!("group={}", word(group)));
    let limited = !words.is_empty();
    words.extend(group);
    limited.then(|| format!("{} is limited: {}\n", word(&disk["device"]), words.join(", ")))
}

fn disks(vm: &mut Client) -> Result<String, CtlError> {
    let disks = vm.execute("query-blockstats", json!({}))?;
    let heads = ["DISK", "KIND", "OPERATIONS", "BYTES", "MERGED", "ERRORS", "INVALID", "MEAN TIME"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for disk in disks.as_array().into_iter().flatten() {
        for (kind, name) in
            [("rd", "read"), ("wr", "write"), ("flush", "flush"), ("unmap", "discard")]
        {
            let count = |key: String| disk["stats"][key].as_u64().unwrap_or_default();
            let (done, failed) =
                (count(format!("{kind}_operations")), count(format!("failed_{kind}_operations")));
            let mean = count(format!("{kind}_total_time_ns"))
                .checked_div(done + failed)
                .unwrap_or_default();
            rows.push(vec![
                word(&disk["device"]),
                name.to_owned(),
                done.to_string(),
                count(format!("{kind}_bytes")).to_string(),
                count(format!("{kind}_merged")).to_string(),
                failed.to_string(),
                count(format!("invalid_{kind}_operations")).to_string(),
                format!("{} us", mean / 1000),
            ]);
        }
    }
    Ok(table(&rows))
}

fn faults(vm: &mut Client) -> Result<String, CtlError> {
    let disks = vm.execute("x-minivmm-query-faults", json!({}))?;
    let mut rows = vec![["DISK", "NUMBER", "SEEN", "HITS", "RULE"].map(str::to_owned).to_vec()];
    for disk in disks.as_array().into_iter().flatten() {
        for rule in disk["rules"].as_array().into_iter().flatten() {
            let count = |key: &str| rule[key].to_string();
            let [id, seen, hits] = ["id", "seen", "hits"].map(count);
            rows.push(vec![word(&disk["device"]), id, seen, hits, word(&rule["rule"])]);
        }
    }
    Ok(table(&rows))
}

/// The arguments of `block_set_io_throttle`, which wants all of the averages.
fn throttle(disk: &str, limits: &[String]) -> Result<Value, CtlError> {
    let mut arguments = Map::new();
    arguments.insert("device".to_owned(), disk.into());
    for name in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        arguments.insert(name.to_owned(), 0.into());
    }
    for limit in limits {
        let Some((name, value)) = limit.split_once('=') else {
            return Err(CtlError::LimitWithoutValue(limit.clone()));
        };
        if name == "group" {
            arguments.insert(name.to_owned(), value.into());
            continue;
        }
        let value = value::bytes::<u64>(value)
            .map_err(|source| CtlError::Limit { limit: limit.clone(), source })?;
        arguments.insert(name.replace('-', "_"), value.into());
    }
    Ok(Value::Object(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn limits_that_are_not_named_are_lifted() {
        let arguments = throttle("vda", &["iops-rd=100".to_owned(), "bps=1M".to_owned()]).unwrap();
        assert_eq!(
            (&arguments["iops_rd"], &arguments["bps"], &arguments["iops"]),
            (&json!(100), &json!(1 << 20), &json!(0))
        );
        assert!(throttle("vda", &["iops".to_owned()]).is_err());
    }
}

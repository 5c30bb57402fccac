//! `minivmm ctl SOCKET COMMAND`: control of a running VM for people.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use serde_json::{Map, Value, json};

use crate::log::say;
use crate::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE, size};

/// Control a VM that was started with --qmp unix:SOCKET.
#[derive(Debug, Parser)]
#[command(name = "minivmm ctl", max_term_width = 120)]
struct Ctl {
    /// The VM's control socket.
    #[arg(value_name = "SOCKET")]
    socket: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Whether the VM runs, its vCPUs, memory and disks.
    Status,
    /// Pause the VM.
    Stop,
    /// Let it run on; after an I/O error, try the failed requests again.
    Cont,
    /// Press the power button.
    Powerdown,
    /// Start the guest over, with devices and memory as at power-on.
    Reset,
    /// End the VM at once, with its disks flushed.
    Quit,
    /// What each disk has done.
    Disks,
    /// Change the size of a disk.
    Resize {
        /// Its name, such as vda.
        disk: String,
        /// The new size: 10G, 512M; a plain number counts bytes.
        #[arg(value_parser = bytes)]
        size: u64,
    },
    /// Limit a disk; limits that are not named are lifted.
    Throttle {
        /// Its name, such as vda.
        disk: String,
        /// bps, bps_rd, bps_wr, iops, iops_rd or iops_wr=N a second; also with _max and _max_length, and iops_size.
        #[arg(value_name = "LIMIT=N")]
        limits: Vec<String>,
    },
    /// All counters, in Prometheus' text format.
    Metrics,
    /// Print events as they come, until the VM ends.
    Events,
}

/// Runs `minivmm ctl` with the arguments behind that word.
pub(crate) fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let name = std::ffi::OsString::from("minivmm ctl");
    let ctl = match Ctl::try_parse_from(std::iter::once(name).chain(arguments)) {
        Ok(ctl) => ctl,
        Err(error) => {
            // Fails only when nobody reads our output.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { EXIT_CLEAN });
        }
    };
    match ctl.run() {
        Ok(()) => ExitCode::from(EXIT_CLEAN),
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::from(EXIT_HOST)
        }
    }
}

impl Ctl {
    fn run(self) -> anyhow::Result<()> {
        let path = self.socket.strip_prefix("unix:").unwrap_or(&self.socket);
        let mut vm = Client::connect(path).with_context(|| format!("ctl {path}"))?;
        let text = match self.command {
            Command::Status => status(&mut vm)?,
            Command::Stop => vm.act("stop", json!({}))?,
            Command::Cont => vm.act("cont", json!({}))?,
            Command::Powerdown => vm.act("system_powerdown", json!({}))?,
            Command::Reset => vm.act("system_reset", json!({}))?,
            Command::Quit => vm.act("quit", json!({}))?,
            Command::Disks => disks(&mut vm)?,
            Command::Resize { disk, size } => vm.act("block_resize", json!({ "device": disk, "size": size }))?,
            Command::Throttle { disk, limits } => vm.act("block_set_io_throttle", throttle(&disk, &limits)?)?,
            Command::Metrics => {
                let answer = vm.execute("x-query-metrics", json!({}))?;
                answer["human-readable-text"].as_str().unwrap_or_default().to_owned()
            }
            Command::Events => return events(&mut vm),
        };
        // A reader that has seen enough, as head(1) does, is no error.
        let _ = io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

/// A connection that has said hello.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(path: &str) -> anyhow::Result<Self> {
        let mut client = Self(BufReader::new(UnixStream::connect(path)?));
        let greeting = client.receive()?;
        if greeting.is_none_or(|greeting| greeting.get("QMP").is_none()) {
            bail!("this is not a control socket of a VM");
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// The next message; `None` when the VM is gone.
    fn receive(&mut self) -> anyhow::Result<Option<Value>> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).context("this is not a control socket of a VM")
    }

    fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(request.to_string().as_bytes())?;
        loop {
            let Some(mut answer) = self.receive()? else { bail!("the VM ended before it answered") };
            if answer.get("event").is_some() {
                continue;
            }
            if let Some(error) = answer.get("error") {
                bail!("{}", error["desc"].as_str().unwrap_or("the VM refused"));
            }
            return Ok(answer["return"].take());
        }
    }

    /// A command that has nothing to say when it works.
    fn act(&mut self, command: &str, arguments: Value) -> anyhow::Result<String> {
        self.execute(command, arguments).map(|_| String::new())
    }
}

fn events(vm: &mut Client) -> anyhow::Result<()> {
    while let Some(message) = vm.receive()? {
        let seconds = &message["timestamp"]["seconds"];
        let data = message.get("data").map(Value::to_string).unwrap_or_default();
        if writeln!(io::stdout(), "{seconds} {} {data}", word(&message["event"])).is_err() {
            break;
        }
    }
    Ok(())
}

fn status(vm: &mut Client) -> anyhow::Result<String> {
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
    let mut rows = vec![["DISK", "SIZE", "USED", "STATE", "ACCESS", "FORMAT", "FILE"].map(str::to_owned).to_vec()];
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
    Ok(text)
}

fn disks(vm: &mut Client) -> anyhow::Result<String> {
    let disks = vm.execute("query-blockstats", json!({}))?;
    let heads = ["DISK", "KIND", "OPERATIONS", "BYTES", "MERGED", "ERRORS", "INVALID", "MEAN TIME"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for disk in disks.as_array().into_iter().flatten() {
        for (kind, name) in [("rd", "read"), ("wr", "write"), ("flush", "flush"), ("unmap", "discard")] {
            let count = |key: String| disk["stats"][key].as_u64().unwrap_or_default();
            let (done, failed) = (count(format!("{kind}_operations")), count(format!("failed_{kind}_operations")));
            let mean = count(format!("{kind}_total_time_ns")).checked_div(done + failed).unwrap_or_default();
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

/// The arguments of `block_set_io_throttle`, which wants all of the averages.
fn throttle(disk: &str, limits: &[String]) -> anyhow::Result<Value> {
    let mut arguments = Map::new();
    arguments.insert("device".to_owned(), disk.into());
    for name in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        arguments.insert(name.to_owned(), 0.into());
    }
    for limit in limits {
        let (name, value) = limit.split_once('=').with_context(|| format!("'{limit}' is not of the form LIMIT=N"))?;
        let value = bytes(value).map_err(|reason| anyhow::anyhow!("{limit}: {reason}"))?;
        arguments.insert(name.replace('-', "_"), value.into());
    }
    Ok(Value::Object(arguments))
}

/// `10G`, `512M`, `4K`, or plain bytes.
fn bytes(text: &str) -> Result<u64, String> {
    size::bytes(text).ok_or_else(|| format!("'{text}' is not a size; write 10G, 512M or a number of bytes"))
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

/// Bytes in the largest unit that leaves a whole number, or one digit behind the point.
fn human(value: &Value) -> String {
    let bytes = value.as_u64().unwrap_or_default();
    let (mut unit, mut scaled) = (0, bytes as f64);
    while scaled >= 1024.0 && unit < 4 {
        (unit, scaled) = (unit + 1, scaled / 1024.0);
    }
    let digits = usize::from(scaled.fract() != 0.0);
    format!("{scaled:.digits$}{}", ["", "K", "M", "G", "T"][unit])
}

/// Columns as wide as they need to be.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or_default();
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        use clap::CommandFactory;
        Ctl::command().debug_assert();
    }

    #[test]
    fn tables_and_sizes() {
        let rows = [vec!["A".to_owned(), "BB".to_owned()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A     BB\nlong  x\n");
        for (bytes, text) in [(0_u64, "0"), (512, "512"), (1 << 20, "1M"), (3 << 29, "1.5G")] {
            assert_eq!(human(&json!(bytes)), text);
        }
        assert_eq!((bytes("10G"), bytes("512"), bytes("4k")), (Ok(10 << 30), Ok(512), Ok(4096)));
        assert!(bytes("x").is_err() && bytes("99999999999T").is_err());
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

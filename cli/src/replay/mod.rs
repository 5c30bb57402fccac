//! `minivmm replay TRACE --disk PATH[,KEY=VALUE]...`: submits the requests of a trace again, on any disk, without a guest.
//!
//! `main` passes the arguments after `replay`. It is a program of its own, like `minivmm ctl`: it needs no machine and no KVM, only a trace
//! that `--trace` has written. It opens the disk as a machine does, and submits the same transfers to the engine as for a guest's requests.
//! The chapter *Tracing* (`vmm/docs/tracing.md`) explains its use.
//!
//! Before the first request, the whole trace is read and compared with the disk. All errors in it are found then. A load that writes needs
//! `snapshot=on` or `--overwrite`. If a request fails later, it is counted, and the others go on.
//!
//! | file | what it does |
//! |---|---|
//! | `load` | reads the trace |
//! | `player` | submits the requests, and measures them |
//! | `report` | text and JSON |

mod error;
mod load;
mod player;
mod report;
#[cfg(test)]
pub(crate) mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use devices::block::Throttling;
use devices::disk::{DiscardMode, Disk, injected_faults};
use vmm::{DiskConfig, WithCauses};

use self::error::ReplayError;
use self::load::{Kind, Load, Request};
use self::player::Manner;
use self::report::Report;
use crate::arguments::disk::{Context, DiskOption};
use crate::arguments::parse_as;
use crate::arguments::usage_error::UsageError;
use crate::arguments::value::os_text;
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, print_text, start_log};
use crate::trace_view::lines::LineError;

/// Replay the requests of a trace on a disk, without a guest, and print their latencies next to the recorded ones.
///
/// The trace has to be one of format=json, with the events virtio_blk_*. Each request begins at its recorded time, or with --no-stall as
/// soon as the recorded concurrency allows. Writes write other data than the guest did, which the trace does not have.
#[derive(Debug, Parser)]
#[command(name = "minivmm replay", max_term_width = 120, after_help = STATUS_HELP)]
struct Arguments {
    /// The file that --trace wrote.
    #[arg(value_name = "TRACE")]
    trace: PathBuf,

    /// The disk: PATH[,key=value...], with the keys of a machine's --disk. Those of the guest's side change nothing.
    ///
    /// Such keys are id=, serial=, num-queues=, queue-size=, rerror=, werror= and the sizes of blocks.
    #[arg(long, value_name = "PATH[,KEY=VALUE]...", value_parser = os_text(DiskOption::parse))]
    disk: DiskOption,

    /// Which disk of the traced machine, if it had several: vda.
    #[arg(long, value_name = "NAME")]
    traced_disk: Option<String>,

    /// Do not wait for the recorded times: as fast as the disk is, with as many requests in flight as were recorded.
    #[arg(long)]
    no_stall: bool,

    /// Destroy what the disk has, if the load writes and the disk has no snapshot=on.
    #[arg(long)]
    overwrite: bool,

    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

const STATUS_HELP: &str = "Exit status: 0 every request succeeded; 1 one failed, or the host did; 2 bad arguments or files.";

/// The command line's definition, for man pages and completions.
#[allow(dead_code, reason = "an example makes the files that are installed")]
pub(crate) fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Runs `minivmm replay` with the arguments behind that word.
pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let arguments = match parse_as::<Arguments>("minivmm replay", arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    start_log(false, None, None);
    // No error stops anything here.
    let context = Context { cpus: 1, control: true };
    let disk = match arguments.disk.clone().into_config(0, context) {
        Ok(disk) => disk,
        Err(error) => return refuse(&error),
    };
    match run(&arguments, &disk) {
        Ok(true) => ExitCode::from(EXIT_CLEAN),
        Ok(false) => ExitCode::from(EXIT_HOST),
        Err(error) => {
            let trace = arguments.trace.display();
            print_message(&format!("replay {trace}: {}", WithCauses(&error)));
            ExitCode::from(if error.is_usage() { EXIT_USAGE } else { EXIT_HOST })
        }
    }
}

fn refuse(error: &UsageError) -> ExitCode {
    print_message(&error.to_string());
    ExitCode::from(EXIT_USAGE)
}

fn run(arguments: &Arguments, config: &DiskConfig) -> Result<bool, ReplayError> {
    let Arguments { trace, traced_disk, no_stall, .. } = arguments;
    check_keys(config)?;
    let file = File::open(trace).map_err(LineError::from)?;
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let same = file.metadata().ok().map(identity)
        == std::fs::metadata(&config.image.path).ok().map(identity);
    if same {
        return Err(ReplayError::TraceIsDisk);
    }
    let load = Load::read(BufReader::new(file), traced_disk.as_deref())?;
    let disk = open(arguments, config, &load.requests)?;
    if load.lost + load.left_out > 0 {
        print_message(&format!(
            "warning: {}: the trace lacks {} events that were lost; {} requests are left out, since there are more than {}",
            trace.display(),
            load.lost,
            load.left_out,
            load::REQUESTS_MAX,
        ));
    }
    let manner = Manner {
        no_stall: *no_stall,
        durable: !config.image.cache.writeback(),
        unmap: config.image.discard == DiscardMode::Unmap,
    };
    let played = player::play(&load.requests, disk, manner).map_err(ReplayError::Host)?;
    let failed = played.latencies.iter().zip(&load.requests);
    if let Some((error, request)) =
        failed.filter_map(|(outcome, request)| Some((outcome.err()?, request))).next()
    {
        let Request { kind, offset, .. } = request;
        print_message(&format!("replay: {kind:?} at byte {offset}: {error}"));
    }
    let report = Report {
        trace,
        disk: &config.image.path,
        no_stall: *no_stall,
        load: &load,
        played: &played,
    };
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.text() };
    Ok(print_text(&text) && report.errors() == 0)
}

fn check_keys(config: &DiskConfig) -> Result<(), ReplayError> {
    let missing = [
        (config.device.throttling != Throttling::default(), "throttling.*="),
        (config.image.scsi, "scsi=on"),
        (config.image.log_writes.is_some(), "log-writes="),
    ];
    let first = missing.iter().find(|(is_given, _)| *is_given);
    first.map_or(Ok(()), |(_, key)| Err(ReplayError::Key(key)))
}

/// Opens the disk, if the requests suit it and may change it.
fn open(
    arguments: &Arguments,
    config: &DiskConfig,
    requests: &[Request],
) -> Result<Arc<dyn Disk>, ReplayError> {
    let image = &config.image;
    let changes = requests.iter().any(|request| request.kind.changes());
    if changes && image.read_only {
        return Err(ReplayError::ReadOnly);
    }
    if changes && !image.snapshot && !arguments.overwrite {
        return Err(ReplayError::Overwrites);
    }
    let disk = devices::disk::open(image)?;
    let (capacity, block) = (disk.capacity(), disk.info().block_limits.logical_block_size);
    let ranged = || requests.iter().filter(|request| request.kind != Kind::Flush);
    let end = |request: &Request| request.offset.saturating_add(request.length);
    let needed = ranged().map(end).max().unwrap_or(0);
    if needed > capacity {
        return Err(ReplayError::TooSmall { needed, capacity });
    }
    let fits = |bytes: u64| bytes.is_multiple_of(u64::from(block));
    let odd = ranged().find(|request| !fits(request.offset) || !fits(request.length));
    if let Some(&Request { offset, length, .. }) = odd {
        return Err(ReplayError::Blocks { offset, length, block });
    }
    if image.faults.is_empty() {
        return Ok(disk);
    }
    let rules = image.faults.iter().filter_map(|rule| rule.parse().ok()).collect();
    Ok(injected_faults::over(disk, rules))
}

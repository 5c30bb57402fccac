//! `minivmm powercut LOG --base IMAGE -- COMMAND {}`: cuts the power in a log of writes, and has a command look at what is left.
//!
//! `main` hands over the words behind `powercut`. It is a program of its own, like `minivmm ctl`: it needs no machine and no KVM,
//! only a log that `log-writes=` (or Linux's dm-log-writes) made, and the image as it was before the log began. The chapter
//! *Cut the power* (`devices/docs/cut-the-power.md`) explains its use.
//!
//! | file | what it does |
//! |---|---|
//! | `history` | reads the log; says which changes are durable and which are open when the power is cut |
//! | `choice` | which open changes a state has, and its name |
//! | `plan` | chooses the states |
//! | `medium` | a file that holds a state |
//! | `judge` | runs the command, and makes a failing state smaller |
//! | `report` | text and JSON |
//! | `picture` | SVG |

mod choice;
mod error;
mod history;
mod judge;
mod medium;
mod picture;
mod plan;
mod report;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use devices::disk::SECTOR;
use vmm::{Signals, WithCauses};

use self::choice::StateName;
use self::error::PowercutError;
use self::history::History;
use self::judge::{Failure, Judge, Workplace};
use self::medium::Medium;
use self::plan::Plan;
use self::report::Report;
use crate::arguments::parse_as;
use crate::arguments::value::{self, ValueError, text};
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, print_text};

/// A failing state is made smaller at so many epochs; at others, failing states are counted.
const MINIMIZED_MAX: usize = 5;

/// Cut the power at every moment of a log of writes: have a command look at what the disk may hold then.
#[derive(Debug, Parser)]
#[command(name = "minivmm powercut", max_term_width = 120, after_help = STATUS_HELP)]
struct Arguments {
    /// The log, made by --disk IMAGE,log-writes=LOG or by Linux's dm-log-writes.
    #[arg(value_name = "LOG")]
    log: PathBuf,

    /// The disk as it was when the log began: a raw image. It is only read.
    #[arg(long, value_name = "IMAGE")]
    base: PathBuf,

    /// How many states to look at.
    #[arg(long, value_name = "N", default_value = "1000", value_parser = text(value::number::<usize>))]
    states: usize,

    /// Chooses other states; the same number gives the same ones.
    #[arg(long, value_name = "S", default_value = "0", value_parser = text(value::number::<u64>))]
    seed: u64,

    /// What the medium writes at once, in bytes: a power cut tears no smaller unit. 512, or 4096 for many drives.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = text(atomic))]
    atomic: u64,

    /// How many commands run at once [one for each CPU].
    #[arg(long, value_name = "J", value_parser = text(value::number::<NonZero<usize>>))]
    jobs: Option<NonZero<usize>>,

    /// How long the command may take, such as 30s: a longer one is killed, and fails the state with status 124 [no limit].
    #[arg(long, value_name = "TIME", value_parser = text(value::duration))]
    command_timeout: Option<Duration>,

    /// Print the report as JSON.
    #[arg(long)]
    json: bool,

    /// Draw the log and the states that fail as a timeline, an SVG image: a new file.
    #[arg(long, value_name = "FILE", conflicts_with = "state")]
    picture: Option<PathBuf>,

    /// Make one state, as a report names it, instead of looking at many: for --output, or for the command, such as minivmm --disk {}.
    ///
    /// The command has the terminal, and its exit status becomes this one's. The state's file is removed when it ends.
    #[arg(long, value_name = "EPOCH:BITS")]
    state: Option<String>,

    /// The file for the state of --state: a new one.
    #[arg(long, value_name = "FILE", requires = "state", conflicts_with = "command")]
    output: Option<PathBuf>,

    /// The command that looks at a state, with {} for the state's file. It passes the state if it exits with 0.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The value of --atomic.
fn atomic(text: &str) -> Result<u64, ValueError> {
    match value::bytes(text)? {
        bytes if bytes >= SECTOR && u64::is_power_of_two(bytes) => Ok(bytes),
        _ => Err(ValueError::Write("write a power of two from 512 on")),
    }
}

const STATUS_HELP: &str =
    "The command may change the file. Files are made in TMPDIR, or else in /var/tmp.

Exit status: 0 all states pass; 1 one fails, the host does, or a signal ended it; 2 bad arguments or files.";

/// The command line's definition, for man pages and completions.
#[allow(dead_code, reason = "an example makes the files that are installed")]
pub(crate) fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Runs `minivmm powercut` with the arguments behind that word.
pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let arguments = match parse_as::<Arguments>("minivmm powercut", arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    match run(&arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            print_message(&format!("powercut: {}", WithCauses(&error)));
            ExitCode::from(if error.is_usage() { EXIT_USAGE } else { EXIT_HOST })
        }
    }
}

/// Returns the exit status.
fn run(arguments: &Arguments) -> Result<u8, PowercutError> {
    let Arguments { log, base, command, .. } = arguments;
    if arguments.output.is_none() {
        let has_place = |word: &OsString| word.as_bytes().windows(2).any(|pair| pair == b"{}");
        match command.iter().any(has_place) {
            true => {}
            false if command.is_empty() => return Err(PowercutError::NoCommand),
            false => return Err(PowercutError::NoPlace),
        }
    }
    let history = History::read(log)?;
    let image = File::open(base).map_err(|source| PowercutError::file("--base", base, source))?;
    if history.is_incomplete {
        print_message(&format!(
            "warning: {}: the log is incomplete: later writes are missing",
            log.display()
        ));
    }
    if let (Some(name), Some(output)) = (&arguments.state, &arguments.output) {
        let failed = |source| PowercutError::file("--output", output, source);
        return make_state(&history, &image, name, output, failed).map(|()| EXIT_CLEAN);
    }
    let place = Workplace::new(std::env::var_os("TMPDIR"))?;
    let (timeout, directory) = (arguments.command_timeout, place.path());
    let judge = Judge { history: &history, base: &image, command, timeout, directory };
    if let Some(name) = &arguments.state {
        let signals = Signals::block().ok();
        let file = directory.join("state");
        make_state(&history, &image, name, &file, |source| judge.failed(source))?;
        let is_stopped = || signals.as_ref().is_some_and(|signals| signals.ending().is_some());
        return Ok(judge.hand_over(&file, is_stopped)?.unwrap_or(EXIT_HOST));
    }
    let Some(path) = &arguments.picture else { return look(arguments, &judge, None) };
    let failed = |source| PowercutError::file("--picture", path, source);
    // Found out now, and not after all states.
    let file = File::create_new(path).map_err(failed)?;
    look(arguments, &judge, Some((path, file))).inspect_err(|_| drop(std::fs::remove_file(path)))
}

/// `--state NAME`: makes the file `output`. `failed` makes an error of one of the host's.
fn make_state(
    history: &History,
    base: &File,
    name: &str,
    output: &PathBuf,
    failed: impl Fn(io::Error) -> PowercutError + Copy,
) -> Result<(), PowercutError> {
    let wrong = |reason: String| PowercutError::State { name: name.to_owned(), reason };
    let state: StateName =
        name.parse().map_err(|error: choice::NoState| wrong(error.to_string()))?;
    if state.epoch() >= history.epochs() {
        return Err(wrong(format!("the last epoch of the log is {}", history.epochs() - 1)));
    }
    let mut medium = Medium::new(history, base, output.clone()).map_err(failed)?;
    let mut make = || {
        let open = medium.open_at(state.epoch()).map_err(failed)?;
        let sectors: Vec<_> = open.iter().map(|index| history.changes[*index].sectors).collect();
        let choice = state.choice(&sectors).ok_or_else(|| {
            wrong(format!("it does not fit the {} changes that are open at that epoch", open.len()))
        })?;
        medium.hold(&choice).map_err(failed)
    };
    make().inspect_err(|_| drop(std::fs::remove_file(output)))
}

/// Looks at many states and reports. `picture` is the file for the picture.
fn look(
    arguments: &Arguments,
    judge: &Judge<'_>,
    picture: Option<(&PathBuf, File)>,
) -> Result<u8, PowercutError> {
    let signals = Signals::block().ok();
    let mut is_stopped = false;
    let mut look_for_signals = || {
        is_stopped |= signals.as_ref().is_some_and(|signals| signals.ending().is_some());
        is_stopped
    };
    let plan =
        Plan::new(judge.history, arguments.states, arguments.seed, arguments.atomic / SECTOR);
    let planned = plan.states();
    let jobs = arguments.jobs.or_else(|| std::thread::available_parallelism().ok());
    let shows = io::stderr().is_terminal();
    let verdict = judge.run(plan, jobs.map_or(1, NonZero::get), |states, failed| {
        if shows {
            bar(states, planned, failed);
        }
        look_for_signals()
    })?;
    if shows {
        let _ = writeln!(io::stderr());
    }
    let mut failures: Vec<(Failure, usize)> = Vec::new();
    for of_epoch in verdict.failures.chunk_by(|one, other| one.choice.epoch == other.choice.epoch) {
        if failures.len() == MINIMIZED_MAX {
            break;
        }
        // The one that lacks least is the shortest way.
        let least = of_epoch.iter().min_by_key(|failure| failure.choice.dropped().len());
        let Some(least) = least.cloned() else { continue };
        let name = format!("least-{}", failures.len());
        failures.push((judge.minimize(least, &name, &mut look_for_signals)?, of_epoch.len()));
    }
    let report = Report {
        log: &arguments.log,
        base: &arguments.base,
        history: judge.history,
        states: verdict.states,
        failed: verdict.failures.len(),
        failures,
        is_stopped,
    };
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.text() };
    let was_printed = print_text(&text);
    if let Some((path, mut file)) = picture {
        let svg = picture::draw(&report.summary(), judge.history, &report.failures);
        file.write_all(svg.as_bytes())
            .map_err(|source| PowercutError::file("--picture", path, source))?;
    }
    Ok(if report.failed == 0 && !is_stopped && was_printed { EXIT_CLEAN } else { EXIT_HOST })
}

/// A line on the terminal that is written over.
fn bar(states: usize, planned: usize, failed: usize) {
    const WIDTH: usize = 40;
    let done = (states * WIDTH).checked_div(planned).unwrap_or(WIDTH);
    let bar: String = (0..WIDTH).map(|at| if at < done { '#' } else { '.' }).collect();
    let _ = write!(io::stderr(), "\r[{bar}] {states}/{planned} states, {failed} failed");
}

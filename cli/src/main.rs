//! The minivmm command: parses the arguments, runs a machine, and turns its end into an exit status.
//!
//! [`arguments`] makes a [`VmConfig`], `vmm` builds and runs the machine, [`terminal`] makes the user's terminal raw
//! meanwhile. [`messages`] is the only place that prints. `minivmm ctl` is a program of its own, in [`ctl`]: a client of the
//! control socket that shares nothing with the machine.

mod arguments;
mod boot_timing;
mod ctl;
mod directory_disk;
mod exit_codes;
mod explain_view;
mod inherited;
mod messages;
mod powercut;
mod replay;
mod required_calls;
mod saved;
mod service;
mod svg;
mod terminal;
mod trace;
mod trace_view;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

use arguments::ExplainFormat;
use arguments::Parsed;
use arguments::incoming::IncomingOption;
use boot_timing::Moment;
use exit_codes::{
    EXIT_CLEAN, EXIT_GUEST_PANIC, EXIT_HOST, EXIT_NO_STATUS, EXIT_TIMEOUT, EXIT_USAGE,
};
use messages::{print_message, print_text};
use trace::Trace;
use vmm::{Awaited, Incoming, Outcome, VmConfig};

fn main() -> ExitCode {
    if let Err(why) = inherited::reset() {
        return refuse(why);
    }
    if let Err((call, error)) = required_calls::check() {
        return refuse(&format!(
            "the host refuses {call}(2), which every VM needs: {error}; allow it in the container or service"
        ));
    }
    let started = Moment::now();
    let arguments = || std::env::args_os().skip(2).collect();
    match std::env::args_os().nth(1).as_ref().and_then(|word| word.to_str()) {
        Some("ctl") => return ctl::main(arguments()),
        Some("powercut") => return powercut::main(arguments()),
        Some("replay") => return replay::main(arguments()),
        Some("trace-view") => return trace_view::main(arguments()),
        Some(word @ ("show" | "check")) => return saved::main(word, arguments()),
        _ => {}
    }
    if std::env::args_os().skip(1).eq(["--trace", "help"]) {
        return ExitCode::from(if print_text(&trace::help()) { EXIT_CLEAN } else { EXIT_HOST });
    }
    let Parsed { mut config, incoming, verbose, boot_timing, explain, trace } =
        match arguments::parse() {
            Ok(parsed) => parsed,
            Err(status) => return status,
        };
    let trace = trace.filter(|_| explain.is_none());
    let (trace, layer) =
        trace.map(|options| Trace::new(&options, messages::Stderr, print_message)).unzip();
    messages::start_log(verbose, boot_timing.then_some(started), layer);
    tracing::info!(target: boot_timing::TARGET, "arguments");
    // The disks are opened by the files' numbers.
    let _images = match directory_disk::make(&mut config) {
        Ok(images) => images,
        Err(error) => return fail(&error, error.is_usage()),
    };
    if let Some(format) = explain {
        let explained = vmm::explain(&config).map(|machine| match format {
            ExplainFormat::Text => machine.text,
            ExplainFormat::Svg => explain_view::draw(&machine),
        });
        return match explained {
            Ok(text) => ExitCode::from(if print_text(&text) { EXIT_CLEAN } else { EXIT_HOST }),
            Err(error) => fail(&error, error.is_usage()),
        };
    }
    if let Err(why) = inherited::keep_time_for_the_end() {
        return refuse(why);
    }
    messages::never_wait();
    let ended = run(&mut config, incoming);
    if let Some(trace) = trace {
        trace.finish();
    }
    match ended {
        Ok(outcome) => ExitCode::from(exit_status(&outcome, &config)),
        Err(error) => fail(&error, error.is_usage()),
    }
}

/// Says why no VM can run on this host.
fn refuse(why: &str) -> ExitCode {
    print_message(why);
    ExitCode::from(EXIT_HOST)
}

/// Prints the error with its causes. Returns the exit status for the user's mistake or the host's fault.
fn fail(error: &(dyn std::error::Error + 'static), is_usage: bool) -> ExitCode {
    print_message(&vmm::WithCauses(error).to_string());
    ExitCode::from(if is_usage { EXIT_USAGE } else { EXIT_HOST })
}

fn run(config: &mut VmConfig, incoming: Option<IncomingOption>) -> Result<Outcome, vmm::Error> {
    wait_for_storage(config, incoming.as_ref());
    let signals = vmm::Signals::block()?;
    let incoming = match incoming {
        None => None,
        Some(IncomingOption::File(options)) => Some(Incoming::open(options, config)?),
        Some(IncomingOption::Defer(options)) => {
            match vmm::wait_for_incoming(config, &options, &signals)? {
                Awaited::Incoming(incoming) => Some(*incoming),
                Awaited::Quit => return Ok(Outcome::ControlQuit),
                Awaited::Signal(signal) => return Ok(Outcome::Signal(signal)),
                Awaited::Timeout => return Ok(Outcome::Timeout),
            }
        }
    };
    let vm = vmm::build(config, incoming, signals)?;
    if let Some(warning) = vmm::missing_hardware_support() {
        tracing::warn!("{warning}");
    }
    // Only now: a machine that could not be built leaves the terminal alone.
    let _raw = terminal::RawMode::enter(config);
    service::ready();
    vm.run()
}

/// Reads from each file while signals still have their default action. If the storage does not answer, a signal can end the read. Other
/// errors of a file are found when it is opened.
fn wait_for_storage(config: &VmConfig, incoming: Option<&IncomingOption>) {
    let incoming = match incoming {
        Some(IncomingOption::File(options)) => Some(&options.path),
        _ => None,
    };
    let disks = config.disks.iter().map(|disk| &disk.image.path);
    for path in [&config.kernel].into_iter().chain(&config.initrd).chain(incoming).chain(disks) {
        if path.is_file()
            && let Ok(file) = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
        {
            let _ = file.read_at(&mut [0], 0);
        }
    }
}

/// The exit status. Prints how the VM ended, if the guest's output does not show it.
fn exit_status(outcome: &Outcome, config: &VmConfig) -> u8 {
    if let Outcome::Signal(signal) = outcome
        && ![libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(signal)
    {
        print_message(&format!("signal {signal} ended the VM; `kill -l {signal}` names it"));
    }
    match outcome {
        Outcome::PowerOff | Outcome::Reset if config.debug_exit => {
            print_message("--debug-exit: the guest ended without writing a byte to I/O port 0xf4");
            EXIT_NO_STATUS
        }
        Outcome::PowerOff | Outcome::Reset if config.exec.is_some() => {
            let how = if *outcome == Outcome::Reset { "rebooted" } else { "powered off" };
            print_message(&format!(
                "--exec: the guest {how} before the command's status was known"
            ));
            EXIT_NO_STATUS
        }
        // Unlike `quit`, a signal comes from a program that was not asked to judge the guest: a CI runner that cancels a job.
        Outcome::Signal(_) if config.debug_exit => {
            print_message(
                "--debug-exit: a signal ended the VM before the guest wrote a byte to I/O port 0xf4",
            );
            EXIT_NO_STATUS
        }
        Outcome::Quit | Outcome::ControlQuit | Outcome::Signal(_) if config.exec.is_some() => {
            print_message("--exec: the VM was ended before the command's status was known");
            EXIT_NO_STATUS
        }
        Outcome::PowerOff
        | Outcome::Reset
        | Outcome::Quit
        | Outcome::Signal(_)
        | Outcome::ControlQuit => EXIT_CLEAN,
        Outcome::DebugExit(status) => *status,
        Outcome::Panicked(how) => {
            print_message(&format!("the guest panicked ({how})"));
            EXIT_GUEST_PANIC
        }
        Outcome::Timeout => {
            print_message("--timeout: the time is up; the VM ended");
            EXIT_TIMEOUT
        }
    }
}

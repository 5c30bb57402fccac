//! The minivmm command: arguments in, a machine run, an exit status out.

mod args;
mod ctl;
mod disk_option;
mod log;
mod processors;
mod size;
mod terminal;

use std::process::ExitCode;

use log::say;
use vmm::{Moment, Outcome, VmConfig};

/// A clean end: poweroff, reboot, `Ctrl-A x`, SIGTERM, SIGINT.
const EXIT_CLEAN: u8 = 0;
/// The host failed us.
const EXIT_HOST: u8 = 1;
/// The arguments are at fault; nothing was created or changed.
const EXIT_USAGE: u8 = 2;
/// The guest panicked.
const EXIT_GUEST_PANIC: u8 = 3;
/// `--timeout` passed: the status that timeout(1) uses.
const EXIT_TIMEOUT: u8 = 124;

fn main() -> ExitCode {
    let started = Moment::now();
    if std::env::args_os().nth(1).is_some_and(|word| word == "ctl") {
        return ctl::main(std::env::args_os().skip(2));
    }
    let (config, verbose) = match args::parse(started) {
        Ok(parsed) => parsed,
        Err(status) => return status,
    };
    log::start(verbose);
    match run(&config) {
        Ok(outcome) => status(&outcome),
        Err(error) => {
            say(&error.to_string());
            ExitCode::from(if error.is_usage() { EXIT_USAGE } else { EXIT_HOST })
        }
    }
}

fn run(config: &VmConfig) -> Result<Outcome, vmm::Error> {
    let signals = vmm::Signals::block()?;
    let vm = vmm::build(config, signals)?;
    if let Some(warning) = vmm::missing_hardware_support() {
        tracing::warn!("{warning}");
    }
    // Only now: a machine that could not be built leaves the terminal alone.
    let _raw = terminal::RawMode::enter(config);
    vm.run()
}

/// Says how the VM ended where that is not plain from the guest's own output.
fn status(outcome: &Outcome) -> ExitCode {
    ExitCode::from(match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Quit | Outcome::Signal(_) | Outcome::ControlQuit => EXIT_CLEAN,
        Outcome::DebugExit(status) => *status,
        Outcome::Panicked(how) => {
            say(&format!("the guest panicked ({how})"));
            EXIT_GUEST_PANIC
        }
        Outcome::Timeout => {
            say("--timeout: the time is up; the VM was stopped");
            EXIT_TIMEOUT
        }
        Outcome::Failed(why) => {
            say(&format!("the VM was stopped: {why}"));
            EXIT_HOST
        }
    })
}

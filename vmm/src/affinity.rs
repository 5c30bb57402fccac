//! Pins threads to host CPUs (`--vcpu-affinity`, `--io-affinity`).
//!
//! The builder checks both lists before it creates anything, and starts vCPUs and disks inside [`start_on`]. A new thread inherits the
//! affinity of its creator, so the threads of a disk's engines are pinned, too.

mod cpu_pm;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

pub(crate) use self::cpu_pm::{hints, keep_idle_in_guest};
use crate::config::VmConfig;
use crate::error::Error;

/// A host CPU that this process may not use.
#[derive(Debug, thiserror::Error)]
#[error("{option} {processor}: this process may use the host's CPUs {allowed}; name some of them")]
struct NotAllowed {
    option: &'static str,
    processor: usize,
    allowed: String,
}

/// Checks that this process may use the host CPUs that the options name.
///
/// # Errors
/// One line that says which it may use.
pub(crate) fn check(config: &VmConfig) -> Result<(), Error> {
    check_option("--vcpu-affinity", &config.vcpu_affinity)?;
    check_option("--io-affinity", &config.io_affinity)
}

fn check_option(option: &'static str, processors: &[usize]) -> Result<(), Error> {
    if processors.is_empty() {
        return Ok(());
    }
    let allowed = sched_getaffinity(None).map_err(|error| failed(error.into()))?;
    let is_allowed = |processor: &usize| *processor < CpuSet::MAX_CPU && allowed.is_set(*processor);
    match processors.iter().find(|processor| !is_allowed(processor)) {
        None => Ok(()),
        Some(&processor) => {
            let allowed: Vec<_> = (0..CpuSet::MAX_CPU)
                .filter(|cpu| allowed.is_set(*cpu))
                .map(|cpu| cpu.to_string())
                .collect();
            let allowed = allowed.join(",");
            Err(Error::Refused(NotAllowed { option, processor, allowed }.into()))
        }
    }
}

/// Runs `start`. Its threads, and the threads that these start, stay on `processors`. An empty list pins nothing.
///
/// # Errors
/// Those of `start`, or the host refuses.
pub(crate) fn start_on<T>(
    processors: &[usize],
    start: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    if processors.is_empty() {
        return start();
    }
    // A thread begins where the one that starts it may run (pthread_create(3)).
    let before = sched_getaffinity(None).map_err(|error| failed(error.into()))?;
    let mut set = CpuSet::new();
    processors.iter().for_each(|processor| set.set(*processor));
    sched_setaffinity(None, &set).map_err(|error| failed(error.into()))?;
    let started = start();
    sched_setaffinity(None, &before).map_err(|error| failed(error.into()))?;
    started
}

fn failed(source: std::io::Error) -> Error {
    Error::Host { what: "choose a thread's processors", source }
}

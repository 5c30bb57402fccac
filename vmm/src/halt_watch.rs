//! Notices a guest that has halted for good, as by `halt -f` or after a panic with `panic=0`: every vCPU waits in HLT with interrupts
//! disabled, or was never started. Otherwise the user would wait for ever. The machine warns once each time, and goes on: a debugger or a
//! reset may follow.
//!
//! The builder adds one row to the main loop. Every [`INTERVAL`] it looks whether a vCPU thread has used CPU time, which costs the guest
//! nothing. Only if none has does the machine stand still and look at the vCPUs' state ([`Machine::look_for_halt`]). A Linux guest that
//! is merely idle runs more often.

use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::error::Error;
use crate::machine::{Machine, RunState};
use crate::sources::{Poller, Source};
use crate::vcpu::VcpuThread;

/// Long enough for an idle guest's timer to come, short enough for a person to wait.
const INTERVAL: Duration = Duration::from_secs(5);

pub(crate) struct HaltWatch {
    timer: TimerFd,
    /// The CPU time of the vCPUs' threads at the last look.
    used: Option<Duration>,
}

impl HaltWatch {
    pub(crate) fn start() -> Result<Self, Error> {
        let timer = TimerFd::new().and_then(|mut timer| {
            timer.reset(INTERVAL, None)?;
            Ok(Self { timer, used: None })
        });
        timer.map_err(|error| Error::host("start a timer")(error.into()))
    }
}

impl Source for HaltWatch {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add_edges(&self.timer, 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, machine: &mut Machine) {
        // An expiry that is not read is the last of an interval.
        if let Err(error) = self.timer.reset(INTERVAL, None) {
            tracing::debug!(%error, "a guest that halts for good is not reported any more");
        }
        let vcpus = machine.hardware.vcpus.iter();
        let used: Option<Duration> = vcpus.map(VcpuThread::cpu_time).sum();
        if used.is_some() && self.used == used && machine.state() == RunState::Running {
            machine.look_for_halt();
        }
        self.used = used;
    }
}

//! `--timeout`: ends the VM when the time is over.
//!
//! A capability: the builder adds it to the main loop as a source, and nothing else knows it.

use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::error::Error;
use crate::machine::{Machine, Outcome};
use crate::sources::{Poller, Source};

/// The builder starts the clock before its first step, so that the limit counts the time that building takes.
pub(crate) struct Timeout(TimerFd);

impl Timeout {
    pub(crate) fn start(limit: Duration) -> Result<Self, Error> {
        let started = TimerFd::new().and_then(|mut timer| {
            // A timer set to zero never expires.
            timer.reset(limit.max(Duration::from_nanos(1)), None)?;
            Ok(timer)
        });
        started.map(Self).map_err(|error| Error::host("start the --timeout timer")(error.into()))
    }
}

impl Source for Timeout {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add_edges(&self.0, 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, machine: &mut Machine) {
        machine.end(Ok(Outcome::Timeout));
    }
}

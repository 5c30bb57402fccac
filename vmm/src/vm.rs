//! A machine that is built: run it, and end it in order.

use crate::error::Error;
use crate::event_loop::{Ended, MainLoop, Outcome};

/// Owns every thread and resource of the machine.
pub struct Vm {
    pub(crate) main_loop: MainLoop,
    /// The guest waits for a control client to let it run.
    pub(crate) paused: bool,
    /// The guest may read the disks' registers without an exit.
    pub(crate) map_registers: bool,
}

impl Vm {
    /// Runs the guest until it, the user or the host ends it; then stops the vCPUs, drains and flushes the disks, and
    /// hands the last console output over.
    ///
    /// # Errors
    /// When the host fails us, or the disks could not be flushed.
    pub fn run(mut self) -> Result<Outcome, Error> {
        if !self.paused {
            self.main_loop.start();
        }
        if self.map_registers {
            self.main_loop.map_registers();
        }
        let Ended { outcome, machine, console, control } = self.main_loop.run()?;
        let ended = machine.end();
        console.output.finish();
        // Last: to its clients the end of the connection is the end of the VM.
        drop(control);
        ended.map(|()| outcome)
    }
}

//! Warns that the guest has halted for good: at a standstill it checks whether any vCPU can still run by itself. The warning comes once
//! until a reset. `halt_watch` asks for the check.

use super::{Machine, Task};
use crate::error::Error;
use crate::vcpu::Vcpu;

struct HaltReport;

impl Machine {
    /// Warns if no vCPU can ever run again by itself. Once, until a reset.
    pub(crate) fn look_for_halt(&mut self) {
        if !self.halt_reported && self.standstill.is_none() && self.end.is_none() {
            self.stand_still(|standstill| standstill.tasks.push_front(Box::new(HaltReport)));
        }
    }

    /// Everything stands still.
    fn report_halt(&mut self) {
        let vcpus = &self.hardware.vcpus;
        self.halt_reported =
            vcpus.iter().all(|vcpu| vcpu.with_paused(Vcpu::is_halted_for_good).unwrap_or(false));
        if self.halt_reported {
            tracing::warn!(
                "the guest has halted for good: every vCPU waits with interrupts disabled; end the VM (Ctrl-A x, SIGTERM) \
                 or reset it (`minivmm ctl SOCKET reset`)"
            );
        }
    }
}

impl Task for HaltReport {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        machine.report_halt();
        Ok(true)
    }
}

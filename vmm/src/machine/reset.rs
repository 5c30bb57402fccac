//! A reset: the guest starts again, and everything that it can see is as at power-on.
//!
//! A capability: QMP's `system_reset` asks for it. It hooks in as a [`Task`] of the machine's standstill. First it resets the devices,
//! which may have to wait for the host's disk. When every other task is over, it resets interrupt controllers, memory and vCPUs.

use std::any::Any;
use std::time::Instant;

use kvm_bindings::kvm_clock_data;

use super::{Hardware, Machine, MachineEvent, RunState, Task};
use crate::background::Answer;
use crate::error::Error;
use crate::memory;

#[derive(Debug, thiserror::Error)]
#[error("a device did not finish its reset in time; check the storage behind the disks")]
struct ResetHung;

#[derive(Default)]
struct Reset {
    /// Answers when the threads of all devices have finished the reset. `None`: it has not begun.
    devices: Option<Answer>,
}

impl Machine {
    /// Begins a reset, as by a reset button. Devices, interrupt controllers and vCPUs become as at power-on, and RAM has only what the
    /// boot image puts there. A machine that was stopped stays stopped. Returns the number of the `Done` event.
    ///
    /// # Errors
    /// A file of the boot image was changed since it was loaded, or the machine is about to end. Nothing has changed then.
    pub(crate) fn reset(&mut self) -> Result<u64, Error> {
        if self.end.is_some() {
            return Err(Error::Stopping);
        }
        self.hardware.boot_image.as_ref().ok_or(Error::NoBootImage)?.check_unchanged()?;
        Ok(self.stand_still(|standstill| {
            // If a reset is under way, a second one joins it.
            if !standstill.tasks.iter().any(|task| (&**task as &dyn Any).is::<Reset>()) {
                standstill.tasks.push_back(Box::new(Reset::default()));
            }
        }))
    }

    /// Begins to reset the devices. The machine's background thread waits until their threads have finished.
    fn reset_devices(&self, began: Instant) -> Answer {
        let deadline = began + self.stop_timeout;
        let unfinished: Vec<_> = self.hardware.buses.iter().flat_map(|bus| bus.reset()).collect();
        let wait = move || {
            let hung =
                unfinished.into_iter().filter_map(|reset| reset.wait_until(deadline)).count();
            if hung == 0 { Ok(()) } else { Err(Error::Capability(Box::new(ResetHung))) }
        };
        self.background.run(wait)
    }

    /// Resets interrupt controllers, memory and vCPUs. The devices have been reset, no vCPU runs, and no disk uses guest memory.
    fn restart(&mut self) -> Result<(), Error> {
        let Hardware { vcpus, memory, vm, reset_irq_chips, boot_image, .. } = &self.hardware;
        reset_irq_chips(vm)?;
        memory::clear(memory)?;
        let entry = boot_image.as_ref().ok_or(Error::NoBootImage)?.load(memory)?;
        for vcpu in vcpus {
            vcpu.with_paused(|vcpu| vcpu.reset(&entry))?;
        }
        self.clock = Some(kvm_clock_data::default());
        self.state = RunState::Prelaunch;
        self.halt_reported = false;
        Ok(())
    }
}

impl Task for Reset {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        if self.devices.is_none() {
            let began = machine.standstill.as_ref().map_or_else(Instant::now, |still| still.began);
            self.devices = Some(machine.reset_devices(began));
        }
        let answer = self.devices.as_ref().and_then(Answer::poll);
        answer.map_or(Ok(false), |result| result.map(|()| true))
    }

    fn is_irrevocable(&self) -> bool {
        self.devices.is_some()
    }

    fn finish(&mut self, machine: &mut Machine) -> Result<(), Error> {
        machine.restart()?;
        machine.emit(MachineEvent::Reset { by_guest: false });
        Ok(())
    }
}

//! A reset: the guest starts again, and everything that it can see is as at power-on.
//!
//! A capability: QMP's `system_reset` asks for it. It hooks in as a [`Task`] of the machine's standstill. It resets the devices first,
//! which may have to wait for the host. If a device has not finished after `--stop-timeout`, the VM ends. When every other task is over,
//! interrupt controllers and vCPUs get their state at power-on ([`PowerOn`]), memory is cleared, and the boot image is loaded again.

use std::any::Any;
use std::mem;
use std::sync::Arc;
use std::time::Instant;

use devices::bus::{BusDevice, Unfinished};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VmFd};

use super::{Hardware, Machine, MachineDisk, MachineEvent, RunState, Task};
use crate::error::Error;
use crate::irq_chips::IrqChips;
use crate::lock;
use crate::memory;
use crate::vcpu::{VcpuState, VcpuThread};

/// The state of KVM's devices and vCPUs at power-on. KVM has no calls that reset them, so a reset writes this back.
pub(crate) struct PowerOn {
    irq_chips: IrqChips,
    vcpus: Vec<VcpuState>,
}

impl PowerOn {
    /// Reads it, before a vCPU has run. `nested`: the guest may run guests of its own.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub(crate) fn read(
        kvm: &Kvm,
        vm: &VmFd,
        vcpus: &[VcpuThread],
        nested: bool,
    ) -> Result<Self, Error> {
        let read =
            |vcpu: &VcpuThread| vcpu.with_paused(|vcpu| VcpuState::at_power_on(vcpu, kvm, nested));
        let vcpus = vcpus.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Self { irq_chips: IrqChips::read(vm)?, vcpus })
    }

    /// Writes it back. No vCPU runs.
    ///
    /// # Errors
    /// When KVM refuses a part of it.
    pub(crate) fn write(&self, hardware: &Hardware) -> Result<(), Error> {
        self.irq_chips.write(&hardware.vm)?;
        for (vcpu, state) in hardware.vcpus.iter().zip(&self.vcpus) {
            vcpu.with_paused(|vcpu| {
                vcpu.unfinished = None;
                state.write(&vcpu.fd)
            })?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Reset {
    /// The devices whose threads have not finished the reset, and when it began. `None`: it has not begun.
    devices: Option<(Instant, Vec<Unfinished>)>,
}

impl Machine {
    /// Begins a reset, as by a reset button. A machine that was stopped stays stopped. Returns the number of the `Done` event.
    ///
    /// # Errors
    /// A file of the boot image was changed since it was loaded, or the machine is about to end. Nothing has changed then.
    pub(crate) fn reset(&mut self) -> Result<u64, Error> {
        if self.end.is_some() {
            return Err(Error::Ending);
        }
        self.hardware.boot_image.as_ref().ok_or(Error::NoBootImage)?.check_unchanged()?;
        Ok(self.stand_still(|standstill| {
            // If a reset is under way, a second one joins it.
            if !standstill.tasks.iter().any(|task| (&**task as &dyn Any).is::<Reset>()) {
                standstill.tasks.push_back(Box::new(Reset::default()));
            }
        }))
    }

    /// Begins to reset the devices, and starts the timer of the deadline. Returns the time when this began, and the devices whose threads
    /// have still to finish. Each of them wakes the main loop then.
    fn reset_devices(&mut self) -> (Instant, Vec<Unfinished>) {
        // Read before the timer starts, so that the whole time has passed when the timer expires.
        let began = Instant::now();
        self.start_deadline(self.stop_timeout);
        let unfinished: Vec<_> = self.hardware.buses.iter().flat_map(|bus| bus.reset()).collect();
        for device in &unfinished {
            let main_loop = Arc::clone(&self.wake_main_loop);
            device.on_done(move || main_loop.wake());
        }
        (began, unfinished)
    }

    /// Resets interrupt controllers, vCPUs and memory, and boots again. The devices have been reset, no vCPU runs, and no disk uses guest memory.
    fn boot_again(&mut self) -> Result<(), Error> {
        let Hardware { vcpus, memory, power_on, boot_image, .. } = &self.hardware;
        power_on(&self.hardware)?;
        memory::clear(memory)?;
        let entry = boot_image.as_ref().ok_or(Error::NoBootImage)?.load(memory)?;
        for vcpu in vcpus {
            vcpu.with_paused(|vcpu| vcpu.set_boot_registers(&entry))?;
        }
        self.clock = Some(kvm_clock_data::default());
        self.state = RunState::Prelaunch;
        self.halt_reported = false;
        Ok(())
    }
}

/// Whether the disk's threads have finished the reset. No vCPU runs, so no thread waits in the transport with its lock.
fn has_reset(disk: &MachineDisk) -> bool {
    lock(&disk.transport).draining().is_none_or(|drain| drain.is_done())
}

impl Task for Reset {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        let (began, unfinished) = self.devices.get_or_insert_with(|| machine.reset_devices());
        *unfinished = mem::take(unfinished).into_iter().filter_map(Unfinished::poll).collect();
        match unfinished.is_empty() {
            false if began.elapsed() >= machine.stop_timeout => {
                Err(machine.hung(*began, has_reset).unwrap_or(Error::Busy))
            }
            done => Ok(done),
        }
    }

    fn is_irrevocable(&self) -> bool {
        self.devices.is_some()
    }

    fn finish(&mut self, machine: &mut Machine) -> Result<(), Error> {
        machine.boot_again()?;
        machine.emit(MachineEvent::Reset { by_guest: false });
        Ok(())
    }
}

//! The machine's chips inside KVM that no vCPU owns, as KVM made them: the state to go back to at a reset.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;

use crate::error::Error;

/// Two 8259s, the IOAPIC, and the interval timer.
pub(crate) struct Chips {
    interrupt_controllers: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
}

impl Chips {
    /// Reads the state of a VM that has just been made.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub(crate) fn of(vm: &VmFd) -> Result<Self, Error> {
        let failed = || Error::kvm("read the interrupt controllers' state");
        let mut interrupt_controllers = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        interrupt_controllers.iter_mut().try_for_each(|chip| vm.get_irqchip(chip)).map_err(failed())?;
        Ok(Self { interrupt_controllers, timer: vm.get_pit2().map_err(failed())? })
    }

    /// Puts the state back.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        let failed = || Error::kvm("reset the interrupt controllers");
        vm.set_pit2(&self.timer).map_err(failed())?;
        self.interrupt_controllers.iter().try_for_each(|chip| vm.set_irqchip(chip)).map_err(failed())
    }
}

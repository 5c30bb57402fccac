//! KVM's interrupt controllers and timer as a value: read at power-on, and written back at a reset. A restore writes them after the local
//! APICs (`vcpu::state`), because a pin that was pending is delivered at once.
//!
//! A capability: the builder has them read, and gives the machine a function that writes them back (`machine::reset`).

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Two 8259s, the IOAPIC, and the interval timer.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct IrqChips {
    interrupt_controllers: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
}

impl IrqChips {
    pub(crate) fn read(vm: &VmFd) -> Result<Self, Error> {
        let failed = || Error::kvm("read the interrupt controllers' state");
        let mut interrupt_controllers =
            [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
                .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        interrupt_controllers
            .iter_mut()
            .try_for_each(|chip| vm.get_irqchip(chip))
            .map_err(failed())?;
        Ok(Self { interrupt_controllers, timer: vm.get_pit2().map_err(failed())? })
    }

    pub(crate) fn write(&self, vm: &VmFd) -> Result<(), Error> {
        let failed = || Error::kvm("write the interrupt controllers' state");
        vm.set_pit2(&self.timer).map_err(failed())?;
        self.interrupt_controllers
            .iter()
            .try_for_each(|chip| vm.set_irqchip(chip))
            .map_err(failed())
    }
}

//! The registers that the driver writes as one value, and what it may write when (virtio 1.2 §2.2, §3.1).
//!
//! The transport decodes each access and asks this value; the registers that the driver reads are in the
//! [register page](crate::virtio::registers::RegisterPage).

use serde::{Deserialize, Serialize};

use super::queue_registers::{QueuePhase, QueueRegisters, set_half};
use crate::virtio::spec::{
    F_VERSION_1, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FAILED, STATUS_FEATURES_OK,
};

/// The registers that the driver writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DriverRegisters {
    /// Feature bits that the driver wrote. They are negotiated when FEATURES_OK is set.
    pub(super) accepted: u64,
    /// The driver accepted a bit of 64 or more. There are none, so that FEATURES_OK is refused until a reset.
    pub(super) accepted_unknown: bool,
    /// The device status without DEVICE_NEEDS_RESET, which is the device's.
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) queue_sel: u32,
    /// ConfigGeneration when the driver could first look, at FEATURES_OK.
    pub(super) generation: u32,
    pub(super) queues: Vec<QueueRegisters>,
}

impl DriverRegisters {
    pub(super) fn new(queues: Vec<QueueRegisters>) -> Self {
        Self { queues, ..Self::default() }
    }

    /// As at power-on.
    pub(super) fn reset(&mut self) {
        let queues = self.queues.iter().map(|queue| QueueRegisters::at_power_on(queue.max_size));
        *self = Self::new(queues.collect());
    }

    /// The negotiated feature bits, 0 before FEATURES_OK.
    pub(super) fn features(&self) -> u64 {
        if self.status & STATUS_FEATURES_OK != 0 { self.accepted } else { 0 }
    }

    /// DriverFeatures. The driver may choose between DRIVER and FEATURES_OK (§3.1.1).
    pub(super) fn accept_features(&mut self, value: u32) -> Result<(), &'static str> {
        if self.status & (STATUS_DRIVER | STATUS_FEATURES_OK) != STATUS_DRIVER {
            return Err("the driver chose features outside of feature negotiation");
        }
        match self.driver_features_sel {
            half @ (0 | 1) => set_half(&mut self.accepted, half, value),
            _ => self.accepted_unknown |= value != 0,
        }
        Ok(())
    }

    /// Whether the driver's choice of features can stand (§2.2.2, §6.1).
    pub(super) fn check_features(&self, offered: u64) -> Result<(), &'static str> {
        if self.accepted_unknown || self.accepted & !offered != 0 {
            Err("the driver accepted features that are not on offer")
        } else if self.accepted & F_VERSION_1 == 0 {
            Err("the driver did not accept VERSION_1; legacy drivers are not supported")
        } else {
            Ok(())
        }
    }

    /// The queue that QueueSel names, if there is one.
    pub(super) fn selected_index(&self) -> Option<u16> {
        let index = u16::try_from(self.queue_sel).ok();
        index.filter(|index| usize::from(*index) < self.queues.len())
    }

    pub(super) fn queue(&self, index: u16) -> &QueueRegisters {
        &self.queues[usize::from(index)]
    }

    /// The index of the selected queue, if its registers may be written: between FEATURES_OK and DRIVER_OK, or after its reset in a
    /// `started` device, and not while it is enabled.
    pub(super) fn configurable(&self, started: bool) -> Option<u16> {
        let settled = STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_FAILED;
        let phase = match self.status & settled {
            STATUS_FEATURES_OK => QueuePhase::Disabled,
            _ if started => QueuePhase::Reset,
            _ => return None,
        };
        self.selected_index().filter(|index| self.queue(*index).phase == phase)
    }
}

//! The transport as a value, to be saved while the machine stands still and put back into a new one.
//!
//! A capability: the transport does without it. It hooks in as a child of the transport's module, whose fields it reads and
//! writes, and adds [`MmioTransport::save`] and [`MmioTransport::restore`].

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::QueueT;

use super::driver_registers::DriverRegisters;
use super::{Activity, MmioTransport};
use crate::virtio::device::{ActiveQueue, RingIndices};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::registers::CONFIG_SIZE;
use crate::virtio::spec::STATUS_DEVICE_NEEDS_RESET;
use crate::virtio::spec::mmio::Register;

/// Everything that a driver can see of a device behind [`MmioTransport`], but for guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    pub(super) device_id: u32,
    pub(super) registers: DriverRegisters,
    pub(super) interrupt: InterruptState,
    /// The configuration space as the driver last saw it.
    pub(super) config: Vec<u8>,
    /// The device has its queues.
    pub(super) started: bool,
    /// Those of each queue that the device has.
    #[serde(rename = "positions")]
    pub(super) ring_indices: Vec<RingIndices>,
}

/// Why a saved state does not fit a device.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The device is of another type.
    #[error("the saved device has type {saved}, this one {present}")]
    DeviceId {
        /// Saved device ID.
        saved: u32,
        /// The present device's ID.
        present: u32,
    },
    /// The driver uses features that this device does not offer.
    #[error("the guest's driver uses features {0:#x}, which this device does not offer")]
    Features(u64),
    /// The device has other queues.
    #[error("the saved device has other queues than this one")]
    Queues,
    /// The device refused to start from the saved rings.
    #[error("the device did not start")]
    Start(#[source] std::io::Error),
}

impl TransportState {
    /// Whether this state fits a device of that type, with those features on offer, that has `registers` now.
    pub(super) fn check(
        &self,
        present: u32,
        offered: u64,
        registers: &DriverRegisters,
    ) -> Result<(), RestoreError> {
        let sizes = |registers: &DriverRegisters| {
            registers.queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>()
        };
        let saved = self.device_id;
        if saved != present {
            return Err(RestoreError::DeviceId { saved, present });
        }
        if sizes(&self.registers) != sizes(registers) {
            return Err(RestoreError::Queues);
        }
        match self.registers.features() & !offered {
            0 => Ok(()),
            missing => Err(RestoreError::Features(missing)),
        }
    }
}

/// The registers of an [`Interrupt`] as a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InterruptState {
    pub(crate) status: u32,
    /// DEVICE_NEEDS_RESET is set in the device status.
    needs_reset: bool,
    config_generation: u32,
}

impl MmioTransport {
    /// The transport as a value, of a machine that stands still: no vCPU runs and the device is paused. `None`: a reset still
    /// waits for the host.
    pub fn save(&mut self) -> Option<TransportState> {
        self.catch_up();
        let (started, ring_indices) = match self.activity {
            Activity::Idle => (false, Vec::new()),
            Activity::Started => (true, self.device.ring_indices()),
            Activity::ResettingQueue(..) | Activity::Resetting(_) => return None,
        };
        let mut config = vec![0; CONFIG_SIZE];
        self.device.read_config(0, &mut config, self.registers.features());
        Some(TransportState {
            device_id: self.device.device_id(),
            registers: self.registers.clone(),
            interrupt: self.interrupt.save(),
            config,
            started,
            ring_indices,
        })
    }

    /// Puts a saved state into this new transport. If the device was started, it starts again where it was, looks at each
    /// ring once without a notification, and interrupts once, when it goes on.
    ///
    /// # Errors
    /// When the state does not fit the device. The transport is then of no use.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        state.check(self.device.device_id(), self.offered, &self.registers)?;
        self.registers = state.registers.clone();
        self.device.restore_config(&state.config);
        self.interrupt.show_config(|config| {
            config.iter_mut().zip(&state.config).for_each(|(to, from)| *to = *from)
        });
        self.interrupt.restore(&state.interrupt);
        self.page().set(Register::Status, self.registers.status);
        if state.started {
            let go_on = |active: &mut ActiveQueue| {
                let mut indices = state.ring_indices.iter();
                if let Some(at) = indices.find(|indices| indices.queue == active.index) {
                    active.queue.set_next_avail(at.next_available);
                    active.queue.set_next_used(at.next_used);
                    active.restored = true;
                }
            };
            self.start(go_on).map_err(RestoreError::Start)?;
        }
        self.publish();
        // The image may have another size by now.
        if self.page().load(Register::ConfigGeneration) != state.interrupt.config_generation {
            self.interrupt.config_changed();
        }
        Ok(())
    }
}

impl Interrupt {
    /// `STATUS_DEVICE_NEEDS_RESET` or 0.
    pub fn needs_reset(&self) -> u32 {
        self.page().load(Register::Status) & STATUS_DEVICE_NEEDS_RESET
    }

    /// The registers, of a device whose threads are paused.
    pub(crate) fn save(&self) -> InterruptState {
        self.collect_acknowledgements();
        InterruptState {
            status: self.status(),
            needs_reset: self.needs_reset() != 0,
            config_generation: self.page().load(Register::ConfigGeneration),
        }
    }

    /// Puts saved registers back. The status register's other bits are the transport's.
    pub(crate) fn restore(&self, state: &InterruptState) {
        self.page().store(Register::InterruptStatus, state.status);
        self.page().store(Register::ConfigGeneration, state.config_generation);
        if state.needs_reset {
            self.page().set(Register::Status, STATUS_DEVICE_NEEDS_RESET);
        }
    }
}

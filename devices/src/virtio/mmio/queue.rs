//! The queues' registers: what the driver configures, and the rings that come of it (virtio 1.2 §4.2.3.2, §2.6.1).

use std::io;

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::MmioTransport;
use crate::GuestMemory;
use crate::virtio::device::ActiveQueue;
use crate::virtio::spec::mmio::Register;
use crate::virtio::spec::{F_EVENT_IDX, F_RING_RESET, STATUS_DRIVER_OK, STATUS_FAILED, STATUS_FEATURES_OK};

/// How far a queue has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not in use; can be configured until DRIVER_OK.
    Disabled,
    /// QueueReady is 1: its registers are settled, and the device has it when running.
    Enabled,
    /// Taken back from the running device; can be configured and enabled anew.
    Reset,
}

/// One queue as the driver describes it. The values are kept as written and judged when the queue is enabled.
pub(super) struct QueueRegisters {
    max_size: u16,
    pub(super) phase: Phase,
    size: u32,
    /// Guest-physical addresses.
    descriptor_table: u64,
    available_ring: u64,
    used_ring: u64,
}

/// Why the driver's values do not make a queue.
#[derive(Debug, Error)]
pub(super) enum QueueError {
    #[error("queue size {0} is not a power of two up to the maximum")]
    Size(u32),
    #[error("a ring is misaligned: {0}")]
    Alignment(virtio_queue::Error),
    #[error("the {0} at {1:#x} is outside of guest memory")]
    OutsideMemory(&'static str, u64),
}

impl QueueRegisters {
    /// # Errors
    /// When the device's own maximum is not a queue size.
    pub(super) fn new(max_size: u16) -> io::Result<Self> {
        Queue::new(max_size).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let mut queue =
            Self { max_size, phase: Phase::Disabled, size: 0, descriptor_table: 0, available_ring: 0, used_ring: 0 };
        queue.reset(Phase::Disabled);
        Ok(queue)
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn reset(&mut self, phase: Phase) {
        let (max_size, size) = (self.max_size, self.max_size.into());
        *self = Self { max_size, phase, size, descriptor_table: 0, available_ring: 0, used_ring: 0 };
    }

    fn write(&mut self, register: Register, value: u32) {
        match register {
            Register::QueueNum => self.size = value,
            Register::QueueDescLow => set_low(&mut self.descriptor_table, value),
            Register::QueueDescHigh => set_high(&mut self.descriptor_table, value),
            Register::QueueDriverLow => set_low(&mut self.available_ring, value),
            Register::QueueDriverHigh => set_high(&mut self.available_ring, value),
            Register::QueueDeviceLow => set_low(&mut self.used_ring, value),
            Register::QueueDeviceHigh => set_high(&mut self.used_ring, value),
            _ => {}
        }
    }

    /// The ring that these registers describe, in its initial state.
    fn build(&self, memory: &GuestMemory, features: u64) -> Result<Queue, QueueError> {
        let size = u16::try_from(self.size).map_err(|_| QueueError::Size(self.size))?;
        let mut queue = Queue::new(self.max_size).map_err(|_| QueueError::Size(self.size))?;
        queue.try_set_size(size).map_err(|_| QueueError::Size(self.size))?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptor_table)).map_err(QueueError::Alignment)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available_ring)).map_err(QueueError::Alignment)?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring)).map_err(QueueError::Alignment)?;
        // Sizes in bytes from §2.7, suppression fields included. This is Queue::is_valid, which writes to the log each
        // time: too often for a question that a guest can ask in a loop.
        let size = usize::from(size);
        for (name, address, length, access) in [
            ("descriptor table", self.descriptor_table, 16 * size, Permissions::Read),
            ("available ring", self.available_ring, 6 + 2 * size, Permissions::Read),
            ("used ring", self.used_ring, 6 + 8 * size, Permissions::Write),
        ] {
            if !memory.check_range(GuestAddress(address), length, access) {
                return Err(QueueError::OutsideMemory(name, address));
            }
        }
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(queue)
    }
}

impl MmioTransport {
    fn selected_index(&self) -> Option<u16> {
        u16::try_from(self.queue_sel).ok().filter(|index| usize::from(*index) < self.queues.len())
    }

    /// The queue that QueueSel names, if there is one.
    pub(super) fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.selected_index()?))
    }

    /// The index of the selected queue while its registers may be written: between FEATURES_OK and DRIVER_OK, or after
    /// a ring reset, and not while it is enabled.
    fn configurable(&self) -> Option<u16> {
        let phase = match self.status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_FAILED) {
            STATUS_FEATURES_OK => Phase::Disabled,
            _ if self.running => Phase::Reset,
            _ => return None,
        };
        self.selected_index().filter(|index| self.queues[usize::from(*index)].phase == phase)
    }

    pub(super) fn configure_queue(&mut self, register: Register, value: u32) {
        match self.configurable() {
            Some(index) => self.queues[usize::from(index)].write(register, value),
            None => self.complain("the driver configured a queue at the wrong time"),
        }
    }

    pub(super) fn write_queue_ready(&mut self, value: u32) {
        match value {
            0 => self.disable_queue(),
            1 => self.enable_queue(),
            _ => self.complain("the driver wrote neither 0 nor 1 to QueueReady"),
        }
    }

    pub(super) fn write_queue_reset(&mut self, value: u32) {
        if value == 1 && self.features() & F_RING_RESET != 0 {
            self.disable_queue();
        } else {
            self.complain("the driver wrote to QueueReset without RING_RESET, or not 1");
        }
    }

    /// QueueReady stays 0 when the driver's values are not a queue: it may correct them and try again.
    fn enable_queue(&mut self) {
        let Some(index) = self.configurable() else {
            return self.complain("the driver enabled a queue at the wrong time");
        };
        let queue = &mut self.queues[usize::from(index)];
        if let Err(error) = queue.build(&self.memory, self.accepted) {
            return self.complain(error);
        }
        queue.phase = Phase::Enabled;
        if self.running
            && let Err(error) = self.active_queue(index).and_then(|queue| self.device.start_queue(queue))
        {
            self.fail("the device did not start a queue", &error);
        }
    }

    /// Takes the selected queue back from the device, answered to the last request, and forgets its configuration. With
    /// RING_RESET a queue of the running device may be enabled again, whichever register stopped it.
    fn disable_queue(&mut self) {
        let Some(index) = self.selected_index() else { return };
        let queue = &mut self.queues[usize::from(index)];
        let again = self.running && queue.phase != Phase::Disabled && self.accepted & F_RING_RESET != 0;
        if self.running && queue.phase == Phase::Enabled {
            drop(self.device.stop_queue(index));
        }
        queue.reset(if again { Phase::Reset } else { Phase::Disabled });
    }

    /// The enabled queue `index` as the device gets it.
    ///
    /// # Errors
    /// When the host has no eventfd left. The registers were judged when the queue was enabled.
    pub(super) fn active_queue(&self, index: u16) -> io::Result<ActiveQueue> {
        let queue = self.queues[usize::from(index)].build(&self.memory, self.accepted).map_err(io::Error::other)?;
        Ok(ActiveQueue { index, queue, kick: self.kicks[usize::from(index)].try_clone()? })
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & u64::from(u32::MAX)) | u64::from(value) << 32;
}

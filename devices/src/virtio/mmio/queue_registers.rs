//! One queue's registers as a value: what the driver configures, and the queue that comes of it (virtio 1.2 §4.2.3.2).

use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;
use crate::virtio::spec::mmio::Register;
use crate::virtio::spec::{F_EVENT_IDX, ring};

/// How far a queue has come.
///
/// | from | driver writes | to |
/// |---|---|---|
/// | `Disabled` | QueueReady=1 between FEATURES_OK and DRIVER_OK | `Enabled` |
/// | `Enabled` | QueueReady=0 before DRIVER_OK, or without RING_RESET | `Disabled` |
/// | `Enabled` | QueueReset=1, or QueueReady=0, of a started device with RING_RESET | `Reset` |
/// | `Reset` | QueueReady=1 | `Enabled` |
/// | any | Status=0 | `Disabled` |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum QueuePhase {
    /// Not in use; can be configured until DRIVER_OK.
    #[default]
    Disabled,
    /// QueueReady is 1: its registers are settled, and a started device has it.
    Enabled,
    /// Taken back from the started device by QueueReset=1 or QueueReady=0, with RING_RESET negotiated: it can be configured
    /// and enabled again.
    Reset,
}

/// One queue as the driver describes it. The values are stored as written and judged when the queue is enabled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) phase: QueuePhase,
    size: u32,
    /// Guest-physical addresses; 0: never written.
    descriptor_table: u64,
    available_ring: u64,
    used_ring: u64,
}

/// Why the driver's values do not make a queue.
#[derive(Debug, Error)]
pub(super) enum InvalidQueue {
    #[error("queue size {0} is not a power of two up to the maximum")]
    Size(u32),
    #[error("the {0} has no address")]
    NoAddress(&'static str),
    #[error("a ring is misaligned")]
    Alignment(#[source] virtio_queue::Error),
    #[error("the {0} at {1:#x} is outside of guest memory")]
    OutsideMemory(&'static str, u64),
    #[error("the {0} and the {1} overlap")]
    Overlap(&'static str, &'static str),
}

impl QueueRegisters {
    /// # Errors
    /// When the device's own maximum is not a queue size.
    pub(super) fn new(max_size: u16) -> io::Result<Self> {
        Queue::new(max_size).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self::at_power_on(max_size))
    }

    pub(super) fn at_power_on(max_size: u16) -> Self {
        Self { max_size, size: max_size.into(), ..Self::default() }
    }

    /// Size and addresses as at power-on. The phase stays.
    pub(super) fn forget(&mut self) {
        *self = Self { phase: self.phase, ..Self::at_power_on(self.max_size) };
    }

    pub(super) fn write(&mut self, register: Register, value: u32) {
        match register {
            Register::QueueNum => self.size = value,
            Register::QueueDescLow => set_half(&mut self.descriptor_table, 0, value),
            Register::QueueDescHigh => set_half(&mut self.descriptor_table, 1, value),
            Register::QueueDriverLow => set_half(&mut self.available_ring, 0, value),
            Register::QueueDriverHigh => set_half(&mut self.available_ring, 1, value),
            Register::QueueDeviceLow => set_half(&mut self.used_ring, 0, value),
            Register::QueueDeviceHigh => set_half(&mut self.used_ring, 1, value),
            _ => {}
        }
    }

    /// The queue that these registers describe, to be served from the start of its rings.
    pub(super) fn build(&self, memory: &GuestMemory, features: u64) -> Result<Queue, InvalidQueue> {
        let invalid_size = |_| InvalidQueue::Size(self.size);
        let size = u16::try_from(self.size).map_err(|_| InvalidQueue::Size(self.size))?;
        let mut queue = Queue::new(self.max_size).map_err(invalid_size)?;
        queue.try_set_size(size).map_err(invalid_size)?;
        let areas = [
            (
                "descriptor table",
                self.descriptor_table,
                ring::descriptor_table_size(size),
                Permissions::Read,
            ),
            (
                "available ring",
                self.available_ring,
                ring::available_ring_size(size),
                Permissions::Read,
            ),
            ("used ring", self.used_ring, ring::used_ring_size(size), Permissions::Write),
        ];
        // Not Queue::is_valid, which logs each time: a guest can ask this question in a loop.
        for (name, address, length, access) in areas {
            // As QEMU: a driver that never wrote an address did not mean the interrupt vectors at 0.
            if address == 0 {
                return Err(InvalidQueue::NoAddress(name));
            }
            if !memory.check_range(GuestAddress(address), length as usize, access) {
                return Err(InvalidQueue::OutsideMemory(name, address));
            }
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let ((a, a_start, a_length, _), (b, b_start, b_length, _)) = (areas[a], areas[b]);
            if a_start < b_start + b_length && b_start < a_start + a_length {
                return Err(InvalidQueue::Overlap(a, b));
            }
        }
        let misaligned = InvalidQueue::Alignment;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptor_table))
            .map_err(misaligned)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available_ring)).map_err(misaligned)?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring)).map_err(misaligned)?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// Replaces the low half (0) or the high half (1) of a value that the driver writes in two registers.
pub(super) fn set_half(of: &mut u64, half: u32, value: u32) {
    let shift = 32 * half;
    *of = (*of & !(u64::from(u32::MAX) << shift)) | u64::from(value) << shift;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_impossible_size_are_refused_at_once() {
        for size in [0, 3, 32769] {
            assert!(QueueRegisters::new(size).is_err());
        }
        assert!(QueueRegisters::new(32768).is_ok());
    }
}

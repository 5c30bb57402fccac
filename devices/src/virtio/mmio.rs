//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): registers, feature negotiation and the device status machine
//! over any [`VirtioDevice`].
//!
//! It is not on the data path once the driver is up: the driver's notification hits an ioeventfd that the queue's
//! worker waits for, and the worker pulls the interrupt line itself. The driver reads why it was interrupted in the
//! [register page](RegisterPage), and acknowledges into another ioeventfd. What still arrives here are changes of
//! configuration, and resets.
//!
//! Everything that the driver may read is in that page, which every write here leaves up to date; a read has no side
//! effects.

mod page;
mod queue;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(crate) use self::page::CONFIG_SIZE;
pub use self::page::RegisterPage;
use self::queue::{Phase, QueueRegisters};
use super::device::{Activation, VirtioDevice};
use super::spec::mmio::{CONFIG_OFFSET, MAGIC, Register, VENDOR_ID, VERSION};
use super::spec::{
    F_RING_RESET, F_VERSION_1, STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FAILED, STATUS_FEATURES_OK,
};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::irq::{Interrupt, Trigger};
use crate::log_limit::LogLimit;

/// One device behind its page of registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    /// One for each queue, by index.
    kicks: Vec<EventFd>,
    queues: Vec<QueueRegisters>,
    /// Feature bits on offer: the device's and the transport's.
    offered: u64,
    /// Feature bits that the driver wrote; agreed on once FEATURES_OK is set.
    accepted: u64,
    /// The device status as the driver and we brought it about. In the page there may be DEVICE_NEEDS_RESET, too.
    status: u32,
    /// The device has the queues: between a `start` that succeeded and `stop`.
    running: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    /// ConfigGeneration when the driver could first look, at FEATURES_OK.
    generation: u32,
    /// One for what the driver does wrong and one for what the host does, so that neither hides the other.
    log_limit: LogLimit,
    failure_limit: LogLimit,
}

impl MmioTransport {
    /// Bytes of address space: a page, so that one KVM memory slot can cover exactly one device.
    pub const SIZE: u64 = size_of::<RegisterPage>() as u64;

    /// Puts `device` behind registers in their reset state. `trigger` is its interrupt line.
    ///
    /// # Errors
    /// When the host has no eventfd left, or the device has a queue of an impossible size.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, trigger: Arc<dyn Trigger>) -> io::Result<Self> {
        let queues =
            device.queue_sizes().iter().map(|max| QueueRegisters::new(*max)).collect::<io::Result<Vec<_>>>()?;
        let kicks = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<Vec<_>>>()?;
        let transport = Self {
            offered: device.features() | F_VERSION_1 | F_RING_RESET,
            device,
            memory,
            interrupt: Interrupt::new(trigger),
            kicks,
            queues,
            accepted: 0,
            status: 0,
            running: false,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            generation: 0,
            log_limit: LogLimit::new(),
            failure_limit: LogLimit::new(),
        };
        transport.publish_constants();
        transport.publish();
        Ok(transport)
    }

    /// What the driver's notification of each queue, by index, should write to: as an ioeventfd at
    /// `QUEUE_NOTIFY_OFFSET` that matches the queue's index as 32 bits.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// What the driver reads. Where the machine maps it into the guest, reads do not arrive here.
    pub fn page(&self) -> &Arc<RegisterPage> {
        self.interrupt.page()
    }

    /// Stops the device for good, when the machine ends: when this returns, everything in flight is finished and no
    /// thread of the device touches guest memory.
    pub fn stop(&mut self) {
        self.running = false;
        drop(self.device.stop());
    }

    /// The registers that never change. There are no shared memory regions: a length and a base of -1 (§2.10.2).
    fn publish_constants(&self) {
        for (register, value) in [
            (Register::MagicValue, MAGIC),
            (Register::Version, VERSION),
            (Register::DeviceId, self.device.device_id()),
            (Register::VendorId, VENDOR_ID),
            (Register::ShmLenLow, u32::MAX),
            (Register::ShmLenHigh, u32::MAX),
            (Register::ShmBaseLow, u32::MAX),
            (Register::ShmBaseHigh, u32::MAX),
        ] {
            self.page().store(register, value);
        }
    }

    /// What depends on the state: the registers of what the driver selected, and the configuration space. QueueReset is
    /// not among them: a reset is over when the write that asked for it returns, so it always reads 0.
    fn publish(&self) {
        let queue = self.selected();
        let ready = queue.is_some_and(|queue| queue.phase == Phase::Enabled);
        self.page().store(Register::DeviceFeatures, half(self.offered, self.device_features_sel));
        self.page().store(Register::QueueNumMax, queue.map_or(0, |queue| u32::from(queue.max_size())));
        self.page().store(Register::QueueReady, ready.into());
        self.interrupt.show_config(|config| self.device.read_config(0, config, self.features()));
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSel => self.device_features_sel = value,
            Register::DriverFeaturesSel => self.driver_features_sel = value,
            Register::DriverFeatures => self.accept_features(value),
            Register::QueueSel => self.queue_sel = value,
            Register::QueueReady => self.write_queue_ready(value),
            Register::QueueReset => self.write_queue_reset(value),
            Register::QueueNum
            | Register::QueueDescLow
            | Register::QueueDescHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh => self.configure_queue(register, value),
            Register::QueueNotify => self.notify(value),
            Register::InterruptAck => self.interrupt.acknowledge(value),
            Register::Status => self.write_status(value),
            Register::ShmSel => {}
            Register::MagicValue
            | Register::Version
            | Register::DeviceId
            | Register::VendorId
            | Register::DeviceFeatures
            | Register::QueueNumMax
            | Register::InterruptStatus
            | Register::ShmLenLow
            | Register::ShmLenHigh
            | Register::ShmBaseLow
            | Register::ShmBaseHigh
            | Register::ConfigGeneration => self.complain("the driver wrote to a read-only register"),
        }
    }

    /// A notification that no ioeventfd took: the machine has none, or the driver wrote nonsense.
    fn notify(&self, index: u32) {
        match self.kicks.get(index as usize) {
            // Fails only when the counter is full: then the worker is awake anyway.
            Some(kick) => drop(kick.write(1)),
            None => self.complain("the driver notified a queue that does not exist"),
        }
    }

    fn complain(&self, what: impl Display) {
        if let Some(suppressed) = self.log_limit.admit() {
            tracing::warn!(device_id = self.device.device_id(), suppressed, "{what}");
        }
    }
}

// The status machine (§2.1, §3.1).
impl MmioTransport {
    /// The agreed feature bits, 0 until there is an agreement.
    fn features(&self) -> u64 {
        if self.status & STATUS_FEATURES_OK != 0 { self.accepted } else { 0 }
    }

    /// The driver may choose between DRIVER and FEATURES_OK (§3.1.1).
    fn accept_features(&mut self, value: u32) {
        if self.status & (STATUS_DRIVER | STATUS_FEATURES_OK) != STATUS_DRIVER {
            return self.complain("the driver chose features outside of feature negotiation");
        }
        match self.driver_features_sel {
            0 => self.accepted = (self.accepted & !u64::from(u32::MAX)) | u64::from(value),
            1 => self.accepted = (self.accepted & u64::from(u32::MAX)) | u64::from(value) << 32,
            // Bits that nobody has defined yet, and that are not on offer.
            _ if value == 0 => {}
            _ => self.complain("the driver accepted features beyond bit 63"),
        }
    }

    /// Status bits only ever get set, one step after the other; writing 0 resets the device.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if self.status & !value != 0 {
            self.complain("the driver tried to clear status bits without a reset");
        }
        self.set_status(value & STATUS_FAILED);
        for (bit, after) in [
            (STATUS_ACKNOWLEDGE, 0),
            (STATUS_DRIVER, STATUS_ACKNOWLEDGE),
            (STATUS_FEATURES_OK, STATUS_DRIVER),
            (STATUS_DRIVER_OK, STATUS_FEATURES_OK),
        ] {
            if value & bit == 0 || self.status & bit != 0 {
                continue;
            }
            if self.status & (after | STATUS_FAILED) != after {
                return self.complain("the driver skipped a step of its initialization");
            }
            if bit == STATUS_FEATURES_OK && (self.accepted & !self.offered != 0 || self.accepted & F_VERSION_1 == 0) {
                return self.complain("the driver wants features that are not on offer, or not VERSION_1");
            }
            self.set_status(bit);
            match bit {
                STATUS_FEATURES_OK => {
                    self.publish();
                    self.generation = self.page().load(Register::ConfigGeneration);
                }
                STATUS_DRIVER_OK => self.start(),
                _ => {}
            }
        }
    }

    fn set_status(&mut self, bits: u32) {
        self.status |= bits;
        self.page().set(Register::Status, bits);
    }

    fn start(&mut self) {
        match self.try_start() {
            Ok(()) => {
                self.running = true;
                self.publish();
                // Changed after the driver had looked, but before the device could tell it: shown since, but not reported.
                if self.page().load(Register::ConfigGeneration) != self.generation {
                    self.interrupt.config_changed();
                }
            }
            Err(error) => self.fail("the device did not start", &error),
        }
    }

    fn try_start(&mut self) -> io::Result<()> {
        let enabled = (0_u16..).zip(&self.queues).filter(|(_, queue)| queue.phase == Phase::Enabled);
        let queues = enabled.map(|(index, _)| self.active_queue(index)).collect::<io::Result<Vec<_>>>()?;
        self.device.start(Activation {
            memory: self.memory.clone(),
            features: self.features(),
            queues,
            interrupt: self.interrupt.clone(),
        })
    }

    fn fail(&self, what: &str, error: &io::Error) {
        if let Some(suppressed) = self.failure_limit.admit() {
            tracing::error!(device_id = self.device.device_id(), %error, suppressed, "{what}");
        }
        self.interrupt.device_needs_reset();
    }

    /// Everything as after power-on, but for the configuration's generation. The status reads 0 only once the device
    /// has stopped (§2.4.1).
    fn reset(&mut self) {
        self.stop();
        self.interrupt.reset();
        self.queues.iter_mut().for_each(|queue| queue.reset(Phase::Disabled));
        self.accepted = 0;
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.page().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset.checked_sub(CONFIG_OFFSET), Register::decode(offset), data.try_into()) {
            (Some(offset), ..) => self.device.write_config(offset, data, self.features()),
            (None, Some(register), Ok(data)) => self.write_register(register, u32::from_le_bytes(data)),
            _ => self.complain("the driver wrote to something that is not a register"),
        }
        self.publish();
    }

    fn reset(&mut self) {
        MmioTransport::reset(self);
        self.publish();
    }
}

/// 32 of 64 feature bits; there are none beyond.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

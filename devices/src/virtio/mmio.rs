//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): registers, feature negotiation and the device status machine over any
//! [`VirtioDevice`].
//!
//! It is not on the data path once the driver is up. The driver's notification reaches an ioeventfd that the queue's worker waits for,
//! and the worker pulses the interrupt line. The driver reads the reason in the [register page](RegisterPage), and acknowledges into
//! another ioeventfd. What still arrives here are changes of configuration, and resets.
//!
//! Everything that the driver may read is in that page, which every write here leaves up to date. A read has no side effects. What the
//! driver wrote is one value, `DriverRegisters`.

mod driver_registers;
mod queue_registers;
mod state;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::driver_registers::DriverRegisters;
use self::queue_registers::{InvalidQueue, QueuePhase, QueueRegisters};
pub use self::state::{RestoreError, TransportState};
use super::device::{Activation, ActiveQueue, VirtioDevice};
use super::drain::Drain;
use super::interrupt::Interrupt;
use super::registers::RegisterPage;
use super::spec::mmio::{CONFIG_OFFSET, MAGIC, Register, VENDOR_ID, VERSION};
use super::spec::{
    F_RING_RESET, F_VERSION_1, STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FAILED,
    STATUS_FEATURES_OK,
};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::irq::InterruptLine;
use crate::log_limit::LogLimit;

/// Whether the device has the queues.
///
/// | from | event | to |
/// |---|---|---|
/// | `Idle` | DRIVER_OK, and the device starts | `Started` |
/// | `Started` | QueueReset=1 or QueueReady=0 of an enabled queue | `ResettingQueue` |
/// | `ResettingQueue` | the drain is done | `Started` |
/// | any | Status=0, or a reset of the machine | `Resetting` |
/// | `Resetting` | the drain is done: registers as at power-on | `Idle` |
///
/// While a drain lasts the driver can acknowledge, notify and reset, and while only a queue drains it can write the configuration
/// space; other writes are ignored. The vCPU that wrote waits for the drain outside of the bus (see `BusDevice::draining`): Linux's driver takes memory back right after the write, without a look
/// at the register.
enum Activity {
    Idle,
    Started,
    ResettingQueue(u16, Drain),
    Resetting(Drain),
}

/// One device behind its page of registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    /// One for each queue, by index.
    kicks: Vec<Arc<EventFd>>,
    /// Feature bits on offer: the device's and the transport's.
    offered: u64,
    registers: DriverRegisters,
    activity: Activity,
    /// One for what the driver does wrong and one for what the host does, so that neither hides the other.
    log_limit: LogLimit,
    failure_limit: LogLimit,
}

impl MmioTransport {
    /// Bytes of address space: a page, so that one KVM memory slot can cover exactly one device.
    pub const SIZE: u64 = size_of::<RegisterPage>() as u64;

    /// Puts `device` behind registers in their reset state. `line` is its interrupt line.
    ///
    /// # Errors
    /// When the host has no eventfd left, or the device has a queue of an impossible size.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().iter().map(|max| QueueRegisters::new(*max));
        let queues = queues.collect::<io::Result<Vec<_>>>()?;
        let kick = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let transport = Self {
            offered: device.features() | F_VERSION_1 | F_RING_RESET,
            device,
            memory,
            interrupt: Interrupt::new(line)?,
            kicks: queues.iter().map(kick).collect::<io::Result<_>>()?,
            registers: DriverRegisters::new(queues),
            activity: Activity::Idle,
            log_limit: LogLimit::default(),
            failure_limit: LogLimit::default(),
        };
        transport.publish_constants();
        transport.publish();
        Ok(transport)
    }

    /// What the driver's notification of each queue, by index, should write to: as an ioeventfd at
    /// `QUEUE_NOTIFY_OFFSET` that matches the queue's index as 32 bits.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// What the driver's acknowledgement of used buffers may write to: as an ioeventfd at `INTERRUPT_ACK_OFFSET` that matches
    /// `INTERRUPT_USED_BUFFER` as 32 bits.
    pub fn acknowledgements(&self) -> &EventFd {
        self.interrupt.acknowledgements()
    }

    /// What the driver reads. Where the machine maps it into the guest, reads do not arrive here.
    pub fn page(&self) -> &Arc<RegisterPage> {
        self.interrupt.page()
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

    /// What depends on the state: the registers of what the driver selected, and the configuration space.
    fn publish(&self) {
        let (index, page) = (self.registers.selected_index(), self.page());
        let queue = index.map(|index| self.registers.queue(index));
        let ready = queue.is_some_and(|queue| queue.phase == QueuePhase::Enabled);
        let resets = matches!(self.activity, Activity::ResettingQueue(stopping, _) if Some(stopping) == index);
        let features = match self.registers.device_features_sel {
            half @ (0 | 1) => (self.offered >> (32 * half)) as u32,
            _ => 0,
        };
        page.store(Register::DeviceFeatures, features);
        page.store(Register::QueueNumMax, queue.map_or(0, |queue| queue.max_size.into()));
        page.store(Register::QueueReady, ready.into());
        page.store(Register::QueueReset, resets.into());
        self.interrupt
            .show_config(|config| self.device.read_config(0, config, self.registers.features()));
    }

    fn write_register(&mut self, register: Register, value: u32) {
        let drains = matches!(self.activity, Activity::ResettingQueue(..) | Activity::Resetting(_));
        match register {
            Register::QueueNotify => self.notify(value),
            Register::InterruptAck => self.interrupt.acknowledge(value),
            Register::Status if value == 0 => BusDevice::reset(self),
            _ if drains => self.complain("the driver did not wait for a reset"),
            Register::DeviceFeaturesSel => self.registers.device_features_sel = value,
            Register::DriverFeaturesSel => self.registers.driver_features_sel = value,
            Register::DriverFeatures => {
                if let Err(reason) = self.registers.accept_features(value) {
                    self.complain(reason);
                }
            }
            Register::QueueSel => self.registers.queue_sel = value,
            Register::QueueReady => self.write_queue_ready(value),
            Register::QueueReset => self.write_queue_reset(value),
            Register::QueueNum
            | Register::QueueDescLow
            | Register::QueueDescHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh => self.configure_queue(register, value),
            Register::Status => self.write_status(value),
            Register::ShmSel => {}
            _ => self.complain("the driver wrote to a read-only register"),
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
        self.log_limit.warn(format_args!("{}: {what}", self.device.name()));
    }

    /// Status bits only ever get set, one step after the other (§2.1, §3.1).
    fn write_status(&mut self, value: u32) {
        if self.registers.status & !value != 0 {
            self.complain("the driver tried to clear status bits without a reset");
        }
        self.set_status(value & STATUS_FAILED);
        for (bit, after) in [
            (STATUS_ACKNOWLEDGE, 0),
            (STATUS_DRIVER, STATUS_ACKNOWLEDGE),
            (STATUS_FEATURES_OK, STATUS_DRIVER),
            (STATUS_DRIVER_OK, STATUS_FEATURES_OK),
        ] {
            if value & bit == 0 || self.registers.status & bit != 0 {
                continue;
            }
            if self.registers.status & (after | STATUS_FAILED) != after {
                return self.complain("the driver skipped a step of its initialization");
            }
            if bit == STATUS_FEATURES_OK
                && let Err(reason) = self.registers.check_features(self.offered)
            {
                return self.complain(reason);
            }
            self.set_status(bit);
            match bit {
                STATUS_FEATURES_OK => {
                    self.publish();
                    self.registers.generation = self.page().load(Register::ConfigGeneration);
                }
                STATUS_DRIVER_OK => self.driver_ok(),
                _ => {}
            }
        }
    }

    fn set_status(&mut self, bits: u32) {
        self.registers.status |= bits;
        self.page().set(Register::Status, bits);
    }

    fn driver_ok(&mut self) {
        match self.start(|_| {}) {
            Ok(()) => {
                self.publish();
                // Changed after the driver had looked, but before the device could tell it: shown since, but not reported.
                if self.page().load(Register::ConfigGeneration) != self.registers.generation {
                    self.interrupt.config_changed();
                }
            }
            Err(error) => self.fail("the device did not start", &error),
        }
    }

    /// Hands the enabled queues over, as `prepare` changes them.
    fn start(&mut self, prepare: impl Fn(&mut ActiveQueue)) -> io::Result<()> {
        let queues = (0_u16..).zip(&self.registers.queues);
        let enabled = queues.filter(|(_, queue)| queue.phase == QueuePhase::Enabled);
        let queues = enabled.map(|(index, _)| self.active_queue(index));
        let mut queues = queues.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
        queues.iter_mut().for_each(prepare);
        self.device.start(Activation {
            memory: self.memory.clone(),
            features: self.registers.features(),
            queues,
            interrupt: self.interrupt.clone(),
        })?;
        self.activity = Activity::Started;
        Ok(())
    }

    fn fail(&self, what: &str, error: &io::Error) {
        self.failure_limit.warn(format_args!("{}: {what}: {error}", self.device.name()));
        self.interrupt.device_needs_reset();
    }

    /// Takes in what device threads and the kernel have finished since the last access.
    fn catch_up(&mut self) {
        self.interrupt.collect_acknowledgements();
        match &self.activity {
            Activity::Resetting(drain) if drain.is_done() => {
                // Everything as at power-on, but for the configuration's generation.
                self.registers.reset();
                self.activity = Activity::Idle;
                self.interrupt.reset();
            }
            Activity::ResettingQueue(index, drain) if drain.is_done() => {
                // Without RING_RESET it cannot come back until the device is reset.
                let again = self.registers.accepted & F_RING_RESET != 0;
                self.registers.queues[usize::from(*index)].phase =
                    if again { QueuePhase::Reset } else { QueuePhase::Disabled };
                self.activity = Activity::Started;
            }
            _ => return,
        }
        self.publish();
    }

    fn has_started(&self) -> bool {
        matches!(self.activity, Activity::Started | Activity::ResettingQueue(..))
    }

    fn configure_queue(&mut self, register: Register, value: u32) {
        match self.registers.configurable(self.has_started()) {
            Some(index) => self.registers.queues[usize::from(index)].write(register, value),
            None => self.complain("the driver configured a queue at the wrong time"),
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        match (value, self.registers.selected_index()) {
            // As in QEMU the addresses stay: the driver may enable the queue again without writing them.
            (0, Some(index)) => self.disable_queue(index),
            (1, _) => self.enable_queue(),
            (0, None) => {}
            _ => self.complain("the driver wrote neither 0 nor 1 to QueueReady"),
        }
    }

    fn write_queue_reset(&mut self, value: u32) {
        if value != 1 || self.registers.features() & F_RING_RESET == 0 {
            return self.complain("the driver wrote to QueueReset without RING_RESET, or not 1");
        }
        if let Some(index) = self.registers.selected_index() {
            self.registers.queues[usize::from(index)].forget();
            self.disable_queue(index);
        }
    }

    /// QueueReady stays 0 when the driver's values are not a queue: it may correct them and try again.
    fn enable_queue(&mut self) {
        let Some(index) = self.registers.configurable(self.has_started()) else {
            return self.complain("the driver enabled a queue at the wrong time");
        };
        let queue = match self.active_queue(index) {
            Ok(queue) => queue,
            Err(error) => return self.complain(error),
        };
        self.registers.queues[usize::from(index)].phase = QueuePhase::Enabled;
        if self.has_started()
            && let Err(error) = self.device.start_queue(queue)
        {
            self.fail("the device did not start a queue", &error);
        }
    }

    fn disable_queue(&mut self, index: u16) {
        if self.registers.queue(index).phase != QueuePhase::Enabled {
            return;
        }
        if self.has_started() {
            self.activity = Activity::ResettingQueue(index, self.device.reset_queue(index));
            self.catch_up();
        } else {
            self.registers.queues[usize::from(index)].phase = QueuePhase::Disabled;
        }
    }

    /// The queue `index` as the device gets it.
    ///
    /// # Errors
    /// When the driver's values are not a queue.
    fn active_queue(&self, index: u16) -> Result<ActiveQueue, InvalidQueue> {
        let queue = self.registers.queue(index).build(&self.memory, self.registers.accepted)?;
        let kick = Arc::clone(&self.kicks[usize::from(index)]);
        Ok(ActiveQueue { index, queue, kick, restored: false })
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.catch_up();
        self.page().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.catch_up();
        match (offset.checked_sub(CONFIG_OFFSET), Register::decode(offset), data.try_into()) {
            (Some(_), ..) if matches!(self.activity, Activity::Resetting(_)) => {
                self.complain("the driver did not wait for a reset")
            }
            (Some(offset), ..) => self.device.write_config(offset, data, self.registers.features()),
            (None, Some(register), Ok(data)) => {
                self.write_register(register, u32::from_le_bytes(data))
            }
            _ => self.complain("the driver wrote to something that is not a register"),
        }
        self.publish();
    }

    /// Begins a device reset: Status reads as before until the drain is done (§2.4.1), and no thread of the device touches guest
    /// memory from then on. A reset that has begun already is not begun a second time.
    fn reset(&mut self) {
        if !matches!(self.activity, Activity::Resetting(_)) {
            self.activity = Activity::Resetting(self.device.reset());
        }
        self.catch_up();
    }

    fn draining(&mut self) -> Option<Drain> {
        self.catch_up();
        match &self.activity {
            Activity::ResettingQueue(_, drain) | Activity::Resetting(drain) => Some(drain.clone()),
            Activity::Idle | Activity::Started => None,
        }
    }
}

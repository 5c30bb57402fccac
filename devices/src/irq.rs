//! How a virtio device gets the driver's attention: the interrupt status register, DEVICE_NEEDS_RESET, and the line.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::log_limit::LogLimit;
use crate::virtio::mmio::{CONFIG_SIZE, RegisterPage};
use crate::virtio::spec::STATUS_DEVICE_NEEDS_RESET;
use crate::virtio::spec::mmio::{self, Register};

/// The wire of one interrupt line. In a VM it leads to KVM's interrupt controllers; a test counts.
pub trait Trigger: Send + Sync {
    /// Asserts the line once.
    ///
    /// # Errors
    /// Whatever the host says; the caller can only report it.
    fn trigger(&self) -> io::Result<()>;
}

impl Trigger for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// The device's side of the virtio-mmio interrupt: shared by the transport (which acknowledges) and by the threads that
/// serve the queues (which raise). Cloning shares the same registers.
#[derive(Clone)]
pub struct Interrupt {
    registers: Arc<Registers>,
    trigger: Arc<dyn Trigger>,
}

#[derive(Default)]
struct Registers {
    /// InterruptStatus and DEVICE_NEEDS_RESET lie here, where the driver reads them.
    page: Arc<RegisterPage>,
    /// Held while the page's configuration space is replaced.
    config_writer: Mutex<()>,
    log_limit: LogLimit,
}

impl Interrupt {
    /// An idle interrupt that asserts `trigger`.
    pub fn new(trigger: Arc<dyn Trigger>) -> Self {
        Self { registers: Arc::default(), trigger }
    }

    /// The device's registers as the driver reads them.
    pub fn page(&self) -> &Arc<RegisterPage> {
        &self.registers.page
    }

    /// Puts the configuration space that `fill` makes where the driver reads it. `fill` gets zeroes, and is called by one
    /// thread at a time, so that the last one to look is the last one to write.
    pub fn show_config(&self, fill: impl FnOnce(&mut [u8])) {
        let _writer = self.registers.config_writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut config = [0; CONFIG_SIZE];
        fill(&mut config);
        self.registers.page.set_config(&config);
    }

    /// Tells the driver that a used ring moved. The caller has already honoured the driver's suppression.
    pub fn used_buffer(&self) {
        self.raise(mmio::INTERRUPT_USED_BUFFER);
    }

    /// Tells the driver that the configuration space changed. `show_config` came first.
    pub fn config_changed(&self) {
        self.raise(mmio::INTERRUPT_CONFIG_CHANGE);
    }

    /// Gives up on the rings until the driver resets the device (virtio 1.2 §2.1.2).
    pub fn device_needs_reset(&self) {
        self.registers.page.set(Register::Status, STATUS_DEVICE_NEEDS_RESET);
        self.raise(mmio::INTERRUPT_CONFIG_CHANGE);
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.page().load(Register::InterruptStatus)
    }

    /// `STATUS_DEVICE_NEEDS_RESET` or 0.
    pub fn needs_reset(&self) -> u32 {
        self.page().load(Register::Status) & STATUS_DEVICE_NEEDS_RESET
    }

    /// The InterruptACK register: clears `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.registers.page.clear(Register::InterruptStatus, bits);
    }

    /// Device reset: InterruptStatus and Status read 0 again.
    pub fn reset(&self) {
        self.registers.page.store(Register::InterruptStatus, 0);
        self.registers.page.store(Register::Status, 0);
    }

    /// Where the driver's acknowledgement of used buffers does not arrive (see [`MmioTransport::page`]), that bit stays set
    /// until reset. That is harmless: the driver only looks for it when interrupted. Before the first interrupt it reads 0.
    ///
    /// [`MmioTransport::page`]: crate::virtio::mmio::MmioTransport::page
    fn raise(&self, bit: u32) {
        self.registers.page.set(Register::InterruptStatus, bit);
        if let Err(error) = self.trigger.trigger()
            && let Some(suppressed) = self.registers.log_limit.admit()
        {
            tracing::error!(%error, suppressed, "could not raise a virtio interrupt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl Trigger for Edges {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn every_event_is_an_edge_and_stays_in_the_status_until_acknowledged() {
        let edges = Arc::new(Edges::default());
        let device = Interrupt::new(Arc::clone(&edges) as _);
        let page = device.page();
        let transport = device.clone();
        device.used_buffer();
        device.used_buffer();
        device.config_changed();
        assert_eq!(edges.0.load(Ordering::Relaxed), 3);
        assert_eq!(page.load(Register::InterruptStatus), mmio::INTERRUPT_USED_BUFFER | mmio::INTERRUPT_CONFIG_CHANGE);
        transport.acknowledge(mmio::INTERRUPT_CONFIG_CHANGE);
        assert_eq!(page.load(Register::InterruptStatus), mmio::INTERRUPT_USED_BUFFER);
    }

    #[test]
    fn giving_up_interrupts_the_driver_and_a_reset_forgets_it() {
        let edges = Arc::new(Edges::default());
        let interrupt = Interrupt::new(Arc::clone(&edges) as _);
        let page = interrupt.page();
        let registers = || (page.load(Register::Status), page.load(Register::InterruptStatus));
        interrupt.device_needs_reset();
        assert_eq!(registers(), (STATUS_DEVICE_NEEDS_RESET, mmio::INTERRUPT_CONFIG_CHANGE));
        assert_eq!(edges.0.load(Ordering::Relaxed), 1);
        interrupt.reset();
        assert_eq!(registers(), (0, 0));
    }

    #[test]
    fn a_line_that_fails_does_not_take_the_device_down() {
        struct Broken;
        impl Trigger for Broken {
            fn trigger(&self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let interrupt = Interrupt::new(Arc::new(Broken));
        interrupt.used_buffer();
        assert_eq!(interrupt.page().load(Register::InterruptStatus), mmio::INTERRUPT_USED_BUFFER);
    }
}

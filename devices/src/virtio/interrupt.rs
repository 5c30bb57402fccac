//! The interrupt of a virtio-mmio device: InterruptStatus, DEVICE_NEEDS_RESET, changes of the configuration space, and the
//! interrupt line.
//!
//! The registers lie in the [`RegisterPage`], where the driver reads them without an exit. Threads of the device set bits and
//! pulse the line. The transport clears bits, when the driver acknowledges or resets.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::registers::{CONFIG_SIZE, RegisterPage};
use super::spec::STATUS_DEVICE_NEEDS_RESET;
use super::spec::mmio::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER, Register};
use crate::irq::InterruptLine;
use crate::lock;
use crate::log_limit::LogLimit;

/// The device's side of the virtio-mmio interrupt. Clones share the same registers.
///
/// Drivers acknowledge used buffers after nearly every interrupt. An exit for each would cost more than the interrupt. So KVM turns a
/// write of `INTERRUPT_USED_BUFFER` to InterruptACK into an increment of an eventfd (`acknowledgements`). When minivmm next reads that
/// eventfd, it clears bit 0 of InterruptStatus. It reads it before it sets the bit again, when a queue's worker wakes up, and at each
/// access that reaches the transport.
///
/// So a driver that polls InterruptStatus of an idle device may still read the bit after its acknowledgement, where virtio 1.2 §4.2.2.1
/// clears it at once. A driver that waits for interrupts reads the register only when interrupted, and sees no difference.
#[derive(Clone)]
pub struct Interrupt {
    shared: Arc<Shared>,
    line: Arc<dyn InterruptLine>,
}

struct Shared {
    page: Arc<RegisterPage>,
    /// Counts the acknowledgements of used buffers that KVM turned into increments.
    acknowledged: EventFd,
    /// Held while minivmm changes bit 0. Between a read of `acknowledged` and the clearing of the bit no other thread may set the
    /// bit: the driver's acknowledgement is older than that event.
    used_buffer: Mutex<()>,
    /// Held while the configuration space in the page is replaced.
    config_writer: Mutex<()>,
    log_limit: LogLimit,
}

impl Interrupt {
    /// An interrupt that pulses `line`.
    ///
    /// # Errors
    /// When the host has no eventfd left.
    pub fn new(line: Arc<dyn InterruptLine>) -> io::Result<Self> {
        let shared = Shared {
            page: Arc::default(),
            acknowledged: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            used_buffer: Mutex::default(),
            config_writer: Mutex::default(),
            log_limit: LogLimit::default(),
        };
        Ok(Self { shared: Arc::new(shared), line })
    }

    /// Where acknowledgements of used buffers may arrive as increments, beside those that reach the transport.
    pub fn acknowledgements(&self) -> &EventFd {
        &self.shared.acknowledged
    }

    /// The device's registers as the driver reads them.
    pub fn page(&self) -> &Arc<RegisterPage> {
        &self.shared.page
    }

    /// Replaces the configuration space that the driver reads by what `fill` makes of a buffer of zeroes. One thread at a time calls
    /// `fill`, so the values that were read last stay.
    pub fn show_config(&self, fill: impl FnOnce(&mut [u8])) {
        let _writer = lock(&self.shared.config_writer);
        let mut config = [0; CONFIG_SIZE];
        fill(&mut config);
        self.page().set_config(&config);
    }

    /// A used ring moved, and the driver wants an interrupt for it.
    pub fn used_buffer(&self) {
        waypoint!();
        {
            let _changing = lock(&self.shared.used_buffer);
            // These acknowledgements are older than this event, so they must not clear its bit later.
            self.take_acknowledgements();
            self.page().set(Register::InterruptStatus, INTERRUPT_USED_BUFFER);
        }
        self.pulse();
    }

    /// Interrupts the driver because the configuration space has changed. The caller has called `show_config` before.
    pub fn config_changed(&self) {
        self.page().set(Register::InterruptStatus, INTERRUPT_CONFIG_CHANGE);
        self.pulse();
    }

    /// Sets DEVICE_NEEDS_RESET and interrupts the driver: a queue is unusable until a reset (virtio 1.2 §2.1.2).
    pub fn device_needs_reset(&self) {
        self.page().set(Register::Status, STATUS_DEVICE_NEEDS_RESET);
        self.config_changed();
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.page().load(Register::InterruptStatus)
    }

    /// The InterruptACK register: clears `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.page().clear(Register::InterruptStatus, bits);
    }

    /// Clears bit 0 of InterruptStatus if the driver has acknowledged used buffers since it was set.
    pub fn collect_acknowledgements(&self) {
        if self.status() & INTERRUPT_USED_BUFFER != 0 {
            let _changing = lock(&self.shared.used_buffer);
            if self.take_acknowledgements() {
                self.acknowledge(INTERRUPT_USED_BUFFER);
            }
        }
    }

    /// Whether the driver acknowledged since the last call.
    fn take_acknowledgements(&self) -> bool {
        // An error is EAGAIN: the count is 0.
        self.shared.acknowledged.read().is_ok()
    }

    /// Device reset: InterruptStatus and Status read 0 again.
    pub fn reset(&self) {
        let _changing = lock(&self.shared.used_buffer);
        self.take_acknowledgements();
        self.page().store(Register::InterruptStatus, 0);
        self.page().store(Register::Status, 0);
    }

    fn pulse(&self) {
        if let Err(error) = self.line.pulse() {
            self.shared.log_limit.warn(format_args!("cannot interrupt the guest: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl InterruptLine for Edges {
        fn pulse(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn every_event_is_an_edge_and_stays_in_the_status_until_acknowledged() {
        let edges = Arc::new(Edges::default());
        let device = Interrupt::new(Arc::clone(&edges) as _).unwrap();
        let page = device.page();
        let transport = device.clone();
        device.used_buffer();
        device.used_buffer();
        device.config_changed();
        assert_eq!(edges.0.load(Ordering::Relaxed), 3);
        assert_eq!(
            page.load(Register::InterruptStatus),
            INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE
        );
        transport.acknowledge(INTERRUPT_CONFIG_CHANGE);
        assert_eq!(page.load(Register::InterruptStatus), INTERRUPT_USED_BUFFER);
    }

    fn with_eventfd() -> (Interrupt, EventFd) {
        let interrupt = Interrupt::new(Arc::new(Edges::default())).unwrap();
        let kernel = interrupt.acknowledgements().try_clone().unwrap();
        (interrupt, kernel)
    }

    #[test]
    fn an_acknowledgement_by_eventfd_clears_the_bit_when_a_thread_looks() {
        let (interrupt, kernel) = with_eventfd();
        interrupt.used_buffer();
        interrupt.collect_acknowledgements();
        assert_eq!(interrupt.status(), INTERRUPT_USED_BUFFER, "not acknowledged yet");
        kernel.write(1).unwrap();
        interrupt.config_changed();
        interrupt.collect_acknowledgements();
        assert_eq!(interrupt.status(), INTERRUPT_CONFIG_CHANGE);
    }

    #[test]
    fn an_acknowledgement_never_clears_an_event_that_came_after_it() {
        let (interrupt, kernel) = with_eventfd();
        interrupt.used_buffer();
        kernel.write(1).unwrap();
        interrupt.used_buffer();
        interrupt.collect_acknowledgements();
        assert_eq!(interrupt.status(), INTERRUPT_USED_BUFFER);
        // Nor does one for nothing, or one from before a reset.
        let (interrupt, kernel) = with_eventfd();
        kernel.write(1).unwrap();
        interrupt.used_buffer();
        interrupt.collect_acknowledgements();
        assert_eq!(interrupt.status(), INTERRUPT_USED_BUFFER);
        kernel.write(1).unwrap();
        interrupt.reset();
        interrupt.used_buffer();
        interrupt.collect_acknowledgements();
        assert_eq!(interrupt.status(), INTERRUPT_USED_BUFFER);
    }

    #[test]
    fn the_registers_survive_a_save() {
        let (interrupt, kernel) = with_eventfd();
        interrupt.used_buffer();
        interrupt.show_config(|config| config[0] = 1);
        interrupt.device_needs_reset();
        kernel.write(1).unwrap();
        let state = interrupt.save();
        assert_eq!(state.status, INTERRUPT_CONFIG_CHANGE);
        let (restored, _) = with_eventfd();
        restored.restore(&state);
        assert_eq!(restored.save(), state);
    }

    #[test]
    fn giving_up_interrupts_the_driver_and_a_reset_forgets_it() {
        let edges = Arc::new(Edges::default());
        let interrupt = Interrupt::new(Arc::clone(&edges) as _).unwrap();
        let page = interrupt.page();
        let registers = || (page.load(Register::Status), page.load(Register::InterruptStatus));
        interrupt.device_needs_reset();
        assert_eq!(registers(), (STATUS_DEVICE_NEEDS_RESET, INTERRUPT_CONFIG_CHANGE));
        assert_eq!(edges.0.load(Ordering::Relaxed), 1);
        interrupt.reset();
        assert_eq!(registers(), (0, 0));
    }

    #[test]
    fn a_line_that_fails_does_not_take_the_device_down() {
        struct Broken;
        impl InterruptLine for Broken {
            fn pulse(&self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let interrupt = Interrupt::new(Arc::new(Broken)).unwrap();
        interrupt.used_buffer();
        assert_eq!(interrupt.page().load(Register::InterruptStatus), INTERRUPT_USED_BUFFER);
    }
}

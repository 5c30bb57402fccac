//! The serial port to which the command writes: a UART that can make the guest wait, and that interrupts only as often as necessary.
//!
//! `exec::attach` puts it on the bus instead of a plain UART. A write to a full buffer takes effect when there is room. The vCPU waits
//! for that, unless the machine stops or ends (`devices::bus::Unfinished`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::bus::BusDevice;
use devices::irq::InterruptLine;
use devices::legacy::SerialDevice;
use devices::virtio::drain::Drain;

use super::output::Buffer;

/// Offsets of the interrupt enable and the interrupt identification register.
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_IDENTIFICATION: u64 = 2;

/// An interrupt line that is pulsed again only after the guest has read the reason of the last interrupt. A driver writes 16 bytes at
/// once, and for each the UART reports an empty transmitter, but a pulse costs as much as a byte.
pub(super) struct PendingLine {
    line: Arc<dyn InterruptLine>,
    is_pending: AtomicBool,
}

impl PendingLine {
    pub(super) fn new(line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self { line, is_pending: AtomicBool::new(false) })
    }
}

impl InterruptLine for PendingLine {
    fn pulse(&self) -> io::Result<()> {
        if self.is_pending.swap(true, Ordering::AcqRel) { Ok(()) } else { self.line.pulse() }
    }
}

/// The UART, on the bus.
pub(super) struct JobPort {
    pub(super) serial: SerialDevice,
    pub(super) line: Arc<PendingLine>,
    pub(super) buffer: Arc<Buffer>,
}

impl JobPort {
    fn expect_interrupts(&self) {
        self.line.is_pending.store(false, Ordering::Release);
    }
}

impl BusDevice for JobPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == INTERRUPT_IDENTIFICATION {
            self.expect_interrupts();
        }
        self.serial.read(offset, data);
    }

    /// A driver that starts enables interrupts. It may have missed one before, so the line is pulsed again.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == INTERRUPT_ENABLE {
            self.expect_interrupts();
        }
        self.serial.write(offset, data);
    }

    fn reset(&mut self) {
        self.serial.reset();
        self.expect_interrupts();
        self.buffer.restart();
    }

    fn draining(&mut self) -> Option<Drain> {
        self.buffer.draining()
    }
}

//! COM1: a 16550A on top of vm-superio's, with what it leaves to its user: input of any length through a 64-byte FIFO.
//!
//! The guest's output goes to a writer that must not block, byte by byte on the vCPU's thread. The console offers input, and
//! is told by an eventfd when there is room again.
//!
//! Quirks of vm-superio 0.8, with what is done about them:
//! - A receive interrupt is over with the first byte that is read: `interrupt_identification` reports it while there is data.
//! - A receive and a transmit interrupt that are pending together read as IIR 6, "line status", and reading clears both.
//!   Left as it is: Linux looks only at IIR's "nothing pending" bit and then serves whatever LSR shows, receiver and
//!   transmitter alike (serial8250_handle_irq in drivers/tty/serial/8250/8250_port.c), so it loses nothing.
//! - The FIFO control register is ignored. Left as it is: a driver that clears the receive FIFO still gets what was typed
//!   before.

#[cfg(test)]
mod fuzz;
mod state;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

pub use self::state::SerialState;
use crate::bus::BusDevice;
use crate::irq::InterruptLine;
use crate::log_limit::LogLimit;

/// Bytes in the receive FIFO.
const FIFO_SIZE: usize = 64;
/// Offset of the interrupt identification register.
const INTERRUPT_IDENTIFICATION: u8 = 2;
/// Interrupt identification: nothing is pending.
const NO_INTERRUPT: u8 = 1;
/// Interrupt identification: the receiver has data.
const DATA_AVAILABLE: u8 = 1 << 2;
/// Interrupt enable bit of the same.
const ENABLE_DATA_AVAILABLE: u8 = 1;
/// Offset of the line status register.
const LINE_STATUS: u8 = 5;
/// This many reads of the line status in a row are a driver that waits for input: it never has to wait for output, the
/// transmitter is always ready.
const POLLS_FOR_INPUT: u8 = 8;
/// Offset of the modem control register.
const MODEM_CONTROL: u8 = 4;
/// Modem control bit: the transmitter feeds the receiver, and the line is cut off.
const LOOPBACK: u8 = 1 << 4;

/// The UART.
pub struct SerialDevice {
    uart: Uart,
    interrupt: Arc<dyn InterruptLine>,
    on_input_drained: EventFd,
    /// The console found no room, and waits for `on_input_drained`.
    input_blocked: bool,
    /// Reads of the line status in a row, up to `POLLS_FOR_INPUT`.
    polls: u8,
    log_limit: LogLimit,
}

type Uart = Serial<UartInterrupt, NoEvents, Box<dyn Write + Send>>;

/// IRQ 4 as the trigger that vm-superio expects.
struct UartInterrupt(Arc<dyn InterruptLine>);

impl vm_superio::Trigger for UartInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse()
    }
}

impl SerialDevice {
    /// Bytes of address space.
    pub const SIZE: u64 = 8;

    /// A UART after reset. It asserts `interrupt`, an edge each time, and writes what the guest sends to `output`, byte
    /// by byte on the vCPU's thread: `output` must never block. `on_input_drained` is written once the guest can take
    /// input again after `input_room` or `enqueue` had to refuse some.
    pub fn new(
        interrupt: Arc<dyn InterruptLine>,
        output: Box<dyn Write + Send>,
        on_input_drained: EventFd,
    ) -> Self {
        Self {
            uart: Serial::new(UartInterrupt(Arc::clone(&interrupt)), output),
            interrupt,
            on_input_drained,
            input_blocked: false,
            polls: 0,
            log_limit: LogLimit::new(),
        }
    }

    /// How many bytes `enqueue` would accept now. When that is 0, `on_input_drained` tells when to ask again.
    pub fn input_room(&mut self) -> usize {
        let room = if self.takes_input() { self.uart.fifo_capacity() } else { 0 };
        self.input_blocked |= room == 0;
        room
    }

    /// Passes typed bytes to the guest and returns how many of them it took. Keep the rest, and offer it again after
    /// `on_input_drained`.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes.len().min(self.input_room());
        // It fails only on a full FIFO, which the line above excludes, or at raising the interrupt.
        if let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..accepted]) {
            self.report(&error);
        }
        self.input_blocked |= accepted < bytes.len();
        accepted
    }

    /// The reason for the interrupt. On the chip a receive interrupt is pending as long as there is data. Linux reads 256
    /// bytes at most, then looks here whether there is more: if a paste goes on meanwhile, the rest must still be announced.
    fn interrupt_identification(&mut self) -> u8 {
        let identification = self.uart.read(INTERRUPT_IDENTIFICATION);
        let data = self.uart.fifo_capacity() < FIFO_SIZE;
        if identification & NO_INTERRUPT != 0 && data && self.data_interrupt_enabled() {
            (identification & !NO_INTERRUPT) | DATA_AVAILABLE
        } else {
            identification
        }
    }

    /// Input has to wait until the guest listens: until its driver enables the receive interrupt, or polls. Linux
    /// throws away what it finds in the FIFO before that (serial8250_do_startup), which would cost a script on our
    /// standard input its first bytes. It waits also while the guest tests its UART in loopback, which cuts the line
    /// off.
    fn takes_input(&mut self) -> bool {
        (self.data_interrupt_enabled() || self.polls == POLLS_FOR_INPUT)
            && self.uart.read(MODEM_CONTROL) & LOOPBACK == 0
    }

    /// Read from the saved state, since the register's offset leads elsewhere while the divisor latch is open.
    fn data_interrupt_enabled(&self) -> bool {
        self.uart.state().interrupt_enable & ENABLE_DATA_AVAILABLE != 0
    }

    /// After each access of the guest: it may have made room. Room is announced when the FIFO is empty, so that 64 bytes cost
    /// one wake-up.
    fn after_access(&mut self, polled: bool) {
        self.polls = if polled { POLLS_FOR_INPUT.min(self.polls + 1) } else { 0 };
        if self.input_blocked && self.uart.fifo_capacity() == FIFO_SIZE && self.takes_input() {
            self.input_blocked = false;
            if let Err(error) = self.on_input_drained.write(1) {
                self.report(&error);
            }
        }
    }

    fn report(&self, error: &dyn Display) {
        if let Some(suppressed) = self.log_limit.admit() {
            tracing::warn!(%error, suppressed, "serial port");
        }
    }
}

impl BusDevice for SerialDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = match offset {
                INTERRUPT_IDENTIFICATION => self.interrupt_identification(),
                _ => self.uart.read(offset),
            };
            self.after_access(offset == LINE_STATUS);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            if let Err(error) = self.uart.write(offset, *value) {
                self.report(&error);
            }
            self.after_access(false);
        }
    }

    /// What was typed and not read is lost. A console that waits for room is told when the next driver listens.
    fn reset(&mut self) {
        let output = std::mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        self.uart = Serial::new(UartInterrupt(Arc::clone(&self.interrupt)), output);
        self.polls = 0;
    }
}

//! A serial port (16550A). vm-superio implements the registers. This module adds input of any length through the 64-byte FIFO.
//!
//! Each byte of the guest's output goes to a writer on the vCPU's thread, which must not block. The console passes input, and an eventfd
//! tells it when there is room again.
//!
//! vm-superio 0.8 differs from a 16550A in three ways:
//!
//! - It clears a receive interrupt when the first byte is read. So `interrupt_identification` reports one as long as there is data.
//! - If a receive and a transmit interrupt are pending together, IIR reads as 6 ("line status"), and the read clears both. Linux looks
//!   only at the bit "nothing pending" of IIR, and then serves receiver and transmitter by LSR (serial8250_handle_irq in
//!   drivers/tty/serial/8250/8250_port.c).
//! - It ignores the FIFO control register. So a driver that clears the receive FIFO still gets the input from before.

#[cfg(test)]
mod fuzz;
mod input;
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
/// Interrupt enable bit for received data.
const ENABLE_DATA_AVAILABLE: u8 = 1;
/// Offset of the line status register.
const LINE_STATUS: u8 = 5;
/// After this many reads of the line status in a row, the driver is taken to poll for input. It cannot wait for output, because the
/// transmitter is always ready.
const POLLS_FOR_INPUT: u8 = 8;
/// Offset of the modem control register.
const MODEM_CONTROL: u8 = 4;
/// Modem control bit: the transmitter is connected to the receiver, and the line is disconnected.
const LOOPBACK: u8 = 1 << 4;

/// The UART.
pub struct SerialDevice {
    uart: Uart,
    interrupt: Arc<dyn InterruptLine>,
    on_input_drained: EventFd,
    /// The console has found no room, and waits for `on_input_drained`.
    input_blocked: bool,
    /// Reads of the line status in a row, up to `POLLS_FOR_INPUT`.
    polls: u8,
    log_limit: LogLimit,
}

type Uart = Serial<UartInterrupt, NoEvents, Box<dyn Write + Send>>;

/// The port's interrupt line as the trigger that vm-superio expects.
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

    /// A UART after reset. Each interrupt is an edge on `interrupt`. Each byte that the guest sends is written to `output` on the vCPU's
    /// thread, so `output` must never block. `on_input_drained` is written when there is room again for `input_room` or `enqueue`.
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
            log_limit: LogLimit::default(),
        }
    }

    /// The interrupt identification register. On the real chip, a receive interrupt is pending as long as there is data. Linux reads at
    /// most 256 bytes and then reads this register again: if input has arrived, the interrupt must still be pending.
    fn interrupt_identification(&mut self) -> u8 {
        let identification = self.uart.read(INTERRUPT_IDENTIFICATION);
        let data = self.uart.fifo_capacity() < FIFO_SIZE;
        if identification & NO_INTERRUPT != 0 && data && self.data_interrupt_enabled() {
            (identification & !NO_INTERRUPT) | DATA_AVAILABLE
        } else {
            identification
        }
    }

    /// Whether the guest takes input now: its driver has enabled the receive interrupt, or polls. Before that, Linux discards what is in
    /// the FIFO (serial8250_do_startup), for example the first bytes of a script on standard input. Input also waits while the guest
    /// tests its UART in loopback mode.
    fn takes_input(&mut self) -> bool {
        (self.data_interrupt_enabled() || self.polls == POLLS_FOR_INPUT)
            && self.uart.read(MODEM_CONTROL) & LOOPBACK == 0
    }

    /// Whether the guest has enabled the receive interrupt. Taken from vm-superio's state: while the divisor latch is open, the
    /// register's offset reads another register.
    fn data_interrupt_enabled(&self) -> bool {
        self.uart.state().interrupt_enable & ENABLE_DATA_AVAILABLE != 0
    }

    /// Called after each access of the guest, which may have made room. The console is woken only when the FIFO is empty, once for 64
    /// bytes.
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
        self.log_limit.warn(format_args!("a serial port cannot interrupt the guest: {error}"));
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

    /// Drops input that the guest has not read. A console that waits for room is woken when the guest's next driver takes input.
    fn reset(&mut self) {
        let output = std::mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        self.uart = Serial::new(UartInterrupt(Arc::clone(&self.interrupt)), output);
        self.polls = 0;
    }
}

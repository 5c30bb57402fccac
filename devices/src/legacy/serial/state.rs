//! The serial port as a value, to be saved while the machine stands still and put back into a new one.
//!
//! A capability: the device does not need it. It hooks in as a child of the device's module, and adds [`SerialDevice::save`] and
//! [`SerialDevice::restore`].
//!
//! If the guest had read the first byte in the FIFO, vm-superio restores the UART without a pending interrupt. So `restore` pulses the
//! line.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::Serial;
use vm_superio::serial::{NoEvents, SerialState as UartState};

use super::{FIFO_SIZE, SerialDevice, UartInterrupt};

/// The UART's registers and receive FIFO as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch (low, high), then the registers IER, IIR, LCR, LSR, MCR, MSR and SCR.
    pub(super) registers: [u8; 9],
    /// Received and not yet read.
    pub(super) input: Vec<u8>,
}

impl SerialDevice {
    /// Reads the registers and the receive FIFO. Called while no vCPU runs.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            registers: [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            input: uart.in_buffer,
        }
    }

    /// Restores a saved state. A guest with an interrupt condition to serve gets one interrupt, even if it got one before the save: a
    /// handler that finds nothing to do returns.
    ///
    /// # Errors
    /// When the state has more input than the FIFO holds.
    pub fn restore(&mut self, state: &SerialState) -> io::Result<()> {
        let [divisor_low, divisor_high, enable, identification, lcr, lsr, mcr, msr, scratch] =
            state.registers;
        let uart = UartState {
            baud_divisor_low: divisor_low,
            baud_divisor_high: divisor_high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: state.input.clone(),
        };
        if uart.in_buffer.len() > FIFO_SIZE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more input than the FIFO holds",
            ));
        }
        let output = std::mem::replace(self.uart.writer_mut(), Box::new(io::sink()));
        let line = UartInterrupt(Arc::clone(&self.interrupt));
        self.uart = Serial::from_state(&uart, line, NoEvents, output)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        if !uart.in_buffer.is_empty() && self.data_interrupt_enabled() {
            self.interrupt.pulse()?;
        }
        Ok(())
    }
}

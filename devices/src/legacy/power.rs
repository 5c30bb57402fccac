//! The registers by which the guest powers the machine off and resets it. The FADT of a hardware-reduced machine names them (ACPI 6.4
//! §4.8.3.6, §4.8.3.7). Each is one byte wide.
//!
//! A capability: `vmm/src/attach/legacy.rs` puts them on the bus, and no other module refers to them.

use super::{EventSink, GuestEvent};
use crate::bus::BusDevice;

/// Offset of SLEEP_CONTROL_REG. SLEEP_STATUS_REG follows, and always reads as 0: the machine never sleeps, so it never wakes up.
const SLEEP_CONTROL: u64 = 0;
/// SLP_EN of the sleep control register: enter the sleep state now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYPx of the sleep control register: three bits from here.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// The sleep type that the DSDT's `\_S5` gives for "soft off".
const SLEEP_TYPE_S5: u8 = 5;

/// Reset control register: a bit that resets the machine when it is written as 1. Bit 1 chooses between a hard and a
/// soft reset, which are the same here.
const RESET_NOW: u8 = 1 << 2;

/// The sleep control and the sleep status register, one after the other.
pub struct SleepRegisters(pub EventSink);

impl SleepRegisters {
    /// Bytes of address space.
    pub const SIZE: u64 = 2;
}

impl BusDevice for SleepRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (SLEEP_CONTROL, [value]) = (offset, data) else { return };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
            (self.0)(GuestEvent::PowerOff);
        }
    }
}

/// The reset control register, as chipsets have it at port 0xcf9.
pub struct ResetRegister(pub EventSink);

impl ResetRegister {
    /// Bytes of address space.
    pub const SIZE: u64 = 1;
}

impl BusDevice for ResetRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [value] = data
            && value & RESET_NOW != 0
        {
            (self.0)(GuestEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{in_byte, recorder};
    use super::*;

    #[test]
    fn soft_off_needs_the_type_and_the_enable_bit() {
        let (sink, events) = recorder();
        let mut registers = SleepRegisters(sink);
        for value in (0..=u8::MAX).filter(|value| *value & 0x3c != 0x34) {
            registers.write(0, &[value]);
        }
        registers.write(0, &[0x34, 0x34]);
        registers.write(1, &[0x34]);
        assert_eq!(*events.lock().unwrap(), []);
        registers.write(0, &[0x34]);
        assert_eq!(*events.lock().unwrap(), [GuestEvent::PowerOff]);
        assert_eq!(in_byte(&mut registers, 1), 0);
    }

    /// Linux sets the kind of reset first and pulls the line with a second write (BOOT_CF9 in
    /// arch/x86/kernel/reboot.c).
    #[test]
    fn the_reset_bit_resets() {
        let (sink, events) = recorder();
        let mut register = ResetRegister(sink);
        assert_eq!(in_byte(&mut register, 0), 0);
        register.write(0, &[0x02]);
        register.write(0, &[0x06, 0]);
        assert_eq!(*events.lock().unwrap(), []);
        register.write(0, &[0x06]);
        assert_eq!(*events.lock().unwrap(), [GuestEvent::Reset]);
    }
}

//! The PS/2 controller, of which only the command that resets the CPU is implemented. Linux reboots by it if there is no ACPI.
//!
//! A capability: `vmm/src/attach/legacy.rs` puts it on the bus, and no other module refers to it.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use super::{EventSink, GuestEvent};
use crate::bus::BusDevice;

/// Offset of the status (read) and command (write) register: port 0x64 of 0x60-0x64.
const STATUS: u64 = 4;

/// Status bit: the controller has a byte for the CPU.
const OUTPUT_BUFFER_FULL: u8 = 1;

/// The controller's reset line.
pub struct I8042 {
    controller: I8042Device<ResetLine>,
}

struct ResetLine(EventSink);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(GuestEvent::Reset);
        Ok(())
    }
}

impl I8042 {
    /// Bytes of address space, from the data port to the command port.
    pub const SIZE: u64 = 5;

    /// A controller that reports to `sink`.
    pub fn new(sink: EventSink) -> Self {
        Self { controller: I8042Device::new(ResetLine(sink)) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The output buffer is always full. So Linux's probe reads 16 bytes, logs "No controller found" and goes on (i8042_flush in
        // drivers/input/serio/i8042.c). With an empty buffer it would wait for answers for half a second. The input buffer is always
        // empty, which is all that Linux waits for before a reset (kb_wait in arch/x86/kernel/reboot.c).
        data.fill(if offset == STATUS { OUTPUT_BUFFER_FULL } else { 0 });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.controller.write(offset, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{in_byte, recorder};
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let (sink, events) = recorder();
        let mut controller = I8042::new(sink);
        for (offset, value) in [(0, 0xfe), (4, 0xff), (4, 0xaa), (3, 0xfe)] {
            controller.write(offset, &[value]);
        }
        controller.write(4, &[0xfe, 0]);
        assert_eq!(*events.lock().unwrap(), []);
        controller.write(4, &[0xfe]);
        assert_eq!(*events.lock().unwrap(), [GuestEvent::Reset]);
    }

    #[test]
    fn the_probe_finds_no_keyboard_and_the_reset_path_does_not_wait() {
        let mut controller = I8042::new(recorder().0);
        let input_buffer_full = 2;
        assert_eq!(in_byte(&mut controller, 4) & input_buffer_full, 0);
        assert!((0..17).all(|_| in_byte(&mut controller, 4) & OUTPUT_BUFFER_FULL != 0));
        assert_eq!(in_byte(&mut controller, 0), 0);
    }
}

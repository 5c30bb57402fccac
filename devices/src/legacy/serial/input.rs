//! Input for the guest's serial port, as the console passes it.
//!
//! A capability: a machine without console input does without it. It hooks in as a child of the device's module, and adds
//! [`SerialDevice::input_room`] and [`SerialDevice::enqueue`].

use super::SerialDevice;

impl SerialDevice {
    /// How many bytes `enqueue` would accept now. If it is 0, `on_input_drained` is written when that changes.
    pub fn input_room(&mut self) -> usize {
        let room = if self.takes_input() { self.uart.fifo_capacity() } else { 0 };
        self.input_blocked |= room == 0;
        room
    }

    /// Passes input to the guest, and returns how many bytes were accepted. The caller keeps the rest until `on_input_drained` is
    /// written.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes.len().min(self.input_room());
        // It fails if the FIFO is full, which the line above excludes, or if the interrupt cannot be raised.
        if let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..accepted]) {
            self.report(&error);
        }
        self.input_blocked |= accepted < bytes.len();
        accepted
    }
}

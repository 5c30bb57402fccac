//! The debug-exit port: the byte that the guest writes to it becomes the exit status of minivmm, by which a job in a guest can report its
//! result.
//!
//! A capability: `vmm/src/attach/legacy.rs` puts it on the bus, and no other module refers to it.

use super::{EventSink, GuestEvent};
use crate::bus::BusDevice;

/// The debug-exit port.
pub struct DebugExit(pub EventSink);

impl DebugExit {
    /// Bytes of address space: one port, so that only byte-wide accesses reach it.
    pub const SIZE: u64 = 1;
}

impl BusDevice for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [status] = *data {
            (self.0)(GuestEvent::DebugExit(status));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{in_byte, recorder};
    use super::*;

    #[test]
    fn the_written_byte_is_the_status() {
        let (sink, events) = recorder();
        let mut port = DebugExit(sink);
        assert_eq!(in_byte(&mut port, 0), 0xff);
        port.write(0, &[42]);
        assert_eq!(*events.lock().unwrap(), [GuestEvent::DebugExit(42)]);
    }
}

//! The pvpanic port, by which a guest reports that its kernel panicked (QEMU, docs/specs/pvpanic). A read returns the events that the
//! port supports. A write reports events.
//!
//! A capability: `vmm/src/attach/legacy.rs` puts it on the bus, and no other module refers to it.

use super::{EventSink, GuestEvent};
use crate::bus::BusDevice;

/// The guest's kernel panicked, and no crash kernel takes over.
const PANICKED: u8 = 1;
/// The guest's kernel panicked and its crash kernel takes over.
const CRASH_LOADED: u8 = 2;

/// The pvpanic port.
pub struct Pvpanic {
    sink: EventSink,
    reported: u8,
}

impl Pvpanic {
    /// Bytes of address space.
    pub const SIZE: u64 = 1;

    /// A port that reports to `sink`. Until a reset, it reports each kind of event once.
    pub fn new(sink: EventSink) -> Self {
        Self { sink, reported: 0 }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let fresh = value & !self.reported;
        self.reported |= value;
        for (bit, event) in
            [(PANICKED, GuestEvent::Panicked), (CRASH_LOADED, GuestEvent::CrashLoaded)]
        {
            if fresh & bit != 0 {
                (self.sink)(event);
            }
        }
    }

    fn reset(&mut self) {
        self.reported = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{in_byte, recorder};
    use super::*;

    #[test]
    fn offers_both_events_and_reports_each_once() {
        let (sink, events) = recorder();
        let mut port = Pvpanic::new(sink);
        assert_eq!(in_byte(&mut port, 0), 3);
        for value in [0, 4, CRASH_LOADED, CRASH_LOADED, PANICKED, PANICKED | CRASH_LOADED] {
            port.write(0, &[value]);
        }
        assert_eq!(*events.lock().unwrap(), [GuestEvent::CrashLoaded, GuestEvent::Panicked]);
        port.reset();
        port.write(0, &[CRASH_LOADED]);
        assert_eq!(events.lock().unwrap().len(), 3, "after a reset it reports again");
    }
}

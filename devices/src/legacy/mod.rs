//! The few devices of a PC that a Linux guest expects: the UART of its console, and the registers by which it powers off, resets and
//! reports a panic.
//!
//! They see offsets and never absolute addresses: the owner of the machine decides where on the bus each device is.

use std::sync::Arc;

mod debug_exit;
mod i8042;
mod power;
mod pvpanic;
mod serial;

pub use debug_exit::DebugExit;
pub use i8042::I8042;
pub use power::{ResetRegister, SleepRegisters};
pub use pvpanic::Pvpanic;
pub use serial::{SerialDevice, SerialState};

/// An event that the guest reports by one of these devices. The owner of the machine decides what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest asks for a reset of the machine.
    Reset,
    /// The guest asks to power the machine off.
    PowerOff,
    /// The guest's kernel panicked, and no crash kernel takes over.
    Panicked,
    /// The guest's kernel panicked and its crash kernel takes over.
    CrashLoaded,
    /// The guest wrote this exit status to the debug-exit port.
    DebugExit(u8),
}

/// Receives guest events. A device calls it on a vCPU's thread, so it must pass the event on and return. A hostile guest can cause any
/// number of calls before its vCPUs are stopped.
pub type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;

    /// A sink that records events, and its record.
    pub(super) fn recorder() -> (EventSink, Arc<Mutex<Vec<GuestEvent>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&events);
        (Arc::new(move |event| recorded.lock().unwrap().push(event)), events)
    }

    /// What the guest reads with `in al, dx`.
    pub(super) fn in_byte(device: &mut impl BusDevice, offset: u64) -> u8 {
        let mut data = [0xa5];
        device.read(offset, &mut data);
        data[0]
    }
}

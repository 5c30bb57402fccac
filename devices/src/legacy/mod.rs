//! The few devices of a PC that a Linux guest expects: the console UART, and the registers by which it ends.
//!
//! They know offsets, never absolute addresses: the machine's owner decides where on the bus each one sits.

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

/// What the guest tells us by one of these devices. The machine's owner decides what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The machine is to start again.
    Reset,
    /// The machine is to switch itself off.
    PowerOff,
    /// The guest's kernel panicked and nothing will handle it.
    Panicked,
    /// The guest's kernel panicked and its crash kernel takes over.
    CrashLoaded,
    /// The guest ended a job with this exit status.
    DebugExit(u8),
}

/// Where guest events go. Called on a vCPU thread, from inside the device: it must hand the event over and return, and
/// a hostile guest may call it any number of times before its vCPUs are stopped.
pub type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;

    /// A sink that remembers, and what it remembers.
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

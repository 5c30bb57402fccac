//! Puts the devices on the port I/O bus by which the guest powers off, resets the machine and reports a panic.
//!
//! A capability: the builder calls it. `machine::reports` acts on what the devices report.

use std::sync::{Arc, Mutex};

use arch::layout;
use devices::bus::{Bus, BusDevice};
use devices::legacy::{
    DebugExit, EventSink, GuestEvent, I8042, Pvpanic, ResetRegister, SleepRegisters,
};

use crate::error::Error;
use crate::events::{EventSender, VmEvent};

/// Puts the legacy devices on the port I/O bus, except for serial ports.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn legacy(
    port_io: &mut Bus,
    events: &Arc<EventSender>,
    debug_exit: bool,
) -> Result<(), Error> {
    let sink: EventSink = {
        let events = Arc::clone(events);
        Arc::new(move |event: GuestEvent| events.send(VmEvent::Guest(event)))
    };
    let events = || Arc::clone(&sink);
    add(port_io, layout::I8042_DATA, I8042::SIZE, I8042::new(events()))?;
    add(port_io, layout::SLEEP_CONTROL, SleepRegisters::SIZE, SleepRegisters(events()))?;
    add(port_io, layout::RESET, ResetRegister::SIZE, ResetRegister(events()))?;
    add(port_io, layout::PVPANIC, Pvpanic::SIZE, Pvpanic::new(events()))?;
    if debug_exit {
        add(port_io, layout::DEBUG_EXIT, DebugExit::SIZE, DebugExit(sink))?;
    }
    Ok(())
}

fn add(bus: &mut Bus, port: u16, size: u64, device: impl BusDevice + 'static) -> Result<(), Error> {
    Ok(bus.insert(port.into(), size, Arc::new(Mutex::new(device)))?)
}

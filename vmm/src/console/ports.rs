//! Connects each serial port of the guest to its console: one, or two with a second `--console`.
//!
//! A capability: the builder calls it. The console and the UART do not know it.

use std::sync::{Arc, Mutex};

use arch::layout;
use devices::bus::Bus;
use devices::legacy::SerialDevice;
use devices::spawn::Spawn;
use kvm_ioctls::VmFd;
use rustix::termios::ttyname;

use super::open::open;
use super::serial_console::SerialConsole;
use crate::attach;
use crate::chardev;
use crate::config::VmConfig;
use crate::error::Error;
use crate::output_files::OutputFiles;
use crate::sources::Source;

/// Puts the guest's serial ports on the bus, each with its console. With `--exec`, the second one belongs to `exec`.
///
/// # Errors
/// When the host or KVM refuses a resource.
pub(crate) fn attach_ports(
    vm: &Arc<VmFd>,
    port_io: &mut Bus,
    config: &VmConfig,
    sources: &mut Vec<Box<dyn Source>>,
    outputs: &mut OutputFiles,
    spawn: &Spawn,
) -> Result<Vec<Arc<Mutex<SerialDevice>>>, Error> {
    let mut ports = Vec::new();
    for (index, place) in layout::SERIAL_PORTS.into_iter().enumerate() {
        if !config.serial[index] || (index > 0 && config.exec.is_some()) {
            continue;
        }
        let mut ends = open(&config.consoles[index], outputs)?;
        let terminal = ends._kept_open.as_ref().and_then(|slave| ttyname(slave, Vec::new()).ok());
        let terminal = terminal.map(|name| name.to_string_lossy().into_owned());
        let filename = chardev::filename(&config.consoles[index], terminal);
        chardev::add(&format!("serial{index}"), filename);
        ends.output.start(spawn)?;
        let (serial, input_drained) = attach::serial(vm, port_io, place, ends.output.writer())?;
        ports.push(Arc::clone(&serial));
        sources.push(Box::new(SerialConsole::new(ends, serial, input_drained)));
    }
    Ok(ports)
}

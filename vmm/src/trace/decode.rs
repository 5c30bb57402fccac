//! Decodes the address of a vCPU's exit: the device, the register, and the clause that specifies it.

use std::fmt;

use arch::layout;
use devices::virtio::spec::mmio::{CONFIG_OFFSET, Register};

/// The device and the register at an address. `Display` writes both, and the clause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The kind of device, such as `virtio-mmio`.
    pub device: &'static str,
    /// The number of the device among those of its kind.
    pub number: u64,
    /// The register, or the field `config` of a configuration space.
    pub register: &'static str,
    /// The clause of the specification for the register.
    pub clause: &'static str,
}

/// The registers of a 16550, read and written (Texas Instruments' PC16550D, table 2).
const UART: [&str; 8] = ["RBR/THR", "IER", "IIR/FCR", "LCR", "MCR", "LSR", "MSR", "SCR"];

/// What is at an address of the guest: an I/O port if `port`, guest-physical otherwise. `None`: no device of minivmm.
pub fn decode(address: u64, port: bool) -> Option<Decoded> {
    if port { decode_port(address.try_into().ok()?) } else { decode_register(address) }
}

fn decode_port(port: u16) -> Option<Decoded> {
    for (number, (base, _)) in (0..).zip(layout::SERIAL_PORTS) {
        if let Some(register) = port.checked_sub(base).and_then(|at| UART.get(usize::from(at))) {
            return Some(Decoded { device: "ttyS", number, register, clause: "16550" });
        }
    }
    let (device, register, clause) = match port {
        layout::I8042_DATA => ("i8042", "data", "8042"),
        layout::I8042_COMMAND => ("i8042", "command", "8042"),
        layout::PVPANIC => ("pvpanic", "events", "QEMU docs/specs/pvpanic.rst"),
        layout::SLEEP_CONTROL => ("acpi", "SLEEP_CONTROL", "ACPI 6.5 §4.8.3.7"),
        layout::SLEEP_STATUS => ("acpi", "SLEEP_STATUS", "ACPI 6.5 §4.8.3.7"),
        layout::RESET => ("acpi", "RESET_REG", "ACPI 6.5 §4.8.3.6"),
        layout::DEBUG_EXIT => ("debug-exit", "status", "--debug-exit"),
        _ => return None,
    };
    Some(Decoded { device, number: 0, register, clause })
}

fn decode_register(address: u64) -> Option<Decoded> {
    let offset = address.checked_sub(layout::VIRTIO_MMIO.0)?;
    let (number, offset) = (offset / layout::VIRTIO_MMIO_SIZE, offset % layout::VIRTIO_MMIO_SIZE);
    (number < layout::VIRTIO_MMIO_MAX as u64).then_some(())?;
    let (register, clause) = match Register::decode(offset) {
        Some(register) => name(register),
        None if offset >= CONFIG_OFFSET => ("config", "virtio 1.2 §5.2.4"),
        None => ("reserved", "virtio 1.2 §4.2.2"),
    };
    Some(Decoded { device: "virtio-mmio", number, register, clause })
}

/// The register's name in the specification's table, and the clause that says most about it.
fn name(register: Register) -> (&'static str, &'static str) {
    use Register::*;
    match register {
        MagicValue => ("MagicValue", "virtio 1.2 §4.2.2"),
        Version => ("Version", "virtio 1.2 §4.2.2"),
        DeviceId => ("DeviceID", "virtio 1.2 §5"),
        VendorId => ("VendorID", "virtio 1.2 §4.2.2"),
        DeviceFeatures => ("DeviceFeatures", "virtio 1.2 §2.2"),
        DeviceFeaturesSel => ("DeviceFeaturesSel", "virtio 1.2 §2.2"),
        DriverFeatures => ("DriverFeatures", "virtio 1.2 §2.2"),
        DriverFeaturesSel => ("DriverFeaturesSel", "virtio 1.2 §2.2"),
        QueueSel => ("QueueSel", "virtio 1.2 §4.2.3.2"),
        QueueNumMax => ("QueueNumMax", "virtio 1.2 §4.2.3.2"),
        QueueNum => ("QueueNum", "virtio 1.2 §4.2.3.2"),
        QueueReady => ("QueueReady", "virtio 1.2 §4.2.3.2"),
        QueueNotify => ("QueueNotify", "virtio 1.2 §4.2.3.3"),
        InterruptStatus => ("InterruptStatus", "virtio 1.2 §4.2.3.4"),
        InterruptAck => ("InterruptACK", "virtio 1.2 §4.2.3.4"),
        Status => ("Status", "virtio 1.2 §2.1"),
        QueueDescLow => ("QueueDescLow", "virtio 1.2 §4.2.3.2"),
        QueueDescHigh => ("QueueDescHigh", "virtio 1.2 §4.2.3.2"),
        QueueDriverLow => ("QueueDriverLow", "virtio 1.2 §4.2.3.2"),
        QueueDriverHigh => ("QueueDriverHigh", "virtio 1.2 §4.2.3.2"),
        QueueDeviceLow => ("QueueDeviceLow", "virtio 1.2 §4.2.3.2"),
        QueueDeviceHigh => ("QueueDeviceHigh", "virtio 1.2 §4.2.3.2"),
        ShmSel => ("SHMSel", "virtio 1.2 §2.10"),
        ShmLenLow => ("SHMLenLow", "virtio 1.2 §2.10"),
        ShmLenHigh => ("SHMLenHigh", "virtio 1.2 §2.10"),
        ShmBaseLow => ("SHMBaseLow", "virtio 1.2 §2.10"),
        ShmBaseHigh => ("SHMBaseHigh", "virtio 1.2 §2.10"),
        QueueReset => ("QueueReset", "virtio 1.2 §2.6.1"),
        ConfigGeneration => ("ConfigGeneration", "virtio 1.2 §2.5.1"),
    }
}

impl fmt::Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, number, register, clause } = self;
        write!(f, "{device}{number} {register} ({clause})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_and_ports_have_names() {
        let shown = |address, port| decode(address, port).map(|found| found.to_string());
        let second = layout::VIRTIO_MMIO.0 + layout::VIRTIO_MMIO_SIZE;
        assert_eq!(
            shown(second + 0x70, false).as_deref(),
            Some("virtio-mmio1 Status (virtio 1.2 §2.1)")
        );
        assert_eq!(
            shown(second + 0x108, false).as_deref(),
            Some("virtio-mmio1 config (virtio 1.2 §5.2.4)")
        );
        assert_eq!(shown(0x3fd, true).as_deref(), Some("ttyS0 LSR (16550)"));
        assert_eq!(shown(0x2f8, true).as_deref(), Some("ttyS1 RBR/THR (16550)"));
        assert_eq!(shown(0x70, true), None);
        assert_eq!(shown(0x3f8, false), None);
        assert_eq!(shown(u64::MAX, false), None);
        assert_eq!(shown(u64::MAX, true), None);
        for register in Register::ALL {
            assert_eq!(name(*register).0.to_lowercase(), format!("{register:?}").to_lowercase());
        }
    }
}

//! Devices that report events: the power button, to the guest by a Generic Event Device, and the panic port, by which the guest reports a
//! panic.
//!
//! A capability of `tables`, only with ACPI. A guest boots without these devices.

use acpi_tables::AmlSink;
use acpi_tables::aml::{EISAName, IO, Method, Name, Notify, Path, ResourceTemplate};

use super::acpi::{device, edge};
use crate::layout;

/// Notification value: the first event that is the device's own (ACPI 6.5 §5.6.6). A power button was pressed; a generation ID
/// has changed.
const DEVICE_EVENT: u8 = 0x80;

/// A Generic Event Device (ACPI 6.5 §5.6.9): its interrupt runs `_EVT`, which notifies the driver of the device `target`.
pub(super) fn event_device(sink: &mut dyn AmlSink, name: &str, uid: u32, gsi: u32, target: &str) {
    let (interrupt, target) = (edge(gsi, false), Path::new(target));
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let notify = Notify::new(&target, &DEVICE_EVENT);
    let event = Method::new("_EVT".into(), 1, true, vec![&notify]);
    device(sink, name, &"ACPI0013", uid, &[&Name::new("_CRS".into(), &resources), &event]);
}

/// The panic port, as QEMU announces its own (docs/specs/pvpanic).
pub(super) fn pvpanic(sink: &mut dyn AmlSink) {
    let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
    let resources = ResourceTemplate::new(vec![&port]);
    // Present, enabled, shown, functioning.
    let status = Name::new("_STA".into(), &0xfu8);
    device(sink, "PEVT", &"QEMU0001", 0, &[&Name::new("_CRS".into(), &resources), &status]);
}

/// The power button, and the event device that reports it.
pub(super) fn power_button(sink: &mut dyn AmlSink) {
    device(sink, "PWRB", &EISAName::new("PNP0C0C"), 0, &[]);
    event_device(sink, "GED_", 0, layout::POWER_BUTTON_GSI, "PWRB");
}

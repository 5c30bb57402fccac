//! The tables that tell the guest what its hardware is: ACPI, or an MPTable for `--acpi off`.

mod acpi;
mod events;
mod generation_id;
mod mptable;

use acpi_tables::AmlSink;

use crate::Structure;
use crate::machine_layout::MachineLayout;

/// The tables for the machine of `layout`. They fit into the memory set aside for them with any number of processors and
/// disks that a layout has.
pub(crate) fn describe(layout: &MachineLayout) -> Structure {
    if layout.spec.acpi { acpi::tables(layout, add_last) } else { mptable::table(layout.spec.cpus) }
}

/// The words that the kernel command line needs besides the tables.
pub(crate) fn words(layout: &MachineLayout) -> Vec<String> {
    if layout.spec.acpi { Vec::new() } else { mptable::words(layout) }
}

/// Plugs in the devices that a guest boots without.
fn add_last(sink: &mut dyn AmlSink) {
    events::pvpanic(sink);
    events::power_button(sink);
    generation_id::vgen(sink);
}

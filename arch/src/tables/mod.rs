//! The tables that tell the guest what its hardware is: ACPI, or an MPTable for `--acpi off`.

mod acpi;
mod generation_id;
mod mptable;

use crate::Structure;
use crate::machine_layout::MachineLayout;
use generation_id::vgen;

/// The tables for the machine of `layout`. They fit into the memory set aside for them with any number of processors and
/// disks that a layout has.
pub(crate) fn describe(layout: &MachineLayout) -> Structure {
    if layout.spec.acpi { acpi::tables(layout, vgen) } else { mptable::table(layout.spec.cpus) }
}

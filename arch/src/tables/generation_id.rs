//! The device that gives the guest the VM generation ID (Microsoft, "Virtual Machine Generation ID"): 16 random bytes in guest memory,
//! which change at each restore of a saved machine. The guest then reseeds its random number generator, so clones draw different numbers.
//!
//! A capability of `tables`, only with ACPI. `vmm/src/snapshot/generation_id.rs` draws the ID.

use acpi_tables::AmlSink;
use acpi_tables::aml::{self, Name, Package};

use super::acpi::device;
use super::events::event_device;
use crate::layout;

/// The ID by which drivers find the device. Linux's vmgenid compares it in upper case.
const COMPATIBLE: &str = "VM_Gen_Counter";

/// Adds the device, and the event device that reports another ID.
pub(super) fn vgen(sink: &mut dyn AmlSink) {
    let compatible = Name::new("_CID".into(), &COMPATIBLE);
    let description = Name::new("_DDN".into(), &COMPATIBLE);
    // The lower and the upper half of the ID's address.
    let low = layout::GENERATION_ID.0 as u32;
    let halves = Package::new(vec![&low, &aml::ZERO]);
    let address = Name::new("ADDR".into(), &halves);
    device(sink, "VGEN", &"QEMUVGID", 0, &[&compatible, &description, &address]);
    event_device(sink, "GEDV", 1, layout::GENERATION_ID_GSI, "VGEN");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_finds_the_id_by_its_name_and_address() {
        let mut aml = Vec::new();
        vgen(&mut aml);
        let contains = |needle: &[u8]| aml.windows(needle.len()).any(|window| window == needle);
        assert!(contains(b"\x08_CID\x0dVM_Gen_Counter\0"), "{aml:x?}");
        // Name, Package of 2 elements: DWordPrefix and the address, ZeroOp.
        assert!(contains(b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x00"), "{aml:x?}");
        // Notify VGEN of the first event of its own.
        assert!(contains(b"\x86VGEN\x0a\x80"), "{aml:x?}");
    }
}

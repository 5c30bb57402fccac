//! The boot GDT: flat segments for the 64-bit entry and the 32-bit one (SDM 3A §3.4.5).
//!
//! KVM takes segment registers whole, hidden parts included. So the table in memory matters only to a guest that reloads one before it
//! has loaded a table of its own. Both are made from the same descriptors.

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::{Structure, layout};

/// Selectors, named as in Linux: the boot protocol asks for `__BOOT_CS` and `__BOOT_DS` at just these
/// (Documentation/x86/boot.rst, "64-bit Boot Protocol").
const BOOT_CS64: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
const BOOT_CS32: u16 = 0x30;

// Segment types (SDM 3A tables 3-1 and 3-2).
const TYPE_DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TYPE_CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const TYPE_TSS_BUSY: u8 = 0xb;

const fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: !long as u8,
        s: 1,
        l: long as u8,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The code segment of the 64-bit entry, which the Linux boot protocol wants at selector 0x10 (`__BOOT_CS`).
pub const CODE64: kvm_segment = flat(BOOT_CS64, TYPE_CODE_EXECUTE_READ_ACCESSED, true);
/// The code segment of the PVH entry, 32 bits wide. The protocol does not say at which selector it is.
pub const CODE32: kvm_segment = flat(BOOT_CS32, TYPE_CODE_EXECUTE_READ_ACCESSED, false);
/// The data and stack segment of both entries, at selector 0x18 (`__BOOT_DS`), with a limit of 4 GiB.
pub const DATA: kvm_segment = flat(BOOT_DS, TYPE_DATA_READ_WRITE_ACCESSED, false);
/// The task register: never used, but VM entry wants a busy TSS in it (SDM 3C §27.3.1.2).
pub const TSS: kvm_segment = kvm_segment {
    limit: 0x67,
    selector: BOOT_TSS,
    type_: TYPE_TSS_BUSY,
    s: 0,
    g: 0,
    db: 0,
    ..flat(BOOT_TSS, TYPE_TSS_BUSY, false)
};

/// Null, null, 64-bit code, data, TSS (16 bytes in 64-bit mode), 32-bit code.
fn table() -> [u64; 7] {
    [0, 0, descriptor(&CODE64), descriptor(&DATA), descriptor(&TSS), 0, descriptor(&CODE32)]
}

/// The value of the GDT register: it points to the table that `structure` puts into memory.
pub fn register() -> kvm_dtable {
    kvm_dtable { base: layout::GDT.0, limit: size_of_val(&table()) as u16 - 1, padding: [0; 3] }
}

/// The table as the guest finds it at [`layout::GDT`].
pub(crate) fn structure() -> Structure {
    let bytes = table().map(u64::to_le_bytes).as_flattened().to_vec();
    Structure { name: "GDT", address: layout::GDT, bytes }
}

/// The 8 bytes that load this segment (SDM 3A figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.avl) << 52
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
        | (base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&CODE64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&CODE32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&TSS), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn every_selector_finds_its_segment_in_memory() {
        let table = structure();
        assert_eq!(register().base, table.address.0);
        for segment in [CODE64, CODE32, DATA, TSS] {
            assert!(segment.selector + 7 <= register().limit);
            let entry = table.bytes[usize::from(segment.selector)..].first_chunk().unwrap();
            assert_eq!(u64::from_le_bytes(*entry), descriptor(&segment));
        }
    }
}

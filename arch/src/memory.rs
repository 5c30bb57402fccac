//! Guest RAM: where it lies around the hole below 4 GiB, and the map of it that the guest gets.

use vm_memory::GuestAddress;

use crate::layout;

/// What a range of guest-physical addresses is, with the number that both Linux's e820 table and the PVH memory map
/// give it (ACPI 6.5 §15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names are e820's")]
pub enum Kind {
    Ram = 1,
    Reserved = 2,
    /// ACPI tables: RAM again once the guest has read them.
    Acpi = 3,
}

/// One entry of the memory map: `size` bytes from the guest-physical address `start` on. What no entry covers is not
/// there, or belongs to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct Range {
    pub start: u64,
    pub size: u64,
    pub kind: Kind,
}

/// Where `bytes` of RAM go: from 0 up to the hole, the rest from 4 GiB up. Empty for 0 bytes.
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(layout::HOLE_START.0);
    // A 64-bit host: a byte count fits a usize.
    [(GuestAddress(0), low as usize), (layout::HOLE_END, (bytes - low) as usize)]
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .collect()
}

/// The end (exclusive) of the RAM that starts at address 0: what a kernel, loaded below the hole, may fill.
pub fn low_end(ranges: &[(GuestAddress, usize)]) -> u64 {
    ranges.iter().find(|(start, _)| start.0 == 0).map_or(0, |(_, size)| *size as u64)
}

/// The memory map (e820) for RAM at `ranges`: a PC's low megabyte, then plain RAM.
pub fn e820(ranges: &[(GuestAddress, usize)]) -> Vec<Range> {
    use Kind::{Acpi, Ram, Reserved};
    let low_megabyte = [
        (0, layout::EBDA.0, Ram),
        (layout::EBDA.0, layout::VGA_WINDOW.0, Reserved),
        (layout::ACPI_TABLES.0, layout::MPTABLE.0, Acpi),
        (layout::MPTABLE.0, layout::HIGH_MEMORY.0, Reserved),
    ];
    let mut map = Vec::new();
    for (start, size) in ranges {
        let end = start.0.saturating_add(*size as u64);
        let pieces = low_megabyte.into_iter().chain([(layout::HIGH_MEMORY.0, u64::MAX, Ram)]);
        map.extend(pieces.filter_map(|(from, to, kind)| {
            let (from, to) = (from.max(start.0), to.min(end));
            (from < to).then(|| Range { start: from, size: to - from, kind })
        }));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(0), []);
        for bytes in [32 * MIB, 64 * MIB, 512 * MIB, 3 * GIB] {
            assert_eq!(ram_ranges(bytes), [(GuestAddress(0), bytes as usize)]);
        }
        let above = |bytes: u64| {
            [(GuestAddress(0), 3 * GIB as usize), (GuestAddress(4 * GIB), bytes as usize)]
        };
        assert_eq!(ram_ranges(3 * GIB + 4096), above(4096));
        assert_eq!(ram_ranges(5 * GIB), above(2 * GIB));
    }

    #[test]
    fn e820_has_a_low_megabyte_and_plain_ram() {
        for bytes in [32 * MIB, 64 * MIB, 512 * MIB, 3 * GIB] {
            let map = e820(&ram_ranges(bytes));
            let expected = [
                Range { start: 0, size: 0x9_fc00, kind: Kind::Ram },
                Range { start: 0x9_fc00, size: 0x400, kind: Kind::Reserved },
                Range { start: 0xe_0000, size: 0x1_0000, kind: Kind::Acpi },
                Range { start: 0xf_0000, size: 0x1_0000, kind: Kind::Reserved },
                Range { start: MIB, size: bytes - MIB, kind: Kind::Ram },
            ];
            assert_eq!(map, expected, "{bytes}");
        }
        let map = e820(&ram_ranges(5 * GIB));
        assert_eq!(map.len(), 6);
        assert_eq!(map[4], Range { start: MIB, size: 3 * GIB - MIB, kind: Kind::Ram });
        assert_eq!(map[5], Range { start: 4 * GIB, size: 2 * GIB, kind: Kind::Ram });
    }

    #[test]
    fn e820_stays_inside_a_tiny_guest() {
        assert_eq!(e820(&ram_ranges(0x8000)), [Range { start: 0, size: 0x8000, kind: Kind::Ram }]);
        assert_eq!(e820(&[]), []);
        assert_eq!((low_end(&ram_ranges(5 * GIB)), low_end(&[])), (3 * GIB, 0));
    }
}

//! The page tables of the 64-bit entry: the first 4 GiB, one to one, in 2 MiB pages (SDM 3A §4.5).
//!
//! The 64-bit boot protocol asks that the kernel, the zero page and the command line are mapped one to one. All that this crate loads
//! lies below the hole, so 4 GiB are enough. The PVH entry runs without paging.

use crate::{Structure, layout};

const TABLE_SIZE: u64 = layout::PAGE_SIZE;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
// Each is for 1 GiB.
const DIRECTORIES: u64 = 4;

// Entry bits (SDM 3A table 4-18).
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// The value of `CR3` at the 64-bit entry: the address of the PML4, with no flags.
pub const CR3: u64 = layout::PAGE_TABLES.0;

/// The six tables, one behind the other: PML4, PDPT and four page directories.
pub(crate) fn structure() -> Structure {
    let pdpt = CR3 + TABLE_SIZE;
    let directories = pdpt + TABLE_SIZE;
    let mut entries = vec![0; (2 * ENTRIES) as usize];
    entries[0] = pdpt | PRESENT_WRITABLE;
    for (n, entry) in (0..DIRECTORIES).zip(&mut entries[ENTRIES as usize..]) {
        *entry = (directories + n * TABLE_SIZE) | PRESENT_WRITABLE;
    }
    entries.extend((0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE) | PRESENT_WRITABLE | LARGE));
    let bytes = entries.into_iter().flat_map(u64::to_le_bytes).collect();
    Structure { name: "page tables", address: layout::PAGE_TABLES, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(tables: &[u8], address: u64) -> Option<u64> {
        let mut table = CR3;
        for shift in [39, 30, 21] {
            let index = address >> shift & 0x1ff;
            let at = (table - CR3 + index * 8) as usize;
            let entry = u64::from_le_bytes(*tables[at..].first_chunk().unwrap());
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0b11, 0b11, "writable");
            assert_eq!(entry & LARGE != 0, shift == 21);
            table = entry & 0x000f_ffff_ffff_f000;
        }
        assert_eq!(table % LARGE_PAGE, 0);
        Some(table + address % LARGE_PAGE)
    }

    #[test]
    fn the_first_4_gib_translate_to_themselves_and_nothing_else_does() {
        let tables = structure().bytes;
        assert_eq!(tables.len() as u64, 6 * TABLE_SIZE);
        let end = 4 << 30;
        let samples = [
            0,
            0x472,
            layout::ZERO_PAGE.0,
            layout::CMDLINE.0,
            0x10_0000,
            0x100_0000,
            LARGE_PAGE - 1,
        ];
        let directory_edges = (1..4).flat_map(|gib: u64| [(gib << 30) - 1, gib << 30]);
        for address in samples.into_iter().chain(directory_edges).chain([end - 1]) {
            assert_eq!(translate(&tables, address), Some(address), "{address:#x}");
        }
        for address in [end, 1 << 39, 1 << 47] {
            assert_eq!(translate(&tables, address), None, "{address:#x}");
        }
    }
}

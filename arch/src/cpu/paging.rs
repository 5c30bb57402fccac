//! The page tables of the 64-bit entry: the first 4 GiB, one to one, in 2 MiB pages (SDM 3A §4.5).
//!
//! The 64-bit boot protocol asks that the kernel, the zero page and the command line are mapped one to one; everything
//! this crate loads lies below the hole, so 4 GiB cover it on any machine. The PVH entry runs without paging.

use vm_memory::GuestAddress;

use crate::{GuestMemory, WriteError, layout};

const TABLE_SIZE: u64 = 0x1000;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
/// Page directories, each for 1 GiB.
const DIRECTORIES: u64 = 4;

/// Entry bits (SDM 3A table 4-18).
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// What `CR3` holds: the PML4.
pub const CR3: u64 = layout::PAGE_TABLES.0;

/// Writes the tables to [`layout::PAGE_TABLES`].
///
/// # Errors
/// The guest's memory does not reach that far.
pub fn write(memory: &GuestMemory) -> Result<(), WriteError> {
    let pdpt = CR3 + TABLE_SIZE;
    let directories = pdpt + TABLE_SIZE;
    let pml4_entries = [pdpt | PRESENT_WRITABLE];
    let pdpt_entries: Vec<u64> = (0..DIRECTORIES).map(|n| (directories + n * TABLE_SIZE) | PRESENT_WRITABLE).collect();
    let pages: Vec<u64> = (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE) | PRESENT_WRITABLE | LARGE).collect();
    for (address, entries) in [(CR3, &pml4_entries[..]), (pdpt, &pdpt_entries), (directories, &pages)] {
        // Whole tables, so that what a previous kernel left is gone.
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(TABLE_SIZE as usize), 0);
        crate::write(memory, "page tables", GuestAddress(address), &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// Walks the tables as the processor does.
    fn translate(memory: &GuestMemory, address: u64) -> Option<u64> {
        let mut table = CR3;
        for shift in [39, 30, 21] {
            let index = address >> shift & 0x1ff;
            let entry: u64 = memory.read_obj(GuestAddress(table + index * 8)).unwrap();
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
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        // Left over from a previous kernel.
        memory.write_slice(&[0xff; 6 * TABLE_SIZE as usize], layout::PAGE_TABLES).unwrap();
        write(&memory).unwrap();
        let end = 4 << 30;
        let samples = [0, 0x472, layout::ZERO_PAGE.0, layout::CMDLINE.0, 0x10_0000, 0x100_0000, LARGE_PAGE - 1];
        let directory_edges = (1..4).flat_map(|gib: u64| [(gib << 30) - 1, gib << 30]);
        for address in samples.into_iter().chain(directory_edges).chain([end - 1]) {
            assert_eq!(translate(&memory, address), Some(address), "{address:#x}");
        }
        for address in [end, 1 << 39, 1 << 47] {
            assert_eq!(translate(&memory, address), None, "{address:#x}");
        }
    }

    #[test]
    fn too_little_memory_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0xb000)]).unwrap();
        assert!(write(&memory).unwrap_err().to_string().contains("page tables"));
    }
}

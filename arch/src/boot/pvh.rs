//! The start structures of Xen's PVH boot protocol (Xen's public/arch-x86/hvm/start_info.h, version 1).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestAddress};

use super::{Error, Told};
use crate::{GuestMemory, layout};

/// The version with a memory map.
const VERSION: u32 = 1;

/// Writes `hvm_start_info`, the module list and the memory map, and returns the first one's address.
pub(super) fn write(memory: &GuestMemory, told: &Told) -> Result<GuestAddress, Error> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: told.rsdp.map_or(0, |rsdp| rsdp.0),
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: told.map.len() as u32,
        ..Default::default()
    };
    // Linux takes the first module for its initrd.
    if let Some(initrd) = told.initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..Default::default() };
        crate::write(memory, "PVH module list", layout::PVH_MODULES, module.as_slice())?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES.0;
    }
    let entry = |range: &crate::memory::Range| hvm_memmap_table_entry {
        addr: range.start,
        size: range.size,
        type_: range.kind as u32,
        reserved: 0,
    };
    let map: Vec<u8> = told.map.iter().map(entry).flat_map(|entry| entry.as_slice().to_vec()).collect();
    crate::write(memory, "PVH memory map", layout::PVH_MEMORY_MAP, &map)?;
    crate::write(memory, "PVH start info", layout::PVH_START_INFO, info.as_slice())?;
    Ok(layout::PVH_START_INFO)
}

//! The start structures of Xen's PVH boot protocol (Xen's public/arch-x86/hvm/start_info.h, version 1).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::parameters::Parameters;
use crate::{Structure, layout};

/// The version of `hvm_start_info` that has a memory map.
const VERSION: u32 = 1;

/// `hvm_start_info`, the memory map, and with an initrd the module list.
pub(super) fn structures(parameters: &Parameters<'_>) -> Vec<Structure> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: parameters.rsdp.map_or(0, |rsdp| rsdp.0),
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: parameters.map.len() as u32,
        ..Default::default()
    };
    let entry = |range: &crate::memory::Range| hvm_memmap_table_entry {
        addr: range.start,
        size: range.size,
        type_: range.kind as u32,
        reserved: 0,
    };
    let mut structures = vec![Structure {
        name: "PVH memory map",
        address: layout::PVH_MEMORY_MAP,
        bytes: parameters.map.iter().flat_map(|range| entry(range).as_slice().to_vec()).collect(),
    }];
    // Linux takes the first module for its initrd.
    if let Some(initrd) = parameters.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address.0,
            size: initrd.length,
            ..Default::default()
        };
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES.0;
        let bytes = module.as_slice().to_vec();
        structures.push(Structure { name: "PVH modules", address: layout::PVH_MODULES, bytes });
    }
    let bytes = info.as_slice().to_vec();
    structures.push(Structure { name: "PVH start info", address: layout::PVH_START_INFO, bytes });
    structures
}

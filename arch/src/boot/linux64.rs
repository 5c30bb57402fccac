//! The zero page (`struct boot_params`) of Linux's 64-bit boot protocol (Documentation/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::{ByteValued, GuestAddress};

use super::{Error, Told};
use crate::{GuestMemory, layout};

/// boot.rst, `type_of_loader`: a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");

/// Writes the zero page and returns its address. `header` is a bzImage's; an ELF kernel has none, and is content with
/// one that carries only the fields below.
pub(super) fn write(memory: &GuestMemory, told: &Told, header: Option<setup_header>) -> Result<GuestAddress, Error> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            loadflags: LOADED_HIGH,
            ..Default::default()
        }),
        // Before Linux 5.0 nobody looks here; those kernels find the RSDP by its signature.
        acpi_rsdp_addr: told.rsdp.map_or(0, |rsdp| rsdp.0),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // Everything lies below 4 GiB, so the upper halves (`ext_*`) stay 0.
    params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some(initrd) = told.initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    // Six ranges at most, with room for 128.
    let map = &told.map[..told.map.len().min(E820_MAX_ENTRIES_ZEROPAGE)];
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    params.e820_table = table;

    crate::write(memory, "zero page", layout::ZERO_PAGE, params.as_slice())?;
    Ok(layout::ZERO_PAGE)
}

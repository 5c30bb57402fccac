//! The zero page (`struct boot_params`) of Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst).

use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::parameters::Parameters;
use crate::{Structure, layout};

/// boot.rst, `type_of_loader`: a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// What a setup header has at 0x202.
pub(super) const MAGIC: [u8; 4] = *b"HdrS";

/// The zero page. `header` is a bzImage's; an ELF kernel has none and needs only the fields that are set here.
pub(super) fn zero_page(parameters: &Parameters<'_>, header: Option<setup_header>) -> Structure {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: u32::from_le_bytes(MAGIC),
            loadflags: LOADED_HIGH,
            ..Default::default()
        }),
        // Linux before 5.0 does not look here; it finds the RSDP by its signature.
        acpi_rsdp_addr: parameters.rsdp.map_or(0, |rsdp| rsdp.0),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // Everything lies below 4 GiB, so the upper halves (`ext_*`) stay 0.
    params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some(initrd) = parameters.initrd {
        params.hdr.ramdisk_image = initrd.address.0 as u32;
        params.hdr.ramdisk_size = initrd.length as u32;
    }
    // A machine has six ranges at most, and the table room for 128.
    params.e820_entries = parameters.map.len() as u8;
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(parameters.map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    let bytes = params.as_slice().to_vec();
    Structure { name: "zero page", address: layout::ZERO_PAGE, bytes }
}

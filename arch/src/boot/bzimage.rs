//! bzImages (`vmlinuz`), checked against Documentation/arch/x86/boot.rst.
//!
//! A bzImage is a real-mode setup part, which is not used here, and a compressed kernel with its own decompressor. This part is loaded
//! whole and entered at its 64-bit entry.
//!
//! A capability beside ELF kernels: `formats` plugs it in.

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::linux64::MAGIC;
use super::{Error, FileRange, Kernel, Protocol};
use crate::layout;

/// The offset of the setup header, in the file as in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
/// The offset of its `jump` field, whose second byte gives the header's length from 0x202 on.
const JUMP_OFFSET: usize = 0x200;
const MAGIC_OFFSET: usize = 0x202;
/// The version that brought `xloadflags`, and with it the 64-bit entry.
const VERSION_2_12: u16 = 0x020c;
const SECTOR: u64 = 512;
/// The 64-bit entry, from the start of the loaded image on (boot.rst, "64-bit boot protocol").
const ENTRY_64: u64 = 0x200;

/// Checks the header of a `size`-byte file that begins with `start`. Gives `None` if it is not a Linux/x86 image at all.
pub(super) fn parse(start: &[u8], size: u64) -> Result<Option<Kernel>, Error> {
    if !start.get(MAGIC_OFFSET..).is_some_and(|at| at.starts_with(&MAGIC)) {
        return Ok(None);
    }
    let end = HEADER_OFFSET + size_of::<setup_header>();
    let truncated = |what, end| Error::Truncated { what, end, size };
    let header = start.get(HEADER_OFFSET..end).and_then(setup_header::from_slice);
    let mut header = *header.ok_or(truncated("setup header", end as u64))?;
    check_abilities(&header)?;
    // A kernel older than this struct ends its header earlier; what follows is code.
    let length = JUMP_OFFSET + 2 + usize::from(start[JUMP_OFFSET + 1]) - HEADER_OFFSET;
    if let Some(beyond) = header.as_mut_slice().get_mut(length..) {
        beyond.fill(0);
    }
    // boot.rst, `setup_sects`: for compatibility 0 means 4. The boot sector comes on top.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup = (sectors + 1) * SECTOR;
    // `syssize` counts paragraphs of 16 bytes. Only signatures follow after it.
    let end = setup + u64::from(header.syssize) * 16;
    if end.saturating_sub(15) > size || setup >= size {
        return Err(truncated("compressed kernel", end.max(setup + 1)));
    }

    let (loads_at, runs_at) = addresses(&header)?;
    let length = size - setup;
    let occupied_end = runs_at
        .checked_add(header.init_size.into())
        .zip(loads_at.checked_add(length))
        .map(|(work_space, image)| work_space.max(image))
        .ok_or_else(|| unusable_address(&header))?;
    // Does not truncate: `plan` refuses kernels that end above the hole.
    header.code32_start = loads_at as u32;
    Ok(Some(Kernel {
        protocol: Protocol::Linux64,
        entry: loads_at + ENTRY_64,
        ranges: vec![FileRange { offset: setup, address: GuestAddress(loads_at), length }],
        occupied: loads_at.min(runs_at)..occupied_end,
        initrd_limit: (u64::from(header.initrd_addr_max) + 1).min(layout::HOLE_START.0),
        cmdline_limit: (header.cmdline_size as usize).min(layout::CMDLINE_SIZE - 1),
        header: Some(header),
    }))
}

/// Checks that the kernel has a 64-bit entry and loads above 1 MiB.
fn check_abilities(header: &setup_header) -> Result<(), Error> {
    let version = header.version;
    if version < VERSION_2_12 {
        let why = format!("boot protocol {}.{:02}, before 2.12", version >> 8, version & 0xff);
        return Err(Error::No64BitEntry { why });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry { why: "XLF_KERNEL_64 is not set".to_owned() });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(damaged("a zImage, which loads below 1 MiB".to_owned()));
    }
    Ok(())
}

/// Where the image is loaded, and where the kernel runs once it is decompressed (boot.rst, `pref_address` and `init_size`).
///
/// A relocatable kernel decompresses to the first suitable address at or above its load address and `pref_address`, so it is loaded where
/// it need not move. Another one moves itself from 1 MiB.
fn addresses(header: &setup_header) -> Result<(u64, u64), Error> {
    let preferred = { header.pref_address }.max(layout::HIGH_MEMORY.0);
    if header.relocatable_kernel == 0 {
        return Ok((layout::HIGH_MEMORY.0, preferred));
    }
    let alignment = header.kernel_alignment;
    if !alignment.is_power_of_two() {
        return Err(damaged(format!("alignment {alignment:#x}")));
    }
    let aligned = preferred.checked_next_multiple_of(alignment.into());
    aligned.map(|at| (at, at)).ok_or_else(|| unusable_address(header))
}

fn unusable_address(header: &setup_header) -> Error {
    damaged(format!("preferred address {:#x}", { header.pref_address }))
}

fn damaged(what: String) -> Error {
    Error::Damaged { format: "bzImage", what }
}

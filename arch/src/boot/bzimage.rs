//! bzImages (`vmlinuz`): checked against Documentation/x86/boot.rst, then copied by linux-loader.
//!
//! linux-loader leaves the choice of address, and every check below, to its caller.

use std::fs::File;
use std::ops::Range;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::{Error, read_array};
use crate::{GuestMemory, layout};

/// Where the setup header lies in the file, and in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
/// Where its `jump` field is: its second byte tells the header's length from 0x202.
const JUMP_OFFSET: usize = 0x200;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The version that brought `xloadflags`, and with it the 64-bit entry.
const VERSION_2_12: u16 = 0x020c;
const SECTOR: u64 = 512;
/// From the loaded image's start to its 64-bit entry.
const ENTRY_64: u64 = 0x200;

/// A checked bzImage.
#[derive(Debug)]
pub(super) struct BzImage {
    header: setup_header,
    /// Bytes of real-mode setup at the start of the file.
    setup: u64,
    /// Bytes that are loaded: all behind the setup.
    loaded: u64,
}

impl BzImage {
    /// Checks the header of a `size`-byte file; `None` if it is not a Linux/x86 image at all.
    pub(super) fn parse(file: &File, size: u64) -> Result<Option<Self>, Error> {
        let mut header = setup_header::default();
        let header_size = size_of::<setup_header>();
        let Some(start) = read_array::<{ HEADER_OFFSET + size_of::<setup_header>() }>(file, 0)? else {
            // The magic number, if the file reaches that far.
            return match read_array::<4>(file, 0x202)? {
                Some(magic) if u32::from_le_bytes(magic) == MAGIC => {
                    let end = (HEADER_OFFSET + header_size) as u64;
                    Err(Error::Truncated { what: "setup header", end, size })
                }
                _ => Ok(None),
            };
        };
        header.as_mut_slice().copy_from_slice(&start[HEADER_OFFSET..]);
        if header.header != MAGIC {
            return Ok(None);
        }
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
        // A kernel older than this struct ends its header earlier; what follows is code.
        let length = JUMP_OFFSET + 2 + usize::from(start[JUMP_OFFSET + 1]) - HEADER_OFFSET;
        if let Some(beyond) = header.as_mut_slice().get_mut(length..) {
            beyond.fill(0);
        }
        // 0 sectors mean 4, by the oldest of traditions; the boot sector comes on top.
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let setup = (sectors + 1) * SECTOR;
        // `syssize` counts paragraphs of 16 bytes. Behind it only signatures follow.
        let end = setup + u64::from(header.syssize) * 16;
        if end.saturating_sub(15) > size || setup >= size {
            return Err(Error::Truncated { what: "compressed kernel", end: end.max(setup + 1), size });
        }
        let alignment = header.kernel_alignment;
        if header.relocatable_kernel != 0 && !alignment.is_power_of_two() {
            return Err(damaged(format!("alignment {alignment:#x}")));
        }
        let image = Self { header, setup, loaded: size - setup };
        if image.load_address() < layout::HIGH_MEMORY.0 {
            return Err(Error::TooLow { address: image.load_address() });
        }
        Ok(Some(image))
    }

    /// Copies the image into `memory`, whose RAM below the hole ends at `ram_end`; returns where it and its work
    /// space are.
    pub(super) fn load(&self, memory: &GuestMemory, file: &File, ram_end: u64) -> Result<Range<u64>, Error> {
        let needed = self.end()?;
        super::fits(needed, ram_end)?;
        let address = Some(GuestAddress(self.load_address()));
        linux_loader::loader::bzimage::BzImage::load(memory, address, &mut &*file, None)
            .map_err(|source| Error::CopyKernel { source: source.into() })?;
        Ok(self.load_address().min(self.runtime_start())..needed)
    }

    /// The header for the zero page.
    pub(super) fn header(&self) -> setup_header {
        // `load` never gives an address that 32 bits do not hold.
        setup_header { code32_start: self.load_address() as u32, ..self.header }
    }

    /// The 64-bit entry's address.
    pub(super) fn entry(&self) -> u64 {
        self.load_address().saturating_add(ENTRY_64)
    }

    /// Where in the file the compressed kernel is by the header, and its length: unchecked.
    pub(super) fn payload(&self) -> (u64, u64) {
        (self.setup + u64::from(self.header.payload_offset), self.header.payload_length.into())
    }

    /// Bytes of command line, without the NUL.
    pub(super) fn cmdline_limit(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// The end (exclusive) of where an initrd may lie.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// Where the image goes. A relocatable kernel decompresses to the first suitable address at or above both its load
    /// address and `pref_address`, so this is where it need not move; any other moves itself from 1 MiB to there.
    fn load_address(&self) -> u64 {
        if self.header.relocatable_kernel != 0 { self.runtime_start() } else { layout::HIGH_MEMORY.0 }
    }

    /// Where the kernel runs once decompressed (boot.rst, `init_size`).
    fn runtime_start(&self) -> u64 {
        let preferred = { self.header.pref_address }.max(layout::HIGH_MEMORY.0);
        let alignment = u64::from(self.header.kernel_alignment).max(1);
        if self.header.relocatable_kernel != 0 {
            preferred.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
        } else {
            preferred
        }
    }

    /// Where the last byte lies that the kernel needs before it can look at the memory map, plus one.
    fn end(&self) -> Result<u64, Error> {
        let working = self.runtime_start().checked_add(self.header.init_size.into());
        let loaded = self.load_address().checked_add(self.loaded);
        working
            .zip(loaded)
            .map(|(working, loaded)| working.max(loaded))
            .ok_or_else(|| damaged(format!("preferred address {:#x}", { self.header.pref_address })))
    }
}

fn damaged(what: String) -> Error {
    Error::Damaged { format: "bzImage", what }
}

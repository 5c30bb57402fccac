//! From a kernel file to a guest that can start: what kind of image it is, where it goes, what it is told.
//!
//! [`Kernel::identify`] looks at the file alone and refuses what cannot boot, with the reason; [`load`] puts kernel,
//! initrd, command line and start structures into guest memory and says where the first vCPU begins. Everything in a
//! kernel file is checked first, since it is input like any other: wrong, truncated, or made to hurt.

mod bzimage;
mod elf;
mod error;
mod linux64;
mod pages;
mod pvh;
#[cfg(test)]
mod tests;
mod unknown;
mod unpack;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::cpu::{gdt, paging};
use crate::{GuestMemory, cmdline, layout, memory};

pub use error::Error;
pub use unpack::UnpackError;

/// Pages of the processor. An initrd starts on one, so that the guest can give all of them back.
const PAGE_SIZE: u64 = 0x1000;

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH: 32-bit protected mode, `ebx` points to `hvm_start_info`. The quickest way into an ELF `vmlinux`.
    Pvh,
    /// Linux's 64-bit boot protocol: long mode, `rsi` points to the zero page.
    Linux64,
}

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The state that the kernel expects: [`crate::cpu::regs::boot`] makes it.
    pub protocol: Protocol,
    /// The first instruction.
    pub ip: GuestAddress,
    /// The start structure of the protocol.
    pub start: GuestAddress,
}

/// A kernel image that this machine can boot.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    image: Image,
    /// Pages of the file may become the guest's.
    map: bool,
}

#[derive(Debug)]
enum Image {
    Elf(elf::Elf),
    BzImage(Box<bzimage::BzImage>),
}

impl Kernel {
    /// Finds out what `file` is, from its headers alone, and takes it over. `file` is a regular file, open for reading.
    ///
    /// # Errors
    /// It is not a kernel that can boot here; the error says what it is and what would do.
    pub fn identify(file: File) -> Result<Self, Error> {
        let size = (&file).seek(SeekFrom::End(0)).map_err(Error::Read)?;
        if size == 0 {
            return Err(Error::Empty);
        }
        let image = match elf::Elf::parse(&file, size)? {
            Some(elf) => Image::Elf(elf),
            None => match bzimage::BzImage::parse(&file, size)? {
                Some(bzimage) => Image::BzImage(Box::new(bzimage)),
                None => return Err(Error::NotAKernel { looks_like: unknown::describe(&file)? }),
            },
        };
        Ok(Self { file, image, map: true })
    }

    /// This kernel, to be copied into guest memory in any case. Mapping its pages takes no time and shares them between
    /// machines; but the guest then exits once for each page that it uses, where a copy lies in huge pages.
    #[must_use]
    pub fn copied(self) -> Self {
        Self { map: false, ..self }
    }

    /// How this kernel will be entered.
    pub fn protocol(&self) -> Protocol {
        match &self.image {
            Image::Elf(elf) if elf.pvh_entry.is_some() => Protocol::Pvh,
            Image::Elf(_) | Image::BzImage(_) => Protocol::Linux64,
        }
    }

    /// The kernel inside a bzImage, if it can be entered through PVH: unpacked here, into at most `limit` bytes. The guest's own
    /// unpacker takes longer, but would also move the kernel to a random address (KASLR) unless told `nokaslr`.
    ///
    /// # Errors
    /// Why it has to be left to the guest.
    pub fn unpack(&self, limit: u64) -> Result<Self, UnpackError> {
        let Image::BzImage(bzimage) = &self.image else { return Err(UnpackError::NotPacked) };
        let (offset, length) = bzimage.payload();
        let kernel = Self::identify(unpack::unpack(&self.file, offset, length, limit)?);
        let kernel = kernel.ok().filter(|kernel| kernel.protocol() == Protocol::Pvh).ok_or(UnpackError::NoPvhEntry)?;
        Ok(Self { map: self.map, ..kernel })
    }

    /// Makes `memory`, into which this kernel was loaded, independent of the kernel's file, which somebody wants to write:
    /// SIGIO says so. Neither the guest nor a device uses that memory meanwhile.
    ///
    /// # Errors
    /// The host has no memory left, and the guest may have lost some.
    pub fn let_go(&self, memory: &GuestMemory) -> Result<(), Error> {
        if let Image::Elf(elf) = &self.image {
            elf.own(memory).map_err(Error::MapKernel)?;
        }
        pages::release(&self.file);
        Ok(())
    }

    /// Bytes of command line that this kernel keeps, without the NUL.
    pub fn cmdline_limit(&self) -> usize {
        let limit = match &self.image {
            Image::Elf(_) => elf::CMDLINE_LIMIT,
            Image::BzImage(bzimage) => bzimage.cmdline_limit(),
        };
        limit.min(layout::CMDLINE_SIZE - 1)
    }
}

/// Puts everything that the guest starts from into `memory`, and says where it starts.
///
/// `rsdp` is the address that [`crate::tables::acpi::write`] gave, `None` without ACPI. `initrd` is a regular file.
///
/// # Errors
/// The command line does not suit the kernel, something does not fit, or a file cannot be read.
pub fn load(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<&File>,
    cmdline: &str,
    rsdp: Option<GuestAddress>,
) -> Result<Entry, Error> {
    cmdline::check(cmdline, kernel.cmdline_limit())?;
    let ranges = memory::ranges_of(memory);
    let ram_end = memory::low_end(&ranges);

    let (occupied, initrd_limit, ip) = match &kernel.image {
        Image::Elf(elf) => {
            let occupied = elf.load(memory, &kernel.file, kernel.map, ram_end)?;
            (occupied, layout::HOLE_START.0, elf.pvh_entry.unwrap_or(elf.entry))
        }
        Image::BzImage(bzimage) => {
            let occupied = bzimage.load(memory, &kernel.file, ram_end)?;
            (occupied, bzimage.initrd_limit().min(layout::HOLE_START.0), bzimage.entry())
        }
    };
    let initrd = match initrd {
        Some(file) => Some(load_initrd(memory, file, &occupied, initrd_limit, ram_end)?),
        None => None,
    };

    crate::write(memory, "command line", layout::CMDLINE, &[cmdline.as_bytes(), b"\0"].concat())?;
    // What a kernel that ran before may have left there would pass for this one's panic.
    crate::write(memory, "warm-reset flag", layout::WARM_RESET_FLAG, &[0; 2])?;
    gdt::write(memory)?;
    let told = Told { map: memory::e820(&ranges), initrd, rsdp };
    let protocol = kernel.protocol();
    let start = match (protocol, &kernel.image) {
        (Protocol::Pvh, _) => pvh::write(memory, &told)?,
        (Protocol::Linux64, image) => {
            paging::write(memory)?;
            let header = match image {
                Image::Elf(_) => None,
                Image::BzImage(bzimage) => Some(bzimage.header()),
            };
            linux64::write(memory, &told, header)?
        }
    };
    Ok(Entry { protocol, ip: GuestAddress(ip), start })
}

/// What either protocol tells the kernel, apart from the command line's fixed place.
struct Told {
    map: Vec<memory::Range>,
    initrd: Option<Placed>,
    rsdp: Option<GuestAddress>,
}

/// Where the initrd is.
#[derive(Clone, Copy)]
struct Placed {
    start: u64,
    size: u64,
}

/// Reads the initrd to the highest place there is outside the kernel's `occupied` memory, below `limit`, which the kernel
/// sets, and in the RAM that ends at `ram_end`. In a small guest that can be below the kernel: Linux wants to be at 16 MiB
/// and may end close to the end of RAM.
fn load_initrd(
    memory: &GuestMemory,
    mut file: &File,
    occupied: &Range<u64>,
    limit: u64,
    ram_end: u64,
) -> Result<Placed, Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::ReadInitrd)?;
    if size == 0 {
        return Err(Error::EmptyInitrd);
    }
    let end = ram_end.min(limit);
    let (above, below) = (occupied.end..end, layout::HIGH_MEMORY.0..occupied.start.min(end));
    let place = |free: &Range<u64>| {
        free.end.checked_sub(size).map(|start| start & !(PAGE_SIZE - 1)).filter(|start| *start >= free.start)
    };
    let Some(start) = place(&above).or_else(|| place(&below)) else {
        let length = |free: Range<u64>| free.end.saturating_sub(free.start);
        let below = length(below);
        // The kernel and its work space come first, then the initrd, on whole pages.
        let needed = occupied.end.saturating_add(size).saturating_add(PAGE_SIZE);
        return Err(if needed <= limit {
            Error::InitrdDoesNotFit { size, room: length(above).max(below), needed }
        } else {
            Error::InitrdNeverFits { size, room: length(occupied.end..limit).max(below) }
        });
    };
    file.rewind().map_err(Error::ReadInitrd)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|source| Error::CopyInitrd { source })?;
    Ok(Placed { start, size })
}

/// Checks that a kernel that needs RAM from 1 MiB up to `needed` has it, where RAM below the hole ends at `ram_end`.
fn fits(needed: u64, ram_end: u64) -> Result<(), Error> {
    if needed <= ram_end {
        Ok(())
    } else if needed <= layout::HOLE_START.0 {
        Err(Error::DoesNotFit { needed, ram_end })
    } else {
        Err(Error::NeverFits { needed })
    }
}

/// Reads `N` bytes at `offset`, or `None` where the file is shorter.
fn read_array<const N: usize>(file: &File, offset: u64) -> Result<Option<[u8; N]>, Error> {
    let mut bytes = [0; N];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(Error::Read(error)),
    }
}

/// Reads up to `limit` bytes at `offset`.
fn read_up_to(mut file: &File, offset: u64, limit: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(offset)).map_err(Error::Read)?;
    file.take(limit).read_to_end(&mut bytes).map_err(Error::Read)?;
    Ok(bytes)
}

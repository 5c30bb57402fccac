//! From a kernel's headers to a plan of what goes where in guest memory, and where the first vCPU starts.
//!
//! [`Kernel::parse`] reads the headers of an ELF kernel or a bzImage and refuses what cannot boot, with the reason. [`plan`] then decides
//! the place of the kernel, the initrd, the command line and all boot structures. Both only compute: `vmm/src/boot_image.rs` opens the
//! files and copies or maps what the plan says.
//!
//! A kernel file is untrusted input. Every number from its headers is compared with the file's size and with guest RAM before it is used.
//! A plan never has two ranges of the file for the same memory, so the size of RAM bounds the time to apply it.

mod bzimage;
mod elf;
mod error;
mod formats;
mod linux64;
mod parameters;
mod pvh;
mod signatures;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestAddress;

use crate::cpu::{gdt, paging};
use crate::machine_layout::MachineLayout;
use crate::{Structure, cmdline, layout, memory, tables};

pub use error::Error;
pub use parameters::FileRange;
use parameters::Parameters;
pub use signatures::is_initrd;

/// A file that is read at offsets: an open file in `vmm`, bytes in this crate's tests.
pub trait ReadAt {
    /// The file's size in bytes.
    ///
    /// # Errors
    /// The host does not give it.
    fn size(&self) -> io::Result<u64>;

    /// Reads `length` bytes at `offset`, or as many as there are before the file's end.
    ///
    /// # Errors
    /// The host cannot read them.
    fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>>;
}

/// The boot protocol through which the first vCPU enters the kernel. It decides the processor's mode, which register points
/// to the start structure, and what that structure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH: 32-bit protected mode, `ebx` points to `hvm_start_info`. The fastest way into an ELF `vmlinux`.
    Pvh,
    /// Linux's 64-bit boot protocol: long mode, `rsi` points to the zero page.
    Linux64,
}

/// How the first vCPU starts: through `protocol`, with the instruction at `ip`, and with the protocol's start structure at
/// `start`. [`crate::cpu::regs::boot`] makes registers of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text above names the fields")]
pub struct Entry {
    pub protocol: Protocol,
    pub ip: GuestAddress,
    pub start: GuestAddress,
}

/// A kernel image whose headers are sound, in the terms that both formats have in common.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// PVH where an ELF file has the note for it.
    protocol: Protocol,
    entry: u64,
    /// What has to be loaded. The ranges do not overlap in guest memory.
    ranges: Vec<FileRange>,
    /// The memory that the kernel fills before it reads the memory map: its image, its zeroed data, and for a bzImage the
    /// work space of its decompressor.
    occupied: Range<u64>,
    /// The end (exclusive) of the memory in which the kernel finds an initrd.
    initrd_limit: u64,
    /// How many bytes of command line the kernel keeps, without the NUL.
    cmdline_limit: usize,
    /// The zero page repeats a bzImage's header. ELF kernels have none.
    header: Option<setup_header>,
}

/// What guest memory has to hold before the first instruction. Every byte of RAM that the plan does not name is zero,
/// which new memory is without being written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the first vCPU starts, once everything else is in its place.
    pub entry: Entry,
    /// Ranges of the kernel's file, disjoint, inside RAM below the hole and above the first MiB.
    pub kernel: Vec<FileRange>,
    /// The place of the whole initrd, on a page boundary.
    pub initrd: Option<FileRange>,
    /// The boot protocol's structures, the command line, and the ACPI tables or the MPTable; all below 1 MiB.
    pub structures: Vec<Structure>,
}

/// Decides what goes where for `kernel` on the machine of `layout`, with an initrd of `initrd_size` bytes.
///
/// # Errors
/// The command line does not suit the kernel, or the kernel or the initrd does not fit into RAM.
pub fn plan(
    layout: &MachineLayout,
    kernel: &Kernel,
    initrd_size: Option<u64>,
    cmdline: &str,
) -> Result<Plan, Error> {
    cmdline::check(cmdline, kernel.cmdline_limit)?;
    let ram_end = memory::low_end(&layout.ram);
    let needed = kernel.occupied.end;
    if needed > layout::HOLE_START.0 {
        return Err(Error::NeverFits { needed });
    }
    if needed > ram_end {
        return Err(Error::DoesNotFit { needed, ram_end });
    }
    let initrd = initrd_size.map(|size| place_initrd(kernel, size, ram_end)).transpose()?;

    let parameters = Parameters { map: &layout.memory_map, initrd, rsdp: layout.rsdp() };
    let mut structures = vec![
        tables::describe(layout),
        gdt::structure(),
        Structure {
            name: "command line",
            address: layout::CMDLINE,
            bytes: [cmdline.as_bytes(), b"\0"].concat(),
        },
    ];
    for (name, address, bytes) in [
        ("reset vector", layout::RESET_VECTOR, &layout::RESET_CODE[..]),
        ("reset flag", layout::WARM_RESET_FLAG, &layout::WARM_RESET_UNTOUCHED.to_le_bytes()),
    ] {
        structures.push(Structure { name, address, bytes: bytes.to_vec() });
    }
    let start = match kernel.protocol {
        Protocol::Pvh => {
            structures.extend(pvh::structures(&parameters));
            layout::PVH_START_INFO
        }
        Protocol::Linux64 => {
            structures.push(paging::structure());
            structures.push(linux64::zero_page(&parameters, kernel.header));
            layout::ZERO_PAGE
        }
    };
    let entry = Entry { protocol: kernel.protocol, ip: GuestAddress(kernel.entry), start };
    Ok(Plan { entry, kernel: kernel.ranges.clone(), initrd, structures })
}

/// Finds the highest place for an initrd of `size` bytes outside the kernel's memory and below the kernel's limit, in the RAM that ends
/// at `ram_end`. In a small guest that can be below the kernel: Linux prefers to be at 16 MiB.
fn place_initrd(kernel: &Kernel, size: u64, ram_end: u64) -> Result<FileRange, Error> {
    if size == 0 {
        return Err(Error::EmptyInitrd);
    }
    let (limit, occupied) = (kernel.initrd_limit, &kernel.occupied);
    let end = ram_end.min(limit);
    let (above, below) = (occupied.end..end, layout::HIGH_MEMORY.0..occupied.start.min(end));
    // On a page boundary, so that the guest can free all of the initrd's memory.
    let place = |free: &Range<u64>| {
        let start = free.end.checked_sub(size)? & !(layout::PAGE_SIZE - 1);
        (start >= free.start).then_some(FileRange {
            offset: 0,
            address: GuestAddress(start),
            length: size,
        })
    };
    place(&above).or_else(|| place(&below)).ok_or_else(|| {
        let length = |free: Range<u64>| free.end.saturating_sub(free.start);
        let below = length(below);
        // With this much RAM the initrd lies above the kernel and its work space, on whole pages.
        let needed = occupied.end.saturating_add(size).saturating_add(layout::PAGE_SIZE);
        if needed <= limit {
            Error::InitrdDoesNotFit { size, room: length(above).max(below), needed }
        } else {
            Error::InitrdNeverFits { size, room: length(occupied.end..limit).max(below) }
        }
    })
}

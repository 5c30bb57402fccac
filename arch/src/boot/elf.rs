//! ELF kernels (`vmlinux`), checked header by header.
//!
//! linux-loader's ELF loader is not used. It does not check class, machine and type, and does not limit how much memory a segment zeroes.
//! A later note segment can hide the PVH entry from it. It also reads into memory, while this crate only computes.

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_386, EM_AARCH64, EM_ARM, EM_LOONGARCH,
    EM_MIPS, EM_PPC, EM_PPC64, EM_RISCV, EM_S390, EM_X86_64, ET_CORE, ET_DYN, ET_EXEC, ET_REL,
    Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};
use vm_memory::{ByteValued, GuestAddress};

use super::{Error, FileRange, Kernel, Protocol, ReadAt};
use crate::layout;

/// Linux's COMMAND_LINE_SIZE for x86, without the NUL. A kernel silently cuts off a longer command line.
const CMDLINE_LIMIT: usize = 2047;

/// The sizes of the ELF64 header and of a program header (gABI, chapters 4 and 5).
const HEADER_SIZE: u64 = size_of::<Elf64_Ehdr>() as u64;
const SEGMENT_SIZE: u16 = size_of::<Elf64_Phdr>() as u16;
/// Linux has five program headers. The limit bounds what a hostile file can make this module read.
const MAX_SEGMENTS: u16 = 64;

/// The note that holds the PVH entry (Xen's public/elfnote.h), and how many bytes of a note segment are searched for it.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const MAX_NOTES: u64 = 0x1_0000;

/// Checks the headers of a `size`-byte file that begins with `start`. Gives `None` if the file is not ELF at all.
pub(super) fn parse(file: &dyn ReadAt, start: &[u8], size: u64) -> Result<Option<Kernel>, Error> {
    if !start.starts_with(ELFMAG) {
        return Ok(None);
    }
    // Up to the machine both classes have the same fields.
    inside("ELF header", 0, 20, start.len() as u64)?;
    let header: Elf64_Ehdr = first(start);
    let big_endian = header.e_ident[EI_DATA] != ELFDATA2LSB;
    match if big_endian { header.e_machine.swap_bytes() } else { header.e_machine } {
        EM_386 => return Err(Error::Elf32),
        EM_X86_64 if header.e_ident[EI_CLASS] != ELFCLASS64 => return Err(Error::Elf32),
        EM_X86_64 if big_endian => return Err(damaged("big-endian x86-64")),
        EM_X86_64 => {}
        other => return Err(Error::ElfMachine { machine: machine_name(other) }),
    }
    inside("ELF header", 0, HEADER_SIZE, start.len() as u64)?;
    let kind = match header.e_type {
        ET_EXEC => return segments(file, size, &header).map(Some),
        ET_REL => "an object file or a kernel module",
        ET_DYN => "a shared library or a position-independent program",
        ET_CORE => "a core dump",
        other => return Err(damaged(format!("type {other}"))),
    };
    Err(Error::ElfKind { kind })
}

/// Checks the program headers of an executable and finds the PVH entry among its notes. Segments may come in any order, but no two may
/// share memory: to copy that file could take many times the size of RAM.
fn segments(file: &dyn ReadAt, size: u64, header: &Elf64_Ehdr) -> Result<Kernel, Error> {
    let table = program_headers(file, size, header)?;
    let (mut segments, mut pvh_entry) = (Vec::new(), None);
    for (number, bytes) in table.chunks_exact(SEGMENT_SIZE.into()).enumerate() {
        let segment: Elf64_Phdr = first(bytes);
        match segment.p_type {
            PT_LOAD if segment.p_filesz > 0 || segment.p_memsz > 0 => {
                check(number, &segment, size)?;
                segments.push(segment);
            }
            PT_INTERP => return Err(Error::ElfKind { kind: "an ordinary program" }),
            PT_NOTE => {
                inside("note segment", segment.p_offset, segment.p_filesz, size)?;
                let length = segment.p_filesz.min(MAX_NOTES);
                let notes = read_inside(file, "note segment", segment.p_offset, length, size)?;
                // A note's parts are aligned to 4 bytes, or to 8 in a segment that says so.
                let pvh = find_pvh_entry(&notes, 4).or_else(|| find_pvh_entry(&notes, 8));
                pvh_entry = pvh_entry.or(pvh);
            }
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.p_paddr);
    let (Some(lowest), Some(highest)) = (segments.first(), segments.last()) else {
        return Err(damaged("nothing to load"));
    };
    if let Some(pair) = segments.windows(2).find(|pair| end(&pair[0]) > pair[1].p_paddr) {
        return Err(damaged(format!("two segments overlap at {:#x}", pair[1].p_paddr)));
    }
    // Where there is a PVH entry, the other is not used: the BSDs give a virtual address there.
    let (protocol, name, entry) = match pvh_entry {
        Some(entry) => (Protocol::Pvh, "PVH entry point", entry),
        None => (Protocol::Linux64, "entry point", header.e_entry),
    };
    if !segments.iter().any(|segment| (segment.p_paddr..end(segment)).contains(&entry)) {
        return Err(damaged(format!("its {name} {entry:#x} is not in a loaded segment")));
    }
    let range = |segment: &Elf64_Phdr| FileRange {
        offset: segment.p_offset,
        address: GuestAddress(segment.p_paddr),
        length: segment.p_filesz,
    };
    Ok(Kernel {
        protocol,
        entry,
        occupied: lowest.p_paddr..end(highest),
        ranges: segments.iter().map(range).collect(),
        initrd_limit: layout::HOLE_START.0,
        cmdline_limit: CMDLINE_LIMIT,
        header: None,
    })
}

/// Reads the program header table, whose size and number of entries are bounded.
fn program_headers(file: &dyn ReadAt, size: u64, header: &Elf64_Ehdr) -> Result<Vec<u8>, Error> {
    let Elf64_Ehdr { e_phoff: table, e_phentsize: entry_size, e_phnum: count, .. } = *header;
    if entry_size != SEGMENT_SIZE || table < HEADER_SIZE {
        return Err(damaged(format!("program headers of {entry_size} bytes at {table:#x}")));
    }
    if count > MAX_SEGMENTS {
        return Err(damaged(format!("{count} program headers, more than {MAX_SEGMENTS}")));
    }
    read_inside(file, "program header table", table, (count * SEGMENT_SIZE).into(), size)
}

/// Checks the program header `number`, of a segment to be loaded from a `size`-byte file.
fn check(number: usize, segment: &Elf64_Phdr, size: u64) -> Result<(), Error> {
    inside("loaded segment", segment.p_offset, segment.p_filesz, size)?;
    if segment.p_filesz > segment.p_memsz {
        return Err(damaged(format!("segment {number} has more bytes in the file than in memory")));
    }
    if segment.p_paddr.checked_add(segment.p_memsz).is_none() {
        return Err(damaged(format!("segment {number} wraps around the address space")));
    }
    if segment.p_paddr < layout::HIGH_MEMORY.0 {
        return Err(Error::TooLow { address: segment.p_paddr });
    }
    Ok(())
}

/// The end (exclusive) of a loaded segment in memory. Does not overflow: `check` was called.
fn end(segment: &Elf64_Phdr) -> u64 {
    segment.p_paddr + segment.p_memsz
}

/// Looks for Xen's PHYS32_ENTRY in `notes`, whose parts are padded to `align` bytes.
fn find_pvh_entry(mut notes: &[u8], align: usize) -> Option<u64> {
    // A note is three words, the name, the descriptor (gABI, chapter 5, "Note Section").
    while let Some((header, rest)) = notes.split_at_checked(size_of::<Elf64_Nhdr>()) {
        let header: Elf64_Nhdr = first(header);
        let (name_size, desc_size) = (header.n_namesz as usize, header.n_descsz as usize);
        let name = rest.get(..name_size)?;
        let desc = rest.get(name_size.next_multiple_of(align)..)?;
        if header.n_type == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc_size >= 4 {
            return desc.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).into());
        }
        notes = desc.get(desc_size.next_multiple_of(align)..)?;
    }
    None
}

/// The header that `bytes` begin with. What is missing at its end is 0.
fn first<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut header = T::default();
    header.as_mut_slice().iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    header
}

/// Checks that `length` bytes at `offset` are inside a file of `size` bytes.
fn inside(what: &'static str, offset: u64, length: u64, size: u64) -> Result<(), Error> {
    let end = offset.saturating_add(length);
    if end > size { Err(Error::Truncated { what, end, size }) } else { Ok(()) }
}

/// Reads `length` bytes at `offset`, all of which have to be there: the file may have become shorter than `size`.
fn read_inside(
    file: &dyn ReadAt,
    what: &'static str,
    offset: u64,
    length: u64,
    size: u64,
) -> Result<Vec<u8>, Error> {
    inside(what, offset, length, size)?;
    let bytes = file.read_at(offset, length as usize).map_err(Error::Read)?;
    inside(what, offset, length, offset + bytes.len() as u64)?;
    Ok(bytes)
}

fn damaged(what: impl Into<String>) -> Error {
    Error::Damaged { format: "ELF", what: what.into() }
}

fn machine_name(machine: u16) -> String {
    let name = match machine {
        EM_MIPS => "MIPS",
        EM_PPC => "32-bit POWER",
        EM_PPC64 => "POWER",
        EM_S390 => "S/390",
        EM_ARM => "32-bit ARM",
        EM_AARCH64 => "aarch64",
        EM_RISCV => "RISC-V",
        EM_LOONGARCH => "LoongArch",
        other => return format!("processor number {other}"),
    };
    name.to_owned()
}

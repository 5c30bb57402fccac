//! ELF kernels (`vmlinux`), checked header by header.
//!
//! linux-loader's ELF loader is not used, for four reasons. It does not check class, machine and type. A later note segment can hide the PVH
//! entry from it. It does not limit how much memory a segment zeroes. And it reads into memory, while this crate only computes.

use vm_memory::GuestAddress;

use super::{Error, FileRange, Kernel, Protocol, ReadAt};
use crate::layout;

/// Linux's COMMAND_LINE_SIZE for x86, without the NUL. A kernel silently cuts off a longer command line.
const CMDLINE_LIMIT: usize = 2047;

// Offsets and values of the ELF64 header (gABI, chapter 4).
const HEADER_SIZE: u64 = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;

// Program headers (gABI, chapter 5). Linux has five; the limit bounds what a hostile file can make this module read.
const SEGMENT_SIZE: u16 = 56;
const MAX_SEGMENTS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// The note that holds the PVH entry (Xen's public/elfnote.h), and how many bytes of a note segment are searched for it.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const MAX_NOTES: u64 = 0x1_0000;

/// A segment that is loaded: `file_size` bytes at `offset` of the file, followed by zeros up to `memory_size`.
struct Segment {
    offset: u64,
    start: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    // Does not overflow: `load_segment` has checked it.
    fn end(&self) -> u64 {
        self.start + self.memory_size
    }
}

/// Checks the headers of a `size`-byte file that begins with `start`. Gives `None` if the file is not ELF at all.
pub(super) fn parse(file: &dyn ReadAt, start: &[u8], size: u64) -> Result<Option<Kernel>, Error> {
    if !start.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    // Up to the machine both classes have the same fields.
    inside("ELF header", 0, 20, start.len() as u64)?;
    let big_endian = start[5] != LITTLE_ENDIAN;
    let machine = [start[18], start[19]];
    let machine =
        if big_endian { u16::from_be_bytes(machine) } else { u16::from_le_bytes(machine) };
    match machine {
        MACHINE_386 => return Err(Error::Elf32),
        MACHINE_X86_64 if start[4] != CLASS_64 => return Err(Error::Elf32),
        MACHINE_X86_64 if big_endian => return Err(damaged("big-endian x86-64")),
        MACHINE_X86_64 => {}
        other => return Err(Error::ElfMachine { machine: machine_name(other) }),
    }
    inside("ELF header", 0, HEADER_SIZE, start.len() as u64)?;
    let header = Fields(start);
    let kind = match header.u16(16) {
        TYPE_EXECUTABLE => return segments(file, size, &header).map(Some),
        1 => "an object file or a kernel module",
        3 => "a shared library or a position-independent program",
        4 => "a core dump",
        other => return Err(damaged(format!("type {other}"))),
    };
    Err(Error::ElfKind { kind })
}

/// Checks the program headers of an executable and finds the PVH entry among its notes. Segments may come in any order, but
/// two of them must not share memory: copying that file could take any number of times the size of RAM.
fn segments(file: &dyn ReadAt, size: u64, header: &Fields<'_>) -> Result<Kernel, Error> {
    let table = program_headers(file, size, header)?;
    let (mut segments, mut pvh_entry) = (Vec::new(), None);
    for (number, fields) in table.chunks_exact(SEGMENT_SIZE.into()).map(Fields).enumerate() {
        match fields.u32(0) {
            PT_LOAD if fields.u64(32) > 0 || fields.u64(40) > 0 => {
                segments.push(load_segment(number, &fields, size)?);
            }
            PT_INTERP => return Err(Error::ElfKind { kind: "an ordinary program" }),
            PT_NOTE => {
                let (offset, length) = (fields.u64(8), fields.u64(32));
                inside("note segment", offset, length, size)?;
                let length = length.min(MAX_NOTES);
                let notes = read_inside(file, "note segment", offset, length, size)?;
                // A note's parts are aligned to 4 bytes, or to 8 in a segment that says so.
                let pvh = find_pvh_entry(&notes, 4).or_else(|| find_pvh_entry(&notes, 8));
                pvh_entry = pvh_entry.or(pvh);
            }
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.start);
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
        return Err(damaged("nothing to load"));
    };
    if let Some(pair) = segments.windows(2).find(|pair| pair[0].end() > pair[1].start) {
        return Err(damaged(format!("two segments overlap at {:#x}", pair[1].start)));
    }
    // Where there is a PVH entry, the other is not used: the BSDs give a virtual address there.
    let (protocol, name, entry) = match pvh_entry {
        Some(entry) => (Protocol::Pvh, "PVH entry point", entry),
        None => (Protocol::Linux64, "entry point", header.u64(24)),
    };
    if !segments.iter().any(|segment| (segment.start..segment.end()).contains(&entry)) {
        return Err(damaged(format!("its {name} {entry:#x} is not in a loaded segment")));
    }
    let range = |segment: &Segment| FileRange {
        offset: segment.offset,
        address: GuestAddress(segment.start),
        length: segment.file_size,
    };
    Ok(Kernel {
        protocol,
        entry,
        occupied: first.start..last.end(),
        ranges: segments.iter().map(range).collect(),
        initrd_limit: layout::HOLE_START.0,
        cmdline_limit: CMDLINE_LIMIT,
        header: None,
    })
}

/// Reads the program header table, whose size and number of entries are bounded.
fn program_headers(file: &dyn ReadAt, size: u64, header: &Fields<'_>) -> Result<Vec<u8>, Error> {
    let (table, entry_size, count) = (header.u64(32), header.u16(54), header.u16(56));
    if entry_size != SEGMENT_SIZE || table < HEADER_SIZE {
        return Err(damaged(format!("program headers of {entry_size} bytes at {table:#x}")));
    }
    if count > MAX_SEGMENTS {
        return Err(damaged(format!("{count} program headers, more than {MAX_SEGMENTS}")));
    }
    read_inside(file, "program header table", table, (count * SEGMENT_SIZE).into(), size)
}

/// Checks the program header `number`, of a segment to be loaded from a `size`-byte file.
fn load_segment(number: usize, fields: &Fields<'_>, size: u64) -> Result<Segment, Error> {
    let (offset, start, file_size, memory_size) =
        (fields.u64(8), fields.u64(24), fields.u64(32), fields.u64(40));
    inside("loaded segment", offset, file_size, size)?;
    if file_size > memory_size {
        return Err(damaged(format!("segment {number} has more bytes in the file than in memory")));
    }
    if start.checked_add(memory_size).is_none() {
        return Err(damaged(format!("segment {number} wraps around the address space")));
    }
    if start < layout::HIGH_MEMORY.0 {
        return Err(Error::TooLow { address: start });
    }
    Ok(Segment { offset, start, file_size, memory_size })
}

/// Looks for Xen's PHYS32_ENTRY in `notes`, whose parts are padded to `align` bytes.
fn find_pvh_entry(mut notes: &[u8], align: usize) -> Option<u64> {
    // A note is three words, the name, the descriptor (gABI, chapter 5, "Note Section").
    while let Some((lengths, rest)) = notes.split_at_checked(12) {
        let lengths = Fields(lengths);
        let (name_size, desc_size) = (lengths.u32(0) as usize, lengths.u32(4) as usize);
        let name = rest.get(..name_size)?;
        let desc = rest.get(name_size.next_multiple_of(align)..)?;
        if lengths.u32(8) == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc_size >= 4 {
            return desc.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).into());
        }
        notes = desc.get(desc_size.next_multiple_of(align)..)?;
    }
    None
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
        8 => "MIPS",
        20 => "32-bit POWER",
        21 => "POWER",
        22 => "S/390",
        40 => "32-bit ARM",
        183 => "aarch64",
        243 => "RISC-V",
        258 => "LoongArch",
        other => return format!("processor number {other}"),
    };
    name.to_owned()
}

/// Little-endian fields of a header whose length was checked before.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|n| self.0[offset + n])
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

//! ELF kernels (`vmlinux`): checked header by header, then mapped or copied.
//!
//! linux-loader does not look at class, machine or type, lets a later note segment hide the PVH entry, neither bounds nor
//! zeroes what a segment has beyond its bytes in the file, and always copies; so this module does without it.

use std::fs::File;
use std::io;
use std::ops::Range;

use vm_memory::GuestAddress;

use super::{Error, pages, read_array, read_up_to};
use crate::{GuestMemory, layout};

/// Linux's COMMAND_LINE_SIZE for x86, less the NUL. A kernel cuts off what is longer, silently.
pub(super) const CMDLINE_LIMIT: usize = 2047;

/// Offsets and values of the ELF64 header (gABI, chapter 4).
const HEADER_SIZE: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;

/// Program headers (gABI, chapter 5): their size, and how many are looked at. Linux has five.
const SEGMENT_SIZE: usize = 56;
const MAX_SEGMENTS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// The note that holds the PVH entry (Xen's public/elfnote.h), and how much of a note segment is searched for it.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const MAX_NOTES: u64 = 0x1_0000;

/// Zeros are written in pieces of this size.
static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];

/// A checked ELF kernel.
#[derive(Debug)]
pub(super) struct Elf {
    /// Where the 64-bit entry is, as a physical address.
    pub(super) entry: u64,
    /// Where the PVH entry is, if there is one.
    pub(super) pvh_entry: Option<u64>,
    /// The loaded segments; never empty.
    segments: Vec<Segment>,
}

/// A segment that is loaded.
#[derive(Debug)]
struct Segment {
    /// Where its bytes are in the file.
    offset: u64,
    /// Where it goes in guest memory.
    start: u64,
    /// Bytes in the file.
    file_size: u64,
    /// Bytes in memory, the rest of which are zeros.
    memory_size: u64,
}

impl Segment {
    /// `parse` has checked that it does not overflow.
    fn end(&self) -> u64 {
        self.start + self.memory_size
    }
}

impl Elf {
    /// Checks the headers of a `size`-byte file; `None` if it is not ELF at all.
    pub(super) fn parse(file: &File, size: u64) -> Result<Option<Self>, Error> {
        if read_array(file, 0)? != Some(*b"\x7fELF") {
            return Ok(None);
        }
        let truncated = Error::Truncated { what: "ELF header", end: HEADER_SIZE as u64, size };
        // Up to the machine both classes have the same fields.
        let Some(start) = read_array::<20>(file, 0)? else { return Err(truncated) };
        let big_endian = start[5] != LITTLE_ENDIAN;
        let machine = [start[18], start[19]];
        let machine = if big_endian { u16::from_be_bytes(machine) } else { u16::from_le_bytes(machine) };
        match machine {
            MACHINE_386 => return Err(Error::Elf32),
            MACHINE_X86_64 if start[4] != CLASS_64 => return Err(Error::Elf32),
            MACHINE_X86_64 if big_endian => return Err(damaged("big-endian x86-64".to_owned())),
            MACHINE_X86_64 => {}
            other => return Err(Error::ElfMachine { machine: machine_name(other) }),
        }
        let Some(header) = read_array::<HEADER_SIZE>(file, 0)? else { return Err(truncated) };
        let header = Fields(&header);
        match header.u16(16) {
            TYPE_EXECUTABLE => {}
            1 => return Err(Error::ElfKind { kind: "an object file or a kernel module" }),
            3 => return Err(Error::ElfKind { kind: "a shared library or a position-independent program" }),
            4 => return Err(Error::ElfKind { kind: "a core dump" }),
            other => return Err(damaged(format!("type {other}"))),
        }
        Self::parse_segments(file, size, &header).map(Some)
    }

    fn parse_segments(file: &File, size: u64, header: &Fields<'_>) -> Result<Self, Error> {
        let (entry, table, entry_size, count) = (header.u64(24), header.u64(32), header.u16(54), header.u16(56));
        if usize::from(entry_size) != SEGMENT_SIZE || table < HEADER_SIZE as u64 {
            return Err(damaged(format!("program headers of {entry_size} bytes at {table:#x}")));
        }
        if count > MAX_SEGMENTS {
            return Err(damaged(format!("{count} program headers, more than {MAX_SEGMENTS}")));
        }
        inside("program header table", table, u64::from(count) * SEGMENT_SIZE as u64, size)?;

        let (mut segments, mut pvh_entry) = (Vec::new(), None);
        for number in 0..u64::from(count) {
            let what = "program header table";
            let at = table + number * SEGMENT_SIZE as u64;
            let Some(bytes) = read_array::<SEGMENT_SIZE>(file, at)? else {
                return Err(Error::Truncated { what, end: at + SEGMENT_SIZE as u64, size });
            };
            let segment = Fields(&bytes);
            let (offset, start, file_size, memory_size) =
                (segment.u64(8), segment.u64(24), segment.u64(32), segment.u64(40));
            match segment.u32(0) {
                PT_LOAD if memory_size > 0 || file_size > 0 => {
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
                    segments.push(Segment { offset, start, file_size, memory_size });
                }
                PT_INTERP => return Err(Error::ElfKind { kind: "an ordinary program" }),
                PT_NOTE => {
                    inside("note segment", offset, file_size, size)?;
                    let notes = read_up_to(file, offset, file_size.min(MAX_NOTES))?;
                    // A note's parts are aligned to 4 bytes, or to 8 in a segment that says so.
                    let pvh = find_pvh_entry(&notes, 4).or_else(|| find_pvh_entry(&notes, 8));
                    pvh_entry = pvh_entry.or(pvh);
                }
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(damaged("nothing to load".to_owned()));
        }
        // Where there is a PVH entry, the other is not used: the BSDs give a virtual address there.
        let (name, used) = pvh_entry.map_or(("entry point", entry), |entry| ("PVH entry point", entry));
        if !segments.iter().any(|segment| (segment.start..segment.end()).contains(&used)) {
            return Err(damaged(format!("its {name} {used:#x} is not in a loaded segment")));
        }
        Ok(Self { entry, pvh_entry, segments })
    }

    /// Puts the kernel into `memory`, whose RAM below the hole ends at `ram_end`, by mapping its pages if it `may_map` them;
    /// returns where the kernel is.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        file: &File,
        may_map: bool,
        ram_end: u64,
    ) -> Result<Range<u64>, Error> {
        let start = self.segments.iter().map(|segment| segment.start).min().unwrap_or_default();
        let needed = self.segments.iter().map(Segment::end).max().unwrap_or_default();
        super::fits(needed, ram_end)?;
        // First: should segments overlap, the file's bytes count.
        for segment in &self.segments {
            zero(memory, segment.start + segment.file_size, segment.end())?;
        }
        let held = may_map && pages::hold(file);
        for Segment { offset, start, file_size, .. } in &self.segments {
            pages::place(memory, file, held, *offset, *start, *file_size)?;
        }
        Ok(start..needed)
    }

    /// Replaces all pages that `load` may have mapped by copies.
    pub(super) fn own(&self, memory: &GuestMemory) -> io::Result<()> {
        self.segments
            .iter()
            .try_for_each(|segment| pages::own(memory, segment.offset, segment.start, segment.file_size))
    }
}

/// Writes zeros from `from` up to `to`, which is inside RAM.
fn zero(memory: &GuestMemory, from: u64, to: u64) -> Result<(), Error> {
    let mut at = from;
    while at < to {
        let piece = (to - at).min(ZEROS.len() as u64);
        crate::write(memory, "kernel's zeroed memory", GuestAddress(at), &ZEROS[..piece as usize])?;
        at += piece;
    }
    Ok(())
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

fn damaged(what: String) -> Error {
    Error::Damaged { format: "ELF", what }
}

/// Names an ELF machine number.
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

/// Little-endian fields of a header that is long enough for all that is asked of it.
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

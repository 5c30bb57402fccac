//! The file: an ELF core, so that `readelf`, `gdb` and `crash` open a saved machine.
//!
//! ```text
//! 0            ELF header, program headers
//! 64 + 56 n    PT_NOTE  "minivmm" 0x1001  the machine as JSON
//!                       "CORE"    1       NT_PRSTATUS of each vCPU: its registers, for debuggers
//!                       "QEMU"    0       the CPU state that crash(8) reads of QEMU's dumps, with CR3
//!                       "minivmm" 0x1004  of an increment only: its pages, a bit for each page of RAM
//!                       "minivmm" 0x1002  checksums of RAM: 8 bytes for each 2 MiB, 0 for a hole
//!                       "minivmm" 0x1003  the checksum of everything before it, the last 8 bytes of the notes
//! 2 MiB k      PT_LOAD  a range of RAM: its guest-physical address as p_paddr; holes where it is zero
//! ```
//!
//! An increment (`increments`) has the same ranges. Pages that come from its base are holes, so debuggers see zeroes there.
//!
//! The types of minivmm's notes are above 0x1000, because `readelf` shows type 1 of any owner as NT_PRSTATUS.
//!
//! A reader trusts nothing in the file. Every offset and length is compared with the file's size, and the checksum of headers and notes
//! is compared before anything in them is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use arch::layout::PAGE_SIZE;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::SnapshotError;
use super::checksum::{BLOCK, checksum};
use super::page_set::PageSet;

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// One for the notes, and one for each range of RAM: a machine has two.
const PROGRAM_HEADERS_MAX: u64 = 8;
/// Notes of a machine with 255 vCPUs have about 10 MB.
const NOTES_MAX: u64 = 256 << 20;

const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const OURS: &[u8] = b"minivmm\0";
const NOTE_MACHINE: u32 = 0x1001;
const NOTE_RAM_CHECKSUMS: u32 = 0x1002;
const NOTE_CHECKSUM: u32 = 0x1003;
const NOTE_PAGES: u32 = 0x1004;
const NT_PRSTATUS: u32 = 1;

/// Whether a file that begins like this is an ELF core.
pub(super) fn is_core(start: &[u8]) -> bool {
    start.starts_with(b"\x7fELF") && start.get(16..18) == Some(&ET_CORE.to_le_bytes())
}

/// A range of RAM: where it is for the guest, and where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RamSegment {
    pub(super) address: u64,
    pub(super) length: u64,
    pub(super) offset: u64,
}

/// The notes of a file that is being written, and the place of everything.
pub(super) struct CoreLayout {
    /// The notes so far: all but the checksums.
    notes: Vec<u8>,
    blocks: u64,
    pub(super) segments: Vec<RamSegment>,
}

impl CoreLayout {
    /// A file for `machine` (JSON), with the registers of each vCPU and these ranges of RAM (address and length); an increment has these
    /// `pages` of it.
    pub(super) fn new(
        machine: &[u8],
        cpus: &[(kvm_regs, kvm_sregs)],
        ram: &[(u64, u64)],
        pages: Option<&PageSet>,
    ) -> Self {
        let mut notes = Vec::new();
        note(&mut notes, OURS, NOTE_MACHINE, machine);
        for (index, (regs, sregs)) in cpus.iter().enumerate() {
            note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(index, regs, sregs));
        }
        for (regs, sregs) in cpus {
            note(&mut notes, b"QEMU\0", 0, &qemu_cpu_state(regs, sregs));
        }
        if let Some(pages) = pages {
            note(&mut notes, OURS, NOTE_PAGES, pages.bits());
        }
        let blocks = ram.iter().map(|(_, length)| length.div_ceil(BLOCK)).sum();
        let mut layout = Self { notes, blocks, segments: Vec::new() };
        let mut offset = layout.notes_offset(ram.len()) + layout.notes_length();
        for &(address, length) in ram {
            offset = offset.next_multiple_of(BLOCK);
            layout.segments.push(RamSegment { address, length, offset });
            offset += length;
        }
        layout
    }

    fn notes_offset(&self, segments: usize) -> u64 {
        HEADER + PROGRAM_HEADER * (1 + segments as u64)
    }

    fn notes_length(&self) -> u64 {
        // Both checksum notes have a header of 12 bytes and a name of 8.
        self.notes.len() as u64 + 20 + self.blocks * 8 + 20 + 8
    }

    /// Bytes of the whole file.
    pub(super) fn file_length(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.offset + segment.length)
    }

    /// Headers and notes, for the start of the file.
    pub(super) fn head(mut self, ram_checksums: &[u64]) -> Vec<u8> {
        let (offset, length) = (self.notes_offset(self.segments.len()), self.notes_length());
        let mut head = vec![0; 0];
        head.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        put16(&mut head, &[ET_CORE, EM_X86_64]);
        put32(&mut head, &[1]);
        put64(&mut head, &[0, HEADER, 0]);
        put32(&mut head, &[0]);
        let count = 1 + self.segments.len() as u16;
        put16(&mut head, &[HEADER as u16, PROGRAM_HEADER as u16, count, 0, 0, 0]);
        program_header(&mut head, PT_NOTE, [offset, 0, 0, length, length, 4]);
        for segment in &self.segments {
            let RamSegment { address, length, offset } = *segment;
            program_header(&mut head, PT_LOAD, [offset, address, address, length, length, BLOCK]);
        }
        let sums: Vec<u8> = ram_checksums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        note(&mut self.notes, OURS, NOTE_RAM_CHECKSUMS, &sums);
        head.append(&mut self.notes);
        note(&mut head, OURS, NOTE_CHECKSUM, &[0; 8]);
        let end = head.len() - 8;
        let sum = checksum(&head[..end]).to_le_bytes();
        head[end..].copy_from_slice(&sum);
        head
    }
}

fn put16(to: &mut Vec<u8>, values: &[u16]) {
    to.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn put32(to: &mut Vec<u8>, values: &[u32]) {
    to.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn put64(to: &mut Vec<u8>, values: &[u64]) {
    to.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn program_header(to: &mut Vec<u8>, kind: u32, fields: [u64; 6]) {
    const READ_WRITE: u32 = 0b110;
    put32(to, &[kind, if kind == PT_LOAD { READ_WRITE } else { 0 }]);
    put64(to, &fields);
}

/// Appends a note. Its name and its content are padded to 4 bytes.
fn note(to: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    put32(to, &[name.len() as u32, content.len() as u32, kind]);
    for part in [name, content] {
        to.extend_from_slice(part);
        to.resize(to.len() + part.len().next_multiple_of(4) - part.len(), 0);
    }
}

/// `struct elf_prstatus` of x86-64 (include/uapi/linux/elfcore.h): the thread's number at 32, the registers at 112 in the order of
/// `user_regs_struct` (arch/x86/include/uapi/asm/ptrace.h).
fn prstatus(index: usize, regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u8> {
    let mut status = vec![0; 112];
    status[32..36].copy_from_slice(&(index as u32 + 1).to_le_bytes());
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    put64(
        &mut status,
        &[regs.r15, regs.r14, regs.r13, regs.r12, regs.rbp, regs.rbx, regs.r11, regs.r10, regs.r9],
    );
    put64(&mut status, &[regs.r8, regs.rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rax]);
    put64(
        &mut status,
        &[regs.rip, selector(&sregs.cs), regs.rflags, regs.rsp, selector(&sregs.ss)],
    );
    put64(&mut status, &[sregs.fs.base, sregs.gs.base]);
    put64(&mut status, &[&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs].map(selector));
    put64(&mut status, &[0]);
    status
}

/// `QEMUCPUState` version 1 (QEMU, target/i386/arch_dump.c).
fn qemu_cpu_state(regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u8> {
    let mut state = Vec::new();
    put32(&mut state, &[1, 0]);
    put64(&mut state, &[regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp]);
    put64(&mut state, &[regs.rbp, regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13]);
    put64(&mut state, &[regs.r14, regs.r15, regs.rip, regs.rflags]);
    let mut segment = |selector: u16, limit: u32, flags: u32, base: u64| {
        put32(&mut state, &[selector.into(), limit, flags, 0]);
        put64(&mut state, &[base]);
    };
    let kvm_sregs { cs, ds, es, fs, gs, ss, ldt, tr, .. } = sregs;
    for part in [cs, ds, es, fs, gs, ss, ldt, tr] {
        let bits = [part.type_, part.s << 4, part.dpl << 5, part.present << 7];
        let low = bits.iter().fold(0, |flags, bit| flags | u32::from(*bit));
        let high = u32::from(part.l) << 13 | u32::from(part.db) << 14 | u32::from(part.g) << 15;
        segment(part.selector, part.limit, (low | high) << 8, part.base);
    }
    for table in [&sregs.gdt, &sregs.idt] {
        segment(0, table.limit.into(), 0, table.base);
    }
    put64(&mut state, &[sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4, 0]);
    let size = (state.len() as u32).to_le_bytes();
    state[4..8].copy_from_slice(&size);
    state
}

/// A file whose headers, notes and sizes are as they were written.
pub(super) struct CoreFile {
    pub(super) file: File,
    /// JSON.
    pub(super) machine: Vec<u8>,
    pub(super) segments: Vec<RamSegment>,
    pub(super) ram_checksums: Vec<u64>,
    /// Only of an increment: the pages that it has. The other pages come from its base.
    pub(super) pages: Option<PageSet>,
    /// The size of the file, and the checksum of its headers and notes, which include the checksums of RAM. An increment names its base by
    /// these two.
    pub(super) identity: (u64, u64),
}

impl CoreFile {
    /// Whether this file has this page of RAM. Otherwise it comes from the base.
    pub(super) fn has(&self, page: usize) -> bool {
        self.pages.as_ref().is_none_or(|pages| pages.contains(page))
    }

    /// Reads and checks all but RAM.
    pub(super) fn read(file: File) -> Result<Self, SnapshotError> {
        use SnapshotError::{Damaged, NotOurs};
        let metadata = file.metadata()?;
        if !metadata.file_type().is_file() {
            return Err(NotOurs);
        }
        let size = metadata.len();
        let mut start = [0; HEADER as usize];
        read_at(&file, &mut start, 0)?;
        let fields = Fields(&start);
        let is_core = start[..7] == [0x7f, b'E', b'L', b'F', 2, 1, 1]
            && (fields.u16(16), fields.u16(18)) == (ET_CORE, EM_X86_64);
        let count = u64::from(fields.u16(56));
        if !is_core || fields.u64(32) != HEADER || u64::from(fields.u16(54)) != PROGRAM_HEADER {
            return Err(NotOurs);
        }
        if !(2..=PROGRAM_HEADERS_MAX).contains(&count) {
            return Err(NotOurs);
        }
        let notes_offset = HEADER + PROGRAM_HEADER * count;
        let mut headers = vec![0; (PROGRAM_HEADER * count) as usize];
        read_at(&file, &mut headers, HEADER)?;
        let mut segments = headers.chunks(PROGRAM_HEADER as usize).map(Fields);
        let notes = segments.next().ok_or(NotOurs)?;
        let length = notes.u64(32);
        if notes.u32(0) != PT_NOTE || notes.u64(8) != notes_offset || length > NOTES_MAX {
            return Err(NotOurs);
        }
        let notes_end = notes_offset.checked_add(length).filter(|end| *end <= size);
        let notes_end = notes_end.ok_or(Damaged("its end is missing"))?;
        let mut head = vec![0; notes_end as usize];
        read_at(&file, &mut head, 0)?;
        let (body, sum) = head.split_at_checked(head.len().wrapping_sub(8)).ok_or(NotOurs)?;
        let identity = (size, checksum(body));
        if identity.1.to_le_bytes() != *sum {
            return Err(Damaged("its description differs from the checksum"));
        }
        let segments = segments.map(|header| segment(&header)).collect::<Option<Vec<_>>>();
        let segments = segments.ok_or(Damaged("a range of memory is none"))?;
        check_places(&segments, notes_end, size)?;
        let notes = notes_of(&head[notes_offset as usize..]).ok_or(Damaged("its notes"))?;
        let [machine, sums, pages] = [NOTE_MACHINE, NOTE_RAM_CHECKSUMS, NOTE_PAGES].map(|kind| {
            let mut found = notes.iter().filter(|(name, found, _)| *name == OURS && *found == kind);
            found.next().filter(|_| found.next().is_none()).map(|(.., content)| *content)
        });
        let (machine, sums) = machine.zip(sums).ok_or(Damaged("a note is missing"))?;
        let (sums, rest) = sums.as_chunks::<8>();
        let blocks: u64 = segments.iter().map(|segment| segment.length.div_ceil(BLOCK)).sum();
        if !rest.is_empty() || sums.len() as u64 != blocks {
            return Err(Damaged("the number of checksums"));
        }
        let ram_checksums = sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        let count = segments.iter().map(|segment| segment.length / PAGE_SIZE).sum::<u64>();
        let set = |bits| PageSet::from_bits(bits, count as usize);
        let pages = pages.map(|bits| set(bits).ok_or(Damaged("its set of pages"))).transpose()?;
        Ok(Self { machine: machine.to_vec(), segments, ram_checksums, pages, identity, file })
    }
}

/// Reads `buffer`. A file that ends before is no saved machine.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), SnapshotError> {
    file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => SnapshotError::NotOurs,
        _ => SnapshotError::Host(error),
    })
}

/// Little-endian fields of a structure, whose size the caller knows.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
        bytes.unwrap_or([0; N])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

fn segment(header: &Fields<'_>) -> Option<RamSegment> {
    let [offset, _, address, file_length, length] = [8, 16, 24, 32, 40].map(|at| header.u64(at));
    let whole = file_length == length && length > 0 && (offset | length | address) & 0xfff == 0;
    (header.u32(0) == PT_LOAD && whole).then_some(RamSegment { address, length, offset })
}

/// Ranges follow each other without overlap, and the file ends with the last.
fn check_places(segments: &[RamSegment], notes_end: u64, size: u64) -> Result<(), SnapshotError> {
    let mut end = notes_end;
    for segment in segments {
        let last = segment.offset.checked_add(segment.length).filter(|_| segment.offset >= end);
        end = last.ok_or(SnapshotError::Damaged("a range of memory has no place"))?;
    }
    if end == size { Ok(()) } else { Err(SnapshotError::Damaged("its size is wrong")) }
}

/// Owner, type and content.
type Note<'a> = (&'a [u8], u32, &'a [u8]);

/// Each note. `None`: a length leads out of the notes.
fn notes_of(mut bytes: &[u8]) -> Option<Vec<Note<'_>>> {
    let mut notes = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_at_checked(12)?;
        let header = Fields(header);
        let padded = |length: u32| (length as usize).next_multiple_of(4);
        let (name_length, length) = (header.u32(0), header.u32(4));
        let (name, rest) = rest.split_at_checked(padded(name_length))?;
        let (content, rest) = rest.split_at_checked(padded(length))?;
        let name = name.get(..name_length as usize)?;
        notes.push((name, header.u32(8), content.get(..length as usize)?));
        bytes = rest;
    }
    Some(notes)
}

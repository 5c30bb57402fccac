//! Images made by hand, byte by byte: what boots, where it goes, and what each unsuitable file is told.

use std::io::Write;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, Bytes, GuestAddress};

use super::*;

mod pages;
mod unpack;

const MIB: u64 = 1 << 20;
const RSDP: Option<GuestAddress> = Some(layout::ACPI_TABLES);

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Guest memory that a previous kernel has used up.
fn dirty_memory(bytes: u64) -> GuestMemory {
    let memory = GuestMemory::from_ranges(&memory::ram_ranges(bytes)).unwrap();
    memory.write_slice(&vec![0xa5; 0x40_0000], GuestAddress(0)).unwrap();
    memory
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn patched(mut bytes: Vec<u8>, offset: usize, with: &[u8]) -> Vec<u8> {
    bytes[offset..offset + with.len()].copy_from_slice(with);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    Kernel::identify(file(bytes)).unwrap_err().to_string()
}

// ---- ELF ----

/// A program header: type, address (0: a note), contents, bytes in memory.
struct Part(u32, u64, Vec<u8>, u64);

const LOAD: u32 = 1;
const NOTE: u32 = 4;

fn code() -> Part {
    Part(LOAD, 2 * MIB, vec![0x90; 0x1234], 0x3_0000)
}

fn elf(parts: &[Part]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2u16, 62].map(u16::to_le_bytes).as_flattened());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend([2 * MIB + 0x10, 64, 0].map(u64::to_le_bytes).as_flattened());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend([64, 56, parts.len() as u16, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
    let mut contents = vec![];
    for Part(kind, address, data, memory_size) in parts {
        let offset = (64 + parts.len() * 56 + contents.len()) as u64;
        bytes.extend([*kind, 7].map(u32::to_le_bytes).as_flattened());
        let size = data.len() as u64;
        bytes.extend([offset, *address, *address, size, *memory_size, 4].map(u64::to_le_bytes).as_flattened());
        contents.extend_from_slice(data);
    }
    bytes.extend(contents);
    bytes
}

fn note(kind: u32, name: &[u8], desc: &[u8], align: usize) -> Vec<u8> {
    let mut note = [name.len() as u32, desc.len() as u32, kind].map(u32::to_le_bytes).as_flattened().to_vec();
    for part in [name, desc] {
        note.extend(part);
        note.resize(12 + (note.len() - 12).next_multiple_of(align), 0);
    }
    note
}

fn pvh_note() -> Vec<u8> {
    note(18, b"Xen\0", &(2 * MIB as u32 + 0x40).to_le_bytes(), 4)
}

fn notes(bytes: Vec<u8>) -> Part {
    Part(NOTE, 0, bytes, 0)
}

#[test]
fn an_elf_kernel_without_a_note_enters_in_64_bit_mode() {
    let kernel = Kernel::identify(file(&elf(&[code()]))).unwrap();
    assert_eq!((kernel.protocol(), kernel.cmdline_limit()), (Protocol::Linux64, 2047));
    let memory = dirty_memory(32 * MIB);
    let entry = load(&memory, &kernel, None, "console=ttyS0", RSDP).unwrap();
    assert_eq!(
        entry,
        Entry { protocol: Protocol::Linux64, ip: GuestAddress(2 * MIB + 0x10), start: layout::ZERO_PAGE }
    );
    // The file's bytes, then zeros; what lies behind is not the kernel's.
    assert!(read(&memory, 2 * MIB, 0x1234).iter().all(|byte| *byte == 0x90));
    assert!(read(&memory, 2 * MIB + 0x1234, 0x3_0000 - 0x1234).iter().all(|byte| *byte == 0));
    assert_eq!(read(&memory, 2 * MIB + 0x3_0000, 1), [0xa5]);
    assert_eq!(read(&memory, layout::CMDLINE.0, 14), b"console=ttyS0\0");
    assert!(!cmdline::panicked(&memory));

    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    assert_eq!({ params.hdr.type_of_loader }, 0xff);
    assert_eq!({ params.hdr.boot_flag }, 0xaa55);
    assert_eq!({ params.hdr.header }, 0x5372_6448);
    assert_eq!({ params.hdr.cmd_line_ptr }, 0x2_0000);
    assert_eq!(({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }), (0, 0));
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    assert_eq!(params.sentinel, 0);
    assert_eq!(params.e820_entries, 5);
    let last = params.e820_table[4];
    assert_eq!(({ last.addr }, { last.size }, { last.r#type }), (MIB, 31 * MIB, 1));
}

#[test]
fn a_pvh_note_is_found_wherever_it_is() {
    let other = || note(1, b"Linux\0", b"abcde", 4);
    let tables: [(&str, Vec<Part>); 6] = [
        ("alone", vec![code(), notes(pvh_note())]),
        ("behind other notes", vec![code(), notes([other(), other(), pvh_note()].concat())]),
        ("before another note segment", vec![code(), notes(pvh_note()), notes(other())]),
        ("before an empty note segment", vec![notes(pvh_note()), code(), notes(vec![])]),
        ("before a broken note segment", vec![code(), notes(pvh_note()), notes(vec![0xff; 40])]),
        (
            "aligned to 8",
            vec![
                code(),
                notes([note(5, b"GNU\0", b"a", 8), note(18, b"Xen\0", &0x20_0040u64.to_le_bytes(), 8)].concat()),
            ],
        ),
    ];
    for (name, parts) in tables {
        // The other entry does not matter then.
        let elf = patched(elf(&parts), 24, &0xffff_ffff_8038_0000_u64.to_le_bytes());
        let kernel = Kernel::identify(file(&elf)).unwrap();
        assert_eq!(kernel.protocol(), Protocol::Pvh, "{name}");
        let entry = load(&dirty_memory(32 * MIB), &kernel, None, "", RSDP).unwrap();
        assert_eq!(
            entry,
            Entry { protocol: Protocol::Pvh, ip: GuestAddress(2 * MIB + 0x40), start: layout::PVH_START_INFO },
            "{name}"
        );
    }
    for (name, bytes) in [
        ("another type", note(17, b"Xen\0", &[0; 4], 4)),
        ("another owner", note(18, b"Xeb\0", &[0; 4], 4)),
        ("no address", note(18, b"Xen\0", &[0; 2], 4)),
        ("cut off", pvh_note()[..17].to_vec()),
        ("huge", [u32::MAX; 9].map(u32::to_le_bytes).as_flattened().to_vec()),
    ] {
        let kernel = Kernel::identify(file(&elf(&[code(), notes(bytes)]))).unwrap();
        assert_eq!(kernel.protocol(), Protocol::Linux64, "{name}");
    }
}

#[test]
fn pvh_start_structures_tell_all() {
    let kernel = Kernel::identify(file(&elf(&[code(), notes(pvh_note())]))).unwrap();
    let memory = GuestMemory::from_ranges(&memory::ram_ranges((3 << 30) + 64 * MIB)).unwrap();
    let initrd = vec![0x5a; 0x1801];
    load(&memory, &kernel, Some(&file(&initrd)), "quiet", RSDP).unwrap();
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 0));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (0xe_0000, 0x2_0000));
    assert_eq!((info.nr_modules, info.memmap_entries), (1, 6));
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    // On a page, as high below the hole as it goes.
    assert_eq!((module.paddr, module.size), (0xc000_0000 - 0x2000, 0x1801));
    assert_eq!(read(&memory, module.paddr, initrd.len()), initrd);
    let map: Vec<hvm_memmap_table_entry> = (0..6)
        .map(|n| memory.read_obj(GuestAddress(info.memmap_paddr).unchecked_add(n * 24)).unwrap())
        .map(|entry: hvm_memmap_table_entry| entry)
        .collect();
    let expected = memory::e820(&memory::ranges_of(&memory));
    let told = map.iter().map(|entry| (entry.addr, entry.size, entry.type_));
    assert!(told.eq(expected.iter().map(|range| (range.start, range.size, range.kind as u32))));

    let without = dirty_memory(32 * MIB);
    load(&without, &kernel, None, "", None).unwrap();
    let info: hvm_start_info = without.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.nr_modules, info.modlist_paddr, info.rsdp_paddr), (0, 0, 0));
}

#[test]
fn unsuitable_elf_files_are_named() {
    let good = || elf(&[code()]);
    let (kind, machine, first_segment) = (16, 18, 64);
    let table: &[(&str, Vec<u8>, &str)] = &[
        ("32-bit", patched(good(), 4, &[1, 1, 1]), "a 32-bit ELF file"),
        ("i386", patched(patched(good(), 4, &[1]), machine, &[3, 0]), "a 32-bit ELF file"),
        ("aarch64", patched(good(), machine, &[183, 0]), "for aarch64, and this machine is x86-64"),
        ("RISC-V", patched(good(), machine, &[243, 0]), "for RISC-V"),
        ("32-bit ARM", patched(patched(good(), 4, &[1]), machine, &[40, 0]), "for 32-bit ARM"),
        ("S/390", patched(patched(good(), 5, &[2]), machine, &[0, 22]), "for S/390"),
        ("unknown", patched(good(), machine, &[0xff, 0xfe]), "for processor number 65279"),
        ("object", patched(good(), kind, &[1]), "an object file or a kernel module"),
        ("shared", patched(good(), kind, &[3]), "a shared library or a position-independent program"),
        ("core", patched(good(), kind, &[4]), "a core dump"),
        ("type", patched(good(), kind, &[9]), "damaged (type 9)"),
        ("interpreter", elf(&[code(), Part(3, 0, b"/lib/ld.so\0".to_vec(), 0)]), "an ordinary program"),
        ("empty", elf(&[]), "damaged (nothing to load)"),
        ("header size", patched(good(), 54, &[55]), "damaged (program headers of 55 bytes"),
        ("header place", patched(good(), 32, &[8]), "damaged (program headers of 56 bytes at 0x8)"),
        ("header count", patched(good(), 56, &[0xff, 0xff]), "damaged (65535 program headers"),
        ("headers beyond", patched(good(), 32, &u64::MAX.to_le_bytes()), "truncated: its program header table"),
        ("entry", patched(elf(&[code()]), 24, &[0; 8]), "damaged (its entry point 0x0 is not in a loaded segment)"),
        ("PVH entry", elf(&[code(), notes(note(18, b"Xen\0", &[7; 4], 4))]), "its PVH entry point 0x7070707"),
        ("file > memory", elf(&[Part(LOAD, 2 * MIB, vec![0; 100], 99)]), "more bytes in the file than in memory"),
        ("wraps", elf(&[Part(LOAD, u64::MAX - 9, vec![0], 100)]), "wraps around"),
        ("low", elf(&[Part(LOAD, 0x7000, vec![0], 100)]), "loaded at 0x7000, below 1 MiB"),
        ("offset", patched(good(), first_segment + 8, &u64::MAX.to_le_bytes()), "truncated: its loaded segment"),
        ("size", patched(good(), first_segment + 39, &[0x7f]), "truncated: its loaded segment"),
        ("cut in data", good()[..0x1000].to_vec(), "truncated: its loaded segment"),
        ("cut in table", good()[..100].to_vec(), "truncated: its program header table"),
        ("cut in header", good()[..63].to_vec(), "truncated: its ELF header"),
        ("cut in ident", good()[..19].to_vec(), "truncated: its ELF header"),
    ];
    for (name, bytes, expected) in table {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{name}: {message}");
        assert!(!message.contains('\n'), "{name}");
    }
}

// ---- bzImage ----

const SETUP_SECTORS: usize = 2;
const PREFERRED: u64 = 16 * MIB;
const INIT_SIZE: u32 = 8 * MIB as u32;

fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; (1 + SETUP_SECTORS) * 512];
    bytes[0x1f1] = SETUP_SECTORS as u8;
    let payload = 0x2_0000;
    let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(0x1f4, &(payload as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    // The header ends at 0x202 + 0x66: version 2.12 has no kernel_info_offset, what is there is code.
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020cu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &(2 * MIB as u32).to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_SIZE.to_le_bytes());
    put(0x268, &[0xcc; 4]);
    bytes.extend((0..payload).map(|n: usize| n as u8));
    bytes
}

#[test]
fn a_bzimage_goes_where_it_need_not_move() {
    let kernel = Kernel::identify(file(&bzimage())).unwrap();
    assert_eq!((kernel.protocol(), kernel.cmdline_limit()), (Protocol::Linux64, 2047));
    let memory = dirty_memory(64 * MIB);
    let initrd = file(&[0x11; 5000]);
    let entry = load(&memory, &kernel, Some(&initrd), "x", RSDP).unwrap();
    assert_eq!(
        entry,
        Entry { protocol: Protocol::Linux64, ip: GuestAddress(PREFERRED + 0x200), start: layout::ZERO_PAGE }
    );
    assert_eq!(read(&memory, PREFERRED, 0x2_0000), bzimage()[3 * 512..]);
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    assert_eq!({ params.hdr.init_size }, INIT_SIZE);
    assert_eq!({ params.hdr.kernel_info_offset }, 0, "code, not header");
    assert_eq!({ params.hdr.type_of_loader }, 0xff);
    assert_eq!({ params.hdr.code32_start }, PREFERRED as u32);
    assert_eq!(({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }), (64 * MIB as u32 - 0x2000, 5000));
    assert_eq!(read(&memory, 64 * MIB - 0x2000, 5000), [0x11; 5000]);
}

#[test]
fn a_bzimage_that_cannot_be_moved_loads_at_1_mib() {
    let kernel = Kernel::identify(file(&patched(bzimage(), 0x234, &[0]))).unwrap();
    let memory = dirty_memory(64 * MIB);
    let entry = load(&memory, &kernel, None, "", None).unwrap();
    assert_eq!(entry.ip, GuestAddress(MIB + 0x200));
    assert_eq!(read(&memory, MIB, 16), bzimage()[3 * 512..3 * 512 + 16]);
}

#[test]
fn an_initrd_stays_where_the_kernel_reaches_it() {
    let kernel = Kernel::identify(file(&patched(bzimage(), 0x22c, &0x02ff_ffffu32.to_le_bytes()))).unwrap();
    let memory = dirty_memory(64 * MIB);
    load(&memory, &kernel, Some(&file(&[1; 0x1000])), "", None).unwrap();
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 0x2ff_f000);
}

/// Debian's kernel lies from 16 to 62 MiB, and yet boots in 64 MiB.
#[test]
fn an_initrd_that_does_not_fit_above_the_kernel_goes_below() {
    let kernel = Kernel::identify(file(&bzimage())).unwrap();
    let memory = dirty_memory(25 * MIB);
    let initrd = vec![0x5a; 2 << 20];
    load(&memory, &kernel, Some(&file(&initrd)), "", None).unwrap();
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 14 << 20);
    assert_eq!(read(&memory, 14 << 20, initrd.len()), initrd);
}

#[test]
fn unsuitable_bzimages_are_named() {
    let table: &[(&str, Vec<u8>, &str)] = &[
        ("old", patched(bzimage(), 0x206, &[0x0b, 0x02]), "no 64-bit entry point (boot protocol 2.11, before 2.12)"),
        ("32-bit", patched(bzimage(), 0x236, &[0, 0]), "no 64-bit entry point (XLF_KERNEL_64 is not set)"),
        ("zImage", patched(bzimage(), 0x211, &[0]), "damaged (a zImage"),
        ("alignment", patched(bzimage(), 0x230, &[3, 0, 0, 0]), "damaged (alignment 0x3)"),
        ("cut in payload", bzimage()[..0x1000].to_vec(), "truncated: its compressed kernel ends at byte 132608"),
        ("cut in setup", bzimage()[..0x300].to_vec(), "truncated: its compressed kernel"),
        ("cut in header", bzimage()[..0x220].to_vec(), "truncated: its setup header"),
    ];
    for (name, bytes, expected) in table {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{name}: {message}");
        assert!(!message.contains('\n'), "{name}");
    }
}

// ---- Neither ----

#[test]
fn other_files_are_named_by_what_they_look_like() {
    let at = |offset: usize, bytes: &[u8]| patched(vec![1; 0x2000], offset, bytes);
    let table: &[(Vec<u8>, &str)] = &[
        (vec![], "the kernel file is empty"),
        (at(0, &[0x1f, 0x8b, 8]), "a gzip file (unpack it first)"),
        (at(0, b"\xfd7zXZ\0"), "an xz file"),
        (at(0, &[0x28, 0xb5, 0x2f, 0xfd]), "a zstd file"),
        (patched(at(0, b"MZ"), 56, b"ARM\x64"), "an aarch64 kernel Image"),
        (patched(at(0, b"MZ"), 56, b"RSC\x05"), "a RISC-V kernel Image"),
        (at(0, b"MZ"), "an EFI or Windows program"),
        (at(0, b"070701"), "a cpio archive"),
        (at(0, b"QFI\xfb"), "a qcow2 disk image"),
        (at(510, &[0x55, 0xaa]), "a disk image with a boot sector"),
        (at(0x438, &[0x53, 0xef]), "an ext2, ext3 or ext4 file system"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"hello, world\n".to_vec(), "a text file"),
        (vec![0; 4096], "a file of zeros"),
        (vec![0x80, 0x81], "a file of unknown format"),
    ];
    for (bytes, expected) in table {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

// ---- What does not fit ----

#[test]
fn what_does_not_fit_is_told_with_what_would_do() {
    let elf_at = |end: u64| elf(&[Part(LOAD, 2 * MIB, vec![0x90; 0x20], end - 2 * MIB)]);
    /// Name, image, the guest's mebibytes, the initrd's bytes, what is said.
    type Case<'a> = (&'a str, Vec<u8>, u64, Option<usize>, &'a str);
    let table: &[Case<'_>] = &[
        ("ELF", elf_at(40 * MIB), 32, None, "the kernel alone needs 40M of memory, and the guest has 32M"),
        ("ELF in the hole", elf_at((3 << 30) + 1), 5 << 10, None, "needs memory up to 0xc0000001, and guest RAM"),
        ("bzImage", bzimage(), 20, None, "the kernel alone needs 24M of memory, and the guest has 20M"),
        (
            "bzImage high up",
            patched(bzimage(), 0x258, &(u64::MAX - 9).to_le_bytes()),
            64,
            None,
            "damaged (preferred address 0xfffffffffffffff6)",
        ),
        (
            "initrd",
            bzimage(),
            25,
            Some(16 << 20),
            "the initrd of 16M does not fit: the kernel leaves 15M; give the guest 41M",
        ),
        (
            "initrd above the limit",
            patched(bzimage(), 0x22c, &(25 * MIB as u32 - 1).to_le_bytes()),
            64,
            Some(16 << 20),
            "the initrd of 16M is too large: this kernel can take 15M",
        ),
        ("empty initrd", bzimage(), 32, Some(0), "the initrd is empty"),
        ("next to nothing", elf_at(3 * MIB), 0, None, "the kernel alone needs 3M of memory, and the guest has 1M"),
    ];
    for (name, bytes, mib, initrd, expected) in table {
        let memory = GuestMemory::from_ranges(&memory::ram_ranges((mib * MIB).max(0x1_0000))).unwrap();
        let initrd = initrd.map(|size| file(&vec![1; size]));
        let kernel = Kernel::identify(file(bytes)).unwrap();
        let message = load(&memory, &kernel, initrd.as_ref(), "", RSDP).unwrap_err().to_string();
        assert!(message.contains(expected), "{name}: {message}");
    }
}

#[test]
fn the_kernel_bounds_its_command_line() {
    let memory = GuestMemory::from_ranges(&memory::ram_ranges(32 * MIB)).unwrap();
    let short = patched(bzimage(), 0x238, &9u32.to_le_bytes());
    let endless = patched(bzimage(), 0x238, &u32::MAX.to_le_bytes());
    for (bytes, limit) in [(short, 9), (endless, 0xffff), (elf(&[code()]), 2047)] {
        let kernel = Kernel::identify(file(&bytes)).unwrap();
        assert_eq!(kernel.cmdline_limit(), limit);
        load(&memory, &kernel, None, &"x".repeat(limit), None).unwrap();
        let error = load(&memory, &kernel, None, &"x".repeat(limit + 1), None).unwrap_err();
        let expected = format!("has {} bytes, and this kernel takes at most {limit}", limit + 1);
        assert!(error.to_string().contains(&expected), "{error}");
    }
    let kernel = Kernel::identify(file(&elf(&[code()]))).unwrap();
    let error = load(&memory, &kernel, None, "a\nb", None).unwrap_err();
    assert!(error.to_string().contains("byte 0x0a at position 1"), "{error}");
}

// ---- Made to hurt ----

/// Whatever an image says, it boots or is refused; it never panics, and never writes outside RAM.
#[test]
fn mutated_images_never_hurt() {
    let memory = GuestMemory::from_ranges(&memory::ram_ranges(32 * MIB)).unwrap();
    let images = [elf(&[code(), notes([note(1, b"Linux\0", b"abc", 4), pvh_note()].concat())]), bzimage()];
    // The parts that are parsed: ELF headers and notes, the setup header.
    let targets = [[0..64 + 2 * 56, 64 + 2 * 56 + 0x1234..images[0].len()], [0x1f1..0x26c, 0..0x40]];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |bound: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % bound as u64) as usize
    };
    let mut booted = 0;
    for round in 0..600 {
        let which = round % 2;
        let mut bytes = images[which].clone();
        for _ in 0..1 + next(3) {
            let target = targets[which][usize::from(next(4) == 0)].clone();
            let place = target.start + next(target.len());
            match next(4) {
                0 => bytes[place] = next(256) as u8,
                1 => bytes[place] ^= 1 << next(8),
                2 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][next(5)],
                _ => (place..(place + 8).min(target.end)).for_each(|at| bytes[at] = 0xff),
            }
        }
        if next(8) == 0 {
            bytes.truncate(next(bytes.len()));
        }
        if let Ok(kernel) = Kernel::identify(file(&bytes)) {
            booted += usize::from(load(&memory, &kernel, None, "", RSDP).is_ok());
        }
    }
    // Both ways out were taken.
    assert!((100..500).contains(&booted), "{booted}");
}

/// The file may change between the checks and the copy: an error, then, not a panic.
#[test]
fn a_kernel_cut_off_after_the_checks_is_an_error() {
    let memory = GuestMemory::from_ranges(&memory::ram_ranges(32 * MIB)).unwrap();
    for bytes in [elf(&[code()]), bzimage()] {
        for length in [0, 0x40, 0x300, 0x1000] {
            let file = file(&bytes);
            let kernel = Kernel::identify(file.try_clone().unwrap()).unwrap();
            file.set_len(length).unwrap();
            // A bzImage is whatever is left of it; everything else fails.
            if let Err(error) = load(&memory, &kernel, None, "", RSDP) {
                assert!(matches!(error, Error::CopyKernel { .. }), "{error}");
            }
        }
    }
}

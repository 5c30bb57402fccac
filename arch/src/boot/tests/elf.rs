//! ELF kernels.

use super::*;

/// A program header: type, address (0: a note), contents, bytes in memory.
pub(super) struct Part(pub u32, pub u64, pub Vec<u8>, pub u64);

pub(super) const LOAD: u32 = 1;
const NOTE: u32 = 4;

pub(super) fn code() -> Part {
    Part(LOAD, 2 * MIB, vec![0x90; 0x1234], 0x3_0000)
}

pub(super) fn elf(parts: &[Part]) -> Vec<u8> {
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
        bytes.extend(
            [offset, *address, *address, size, *memory_size, 4]
                .map(u64::to_le_bytes)
                .as_flattened(),
        );
        contents.extend_from_slice(data);
    }
    bytes.extend(contents);
    bytes
}

pub(super) fn note(kind: u32, name: &[u8], desc: &[u8], align: usize) -> Vec<u8> {
    let mut note =
        [name.len() as u32, desc.len() as u32, kind].map(u32::to_le_bytes).as_flattened().to_vec();
    for part in [name, desc] {
        note.extend(part);
        note.resize(12 + (note.len() - 12).next_multiple_of(align), 0);
    }
    note
}

pub(super) fn pvh_note() -> Vec<u8> {
    note(18, b"Xen\0", &(2 * MIB as u32 + 0x40).to_le_bytes(), 4)
}

pub(super) fn notes(bytes: Vec<u8>) -> Part {
    Part(NOTE, 0, bytes, 0)
}

#[test]
fn an_elf_kernel_without_a_note_enters_in_64_bit_mode() {
    let kernel = parse(elf(&[code()]));
    assert_eq!((kernel.protocol, kernel.cmdline_limit), (Protocol::Linux64, 2047));
    let plan = planned(&kernel, 32 * MIB, None);
    assert_eq!(
        plan.entry,
        Entry {
            protocol: Protocol::Linux64,
            ip: GuestAddress(2 * MIB + 0x10),
            start: layout::ZERO_PAGE
        }
    );
    assert_eq!(plan.kernel, [range(64 + 56, 2 * MIB, 0x1234)]);
    assert_eq!(read::<[u8; 14]>(&plan, layout::CMDLINE), *b"console=ttyS0\0");

    let params: boot_params = read(&plan, layout::ZERO_PAGE);
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
                notes(
                    [
                        note(5, b"GNU\0", b"a", 8),
                        note(18, b"Xen\0", &0x20_0040u64.to_le_bytes(), 8),
                    ]
                    .concat(),
                ),
            ],
        ),
    ];
    for (name, parts) in tables {
        // The other entry does not matter then.
        let elf = patched(elf(&parts), 24, &0xffff_ffff_8038_0000_u64.to_le_bytes());
        let kernel = parse(elf);
        assert_eq!(kernel.protocol, Protocol::Pvh, "{name}");
        assert_eq!(
            planned(&kernel, 32 * MIB, None).entry,
            Entry {
                protocol: Protocol::Pvh,
                ip: GuestAddress(2 * MIB + 0x40),
                start: layout::PVH_START_INFO
            },
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
        let kernel = parse(elf(&[code(), notes(bytes)]));
        assert_eq!(kernel.protocol, Protocol::Linux64, "{name}");
    }
}

#[test]
fn pvh_start_structures_describe_memory_and_initrd() {
    let kernel = parse(elf(&[code(), notes(pvh_note())]));
    let memory = (3 << 30) + 64 * MIB;
    let plan = planned(&kernel, memory, Some(0x1801));
    let info: hvm_start_info = read(&plan, layout::PVH_START_INFO);
    assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 0));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (0xe_0000, 0x2_0000));
    assert_eq!((info.nr_modules, info.memmap_entries), (1, 6));
    let module: hvm_modlist_entry = read(&plan, GuestAddress(info.modlist_paddr));
    // On a page, as high below the hole as it goes.
    assert_eq!((module.paddr, module.size), (0xc000_0000 - 0x2000, 0x1801));
    assert_eq!(plan.initrd, Some(range(0, 0xc000_0000 - 0x2000, 0x1801)));
    let map: [u64; 6 * 3] = read(&plan, GuestAddress(info.memmap_paddr));
    let expected = machine(memory).memory_map;
    let expected = expected.iter().flat_map(|range| [range.start, range.size, range.kind as u64]);
    assert!(map.into_iter().eq(expected));

    let mut spec = machine(32 * MIB).spec;
    spec.acpi = false;
    let without = super::plan(&MachineLayout::new(spec), &kernel, None, "").unwrap();
    let info: hvm_start_info = read(&without, layout::PVH_START_INFO);
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
        (
            "shared",
            patched(good(), kind, &[3]),
            "a shared library or a position-independent program",
        ),
        ("core", patched(good(), kind, &[4]), "a core dump"),
        ("type", patched(good(), kind, &[9]), "damaged (type 9)"),
        (
            "interpreter",
            elf(&[code(), Part(3, 0, b"/lib/ld.so\0".to_vec(), 0)]),
            "an ordinary program",
        ),
        ("empty", elf(&[]), "damaged (nothing to load)"),
        ("header size", patched(good(), 54, &[55]), "damaged (program headers of 55 bytes"),
        ("header place", patched(good(), 32, &[8]), "damaged (program headers of 56 bytes at 0x8)"),
        ("header count", patched(good(), 56, &[0xff, 0xff]), "damaged (65535 program headers"),
        (
            "headers beyond",
            patched(good(), 32, &u64::MAX.to_le_bytes()),
            "truncated: its program header table",
        ),
        (
            "entry",
            patched(elf(&[code()]), 24, &[0; 8]),
            "damaged (its entry point 0x0 is not in a loaded segment)",
        ),
        (
            "PVH entry",
            elf(&[code(), notes(note(18, b"Xen\0", &[7; 4], 4))]),
            "its PVH entry point 0x7070707",
        ),
        (
            "file > memory",
            elf(&[Part(LOAD, 2 * MIB, vec![0; 100], 99)]),
            "more bytes in the file than in memory",
        ),
        (
            "overlap",
            elf(&[code(), Part(LOAD, 2 * MIB + 0x2_ffff, vec![0], 1)]),
            "two segments overlap at 0x22ffff",
        ),
        (
            "nested",
            elf(&[code(), Part(LOAD, 3 * MIB, vec![0], 9), Part(LOAD, MIB, vec![0], 9 * MIB)]),
            "two segments overlap at 0x200000",
        ),
        ("wraps", elf(&[Part(LOAD, u64::MAX - 9, vec![0], 100)]), "wraps around"),
        ("low", elf(&[Part(LOAD, 0x7000, vec![0], 100)]), "loaded at 0x7000, below 1 MiB"),
        (
            "offset",
            patched(good(), first_segment + 8, &u64::MAX.to_le_bytes()),
            "truncated: its loaded segment",
        ),
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

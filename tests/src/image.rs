//! Kernel images around the small guests.

use crate::guest::{BASE, Program};

/// Offset of `e_machine` in an ELF header.
pub const ELF_MACHINE: usize = 18;
/// Offset of the class (1: 32 bits, 2: 64 bits) in an ELF header.
pub const ELF_CLASS: usize = 4;
/// Offset of the first program header in the images made here; it is the one that loads.
pub const ELF_LOAD: usize = 64;
/// Offset of `p_paddr` in a program header.
pub const P_PADDR: usize = 24;
/// Offset of `p_filesz` in a program header.
pub const P_FILESZ: usize = 32;
/// Offset of `p_memsz` in a program header.
pub const P_MEMSZ: usize = 40;

/// Bytes in an ELF program header.
const PROGRAM_HEADER: usize = 56;
/// Where the code begins in the file.
const CODE: usize = 0x1000;

/// XEN_ELFNOTE_PHYS32_ENTRY (xen.git xen/include/public/elfnote.h).
const NOTE_PHYS32_ENTRY: u32 = 18;

/// An ELF vmlinux with a PVH note that names `program` as its entry.
pub fn pvh(program: Program) -> Vec<u8> {
    pvh_code(Program::code(), entry(program))
}

/// An ELF vmlinux of `code`, for [`BASE`], with a PVH note that names `entry`.
pub fn pvh_code(code: &[u8], entry: u64) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, NOTE_PHYS32_ENTRY] {
        note.extend_from_slice(&u32::to_le_bytes(word));
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes()[..4]);
    elf(code, entry, Some(&note))
}

/// An ELF vmlinux without a note: entered by the 64-bit Linux boot protocol.
pub fn linux64(program: Program) -> Vec<u8> {
    elf(Program::code(), entry(program), None)
}

fn entry(program: Program) -> u64 {
    BASE + u64::from(program.offset())
}

fn elf(code: &[u8], entry: u64, note: Option<&[u8]>) -> Vec<u8> {
    let mut image = vec![0; CODE];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01"); // 64 bits, little-endian, version 1
    put(16, &[2, 0, 62, 0, 1]); // ET_EXEC, EM_X86_64, version 1
    put(24, &entry.to_le_bytes());
    put(32, &64u64.to_le_bytes()); // e_phoff
    put(52, &[64, 0, 56, 0, if note.is_some() { 2 } else { 1 }]); // e_ehsize, e_phentsize, e_phnum
    let mut program_header = |index: usize, kind: u32, offset: u64, address: u64, size: u64| {
        let at = ELF_LOAD + index * PROGRAM_HEADER;
        put(at, &kind.to_le_bytes());
        put(at + 4, &[7]); // readable, writable, executable
        for (field, value) in
            [(8, offset), (16, address), (P_PADDR, address), (32, size), (P_MEMSZ, size), (48, 4)]
        {
            put(at + field, &value.to_le_bytes());
        }
    };
    program_header(0, 1, CODE as u64, BASE, code.len() as u64); // PT_LOAD
    if let Some(note) = note {
        let at = ELF_LOAD + 2 * PROGRAM_HEADER;
        program_header(1, 4, at as u64, 0, note.len() as u64); // PT_NOTE
        put(at, note);
    }
    image.extend_from_slice(code);
    image
}

/// Offset of `loadflags` in a bzImage.
pub const BZ_LOADFLAGS: usize = 0x211;
/// Offset of the boot protocol's version in a bzImage.
pub const BZ_VERSION: usize = 0x206;
/// Offset of `xloadflags` in a bzImage.
pub const BZ_XLOADFLAGS: usize = 0x236;
/// Offset of `cmdline_size`, the bytes of command line that the kernel keeps, in a bzImage.
pub const BZ_CMDLINE_SIZE: usize = 0x238;
/// Offset of `init_size`, the bytes of memory that the kernel needs, in a bzImage.
pub const BZ_INIT_SIZE: usize = 0x260;

/// A bzImage whose 64-bit entry is `program`, which must be position-independent
/// (`Documentation/arch/x86/boot.rst`).
pub fn bzimage(program: Program) -> Vec<u8> {
    let setup_sectors = 1;
    let mut image = vec![0; (setup_sectors + 1) * 512];
    // The protected-mode kernel: the 32-bit entry at its start, the 64-bit one 0x200 bytes in.
    let mut kernel = vec![0; 0x200];
    kernel.push(0xe9); // jmp
    kernel.extend_from_slice(&program.offset().to_le_bytes());
    kernel.extend_from_slice(Program::code());
    kernel.resize(kernel.len().next_multiple_of(16), 0);

    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[u8::try_from(setup_sectors).unwrap()]);
    put(0x1f4, &u32::try_from(kernel.len() / 16).unwrap().to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x66]); // a jump over the header; its target tells where the header ends
    put(0x202, b"HdrS");
    put(BZ_VERSION, &0x20f_u16.to_le_bytes());
    put(BZ_LOADFLAGS, &[1]); // LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1, 21]); // relocatable_kernel, min_alignment (log2)
    put(BZ_XLOADFLAGS, &[1]); // XLF_KERNEL_64
    put(BZ_CMDLINE_SIZE, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000_u64.to_le_bytes()); // pref_address
    put(BZ_INIT_SIZE, &0x10_0000_u32.to_le_bytes());
    image.extend_from_slice(&kernel);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_begin_where_the_table_says() {
        // `jmp guest_spin` to itself, and `movb $42, %al`.
        let code = |program: Program| &Program::code()[program.offset() as usize..][..2];
        assert_eq!(code(Program::Spin), [0xeb, 0xfe]);
        assert_eq!(code(Program::Exit), [0xb0, 42]);
    }
}

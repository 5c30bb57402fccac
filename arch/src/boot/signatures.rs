//! Recognizes by its first bytes what the user gave as a kernel by mistake, and whether a file may be an initrd.
//!
//! A capability: `formats` asks it when no format has recognized a file, and `vmm` before it warns of an initrd.

/// Offset, bytes there, and what the file then is. The first match counts.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, &[0x1f, 0x8b], "a gzip file (unpack it first)"),
    (0, &[0xfd, b'7', b'z', b'X', b'Z', 0], "an xz file (unpack it first)"),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], "a zstd file (unpack it first)"),
    (0, b"BZh", "a bzip2 file (unpack it first)"),
    (0, &[0x04, 0x22, 0x4d, 0x18], "an LZ4 file (unpack it first)"),
    (0, &[0x02, 0x21, 0x4c, 0x18], "an LZ4 file (unpack it first)"),
    (56, b"ARM\x64", "an aarch64 kernel Image"),
    (56, b"RSC\x05", "a RISC-V kernel Image"),
    (0, b"MZ", "an EFI or Windows program"),
    (0, b"07070", "a cpio archive (an initrd?)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"!<arch>\n", "an archive (a Debian package or a library)"),
    (0, b"#!", "a script"),
    (257, b"ustar", "a tar archive"),
    (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
    (510, &[0x55, 0xaa], "a disk image with a boot sector"),
];

/// The first bytes of what Linux unpacks as an initrd: a cpio archive, or one that is compressed (`lib/decompress.c`).
const INITRDS: &[&[u8]] = &[
    b"07070",
    &[0x1f, 0x8b],
    &[0x1f, 0x9e],
    b"BZh",
    &[0x5d, 0, 0],
    &[0xfd, b'7', b'z', b'X', b'Z', 0],
    &[0x89, b'L', b'Z', b'O'],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
];

/// Whether Linux can unpack a file with these first bytes as an initrd. It skips zeros before an archive.
pub fn is_initrd(start: &[u8]) -> bool {
    let zeros = start.iter().take_while(|byte| **byte == 0).count();
    zeros == start.len() || INITRDS.iter().any(|magic| start[zeros..].starts_with(magic))
}

/// The name of the format that a file with these first bytes seems to have.
pub(super) fn describe(start: &[u8]) -> &'static str {
    let known = SIGNATURES
        .iter()
        .find(|(offset, bytes, _)| start.get(*offset..).is_some_and(|at| at.starts_with(bytes)));
    match known {
        Some((_, _, name)) => name,
        None if start.iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')) => {
            "a text file"
        }
        None if start.iter().all(|byte| *byte == 0) => "a file of zeros",
        None => "a file of unknown format",
    }
}

//! What a file that is no kernel looks like: the usual mistakes, by their first bytes.

use std::fs::File;

use super::{Error, read_up_to};

/// Enough to see every signature below.
const LOOK: u64 = 0x1000;

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

/// Names what `file` looks like.
pub(super) fn describe(file: &File) -> Result<&'static str, Error> {
    let start = read_up_to(file, 0, LOOK)?;
    let known =
        SIGNATURES.iter().find(|(offset, bytes, _)| start.get(*offset..).is_some_and(|at| at.starts_with(bytes)));
    Ok(match known {
        Some((_, _, name)) => name,
        None if start.iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')) => "a text file",
        None if start.iter().all(|byte| *byte == 0) => "a file of zeros",
        None => "a file of unknown format",
    })
}

//! Recognizes images of other formats by their first bytes, so that an image is not served as raw by mistake.
//!
//! `open` calls [`refuse`] when `--disk` names no format. The content never decides how an image is used, because a guest can write any
//! header into a raw disk. A raw image that starts like another format is refused until the user adds `format=raw`. Otherwise the guest
//! would see the container's metadata as its disk, and could overwrite it.

use std::io;

use super::bounce::Bounce;
use super::host_file::HostFile;
use super::{OpenReason, SECTOR};

/// The signatures: a format's name, where its first bytes are, and what they are.
const SIGNATURES: [(&str, usize, &[u8]); 11] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),
    ("VHD", 0, b"conectix"),
    ("VHDX", 0, b"vhdxfile"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
];

/// Refuses a file that starts like an image of another format than raw.
pub(super) fn refuse(file: &HostFile) -> Result<(), OpenReason> {
    let mut start = Vec::new();
    let read =
        Bounce::default().read(file, file.unit(), 0, SECTOR, |data| start.extend_from_slice(data));
    match read {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
        _ => {}
    }
    let found = |(_, at, bytes): &&(&str, usize, &[u8])| {
        start.get(*at..).is_some_and(|rest| rest.starts_with(bytes))
    };
    match SIGNATURES.iter().find(found) {
        Some(("qcow2", ..)) => Err(OpenReason::LooksLike("qcow2", "format=qcow2")),
        Some((format, ..)) => Err(OpenReason::LooksLike(
            format,
            "convert it with `qemu-img convert -O qcow2 FILE NEW`",
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::rig::refusal;
    use crate::disk::{CacheMode, Format, OpenOptions, open};

    #[test]
    fn an_image_of_another_format_is_refused_unless_raw_is_spelled_out() {
        let directory =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = directory.path().join("image");
        for (format, at, bytes) in SIGNATURES {
            let mut content = vec![0; 65536];
            content[at..at + bytes.len()].copy_from_slice(bytes);
            std::fs::write(&path, &content).unwrap();
            let plain = OpenOptions { locking: false, ..OpenOptions::new(&path) };
            let ways = [
                plain.clone(),
                OpenOptions { read_only: true, ..plain.clone() },
                OpenOptions { snapshot: true, ..plain.clone() },
                OpenOptions { cache: CacheMode::None, ..plain.clone() },
            ];
            for options in ways {
                let refused = refusal(&options);
                if refused.contains("O_DIRECT") {
                    continue;
                }
                assert!(refused.contains(&format!("looks like a {format} image")), "{refused}");
                assert!(refused.contains("format=raw"), "{refused}");
                let spelled_out = OpenOptions { format: Some(Format::Raw), ..options };
                assert!(open(&spelled_out).is_ok());
            }
            assert!(std::fs::read(&path).unwrap() == content, "opening changed the image");
        }
        // A signature elsewhere means nothing.
        let mut content = vec![0; 65536];
        content[512..516].copy_from_slice(b"QFI\xfb");
        std::fs::write(&path, &content).unwrap();
        assert!(open(&OpenOptions::new(&path)).is_ok());
    }
}

//! Files without a name, whose data goes with their last descriptor: for `snapshot=on`, and for the images that `cli` makes of
//! directories.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A new file without a name, for data that ends with its last descriptor, and the directory that was chosen for it: TMPDIR or, if that
/// is unset or empty, /var/tmp as in QEMU, since /tmp may be in memory and small.
pub fn create(tmpdir: Option<OsString>) -> (PathBuf, io::Result<File>) {
    let directory = tmpdir.filter(|directory| !directory.is_empty());
    let directory = directory.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let open = |path: &Path, flags| {
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(rustix::fs::CWD, path, flags, Mode::RUSR | Mode::WUSR)
    };
    let file = open(&directory, OFlags::TMPFILE).or_else(|_| {
        // Not every file system has O_TMPFILE (overlayfs before Linux 6.3, vfat, 9p).
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty())?;
        let path = directory.join(format!(".minivmm-{:016x}", u64::from_ne_bytes(name)));
        let file = open(&path, OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW)?;
        rustix::fs::unlink(&path)?;
        Ok(file)
    });
    (directory, file.map(File::from).map_err(|error: Errno| error.into()))
}

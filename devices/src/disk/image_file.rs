//! Opens the file of an image as `--disk` says: locked, so that no other QEMU or minivmm writes it meanwhile, and with what direct
//! I/O on it requires.
//!
//! A capability: a [`HostFile`] is used without knowing either. `open` and the formats open their files here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::host_file::{FileKind, HostFile};
use super::lock::{self, LockError};
use super::{OpenOptions, OpenReason, direct};

/// Opens `path` with the cache mode and locking of `options`.
pub(super) fn open(
    path: &Path,
    writable: bool,
    options: &OpenOptions,
) -> Result<HostFile, OpenReason> {
    let mut file = HostFile::open(path, writable, options)?;
    if options.locking {
        file.lock = Some(lock(path, &file.file, file.kind, writable)?);
    }
    if options.cache.direct() {
        file.direct = Some(direct::alignment(&file.file, file.kind)?.ok_or(OpenReason::NoDirect)?);
    }
    Ok(file)
}

/// Opens `path` again, locks that description and returns it.
fn lock(path: &Path, file: &File, kind: FileKind, writable: bool) -> Result<File, OpenReason> {
    let claims = kind == FileKind::BlockDevice && writable;
    let access = if claims { OFlags::RDWR } else { OFlags::RDONLY };
    let describe = |flags| {
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK | flags;
        openat(CWD, path, flags, Mode::empty())
    };
    let exclude = |description: &OwnedFd| {
        lock::lock(description, writable).map_err(|error| match error {
            LockError::Held => OpenReason::Locked,
            LockError::Host(error) => OpenReason::CannotLock(error),
        })
    };
    // O_EXCL without O_CREAT claims a block device: open(2) fails with EBUSY while the host has it mounted.
    let claim = if claims { OFlags::EXCL } else { OFlags::empty() };
    let description = describe(claim).or_else(|error| match error {
        // Another minivmm or QEMU claims it too, but also holds the lock, which tells the two cases apart.
        Errno::BUSY => exclude(&describe(OFlags::empty())?).and(Err(OpenReason::Mounted)),
        error => Err(error.into()),
    })?;
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    if identity(rustix::fs::fstat(&description)?) != identity(rustix::fs::fstat(file)?) {
        return Err(OpenReason::Changed);
    }
    exclude(&description)?;
    Ok(description.into())
}

//! Opens the file of an image as `--disk` says. Locks it, so that no other QEMU or minivmm writes it, and finds out what direct I/O on it
//! requires. Also derives the sizes that the disk announces from those of the file system (statvfs(3)).
//!
//! A capability: code that uses a [`HostFile`] knows none of this. `open` and the formats open their files here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::host_file::{FileKind, HostFile};
use super::lock::{self, LockError};
use super::{BlockLimits, FileError, OpenOptions, OpenReason, SECTOR, direct};

/// Opens `path` with the cache mode and locking of `options`.
pub(super) fn open(
    path: &Path,
    writable: bool,
    options: &OpenOptions,
) -> Result<HostFile, OpenReason> {
    let direct = options.cache.direct();
    let mut file = HostFile::open(path, writable, options).map_err(|error| match error {
        // The error of a file system that does not support O_DIRECT. A path that no file can have gives it, too.
        FileError::Host(error)
            if direct && error.raw_os_error() == Some(libc::EINVAL) && path.exists() =>
        {
            OpenReason::NoDirect
        }
        error => error.into(),
    })?;
    if options.locking {
        file.lock = Some(lock(path, &file.file, file.kind, writable)?);
    }
    if direct {
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
        return Err(FileError::Changed.into());
    }
    exclude(&description)?;
    Ok(description.into())
}

/// Refuses an image without a whole sector, and warns about one whose last sector is incomplete.
pub(super) fn check_length(path: &Path, length: u64) -> Result<(), OpenReason> {
    let (sectors, rest) = (length / SECTOR, length % SECTOR);
    if sectors == 0 {
        return Err(OpenReason::TooSmall(length));
    }
    if rest != 0 {
        tracing::warn!(
            "disk image {path:?}: {length} bytes are no whole number of 512-byte sectors; the guest sees {sectors} sectors and not the last {rest} bytes"
        );
    }
    Ok(())
}

/// Refuses a writable image that direct I/O could not write to its end.
pub(super) fn check_tail(file: &HostFile, length: u64) -> Result<(), OpenReason> {
    let unit = file.unit();
    let ends_on_unit = length.is_multiple_of(u64::from(unit));
    ends_on_unit.then_some(()).ok_or(OpenReason::DirectTail { length, unit })
}

impl HostFile {
    /// The sizes that a disk should announce whose bytes are the file's. `discard`: the guest's discards reach the file.
    pub(super) fn limits(&self, discard: bool) -> BlockLimits {
        let unit = rustix::fs::fstatvfs(&self.file).map_or(4096, |status| status.f_frsize);
        let unit = match unit.clamp(SECTOR, 4096) as u32 {
            unit if unit.is_power_of_two() => unit,
            _ => SECTOR as u32,
        };
        // Direct I/O below its unit is read-modify-write: 512 bytes work, but the guest had better align.
        let physical_block_size = self.unit().max(unit);
        BlockLimits {
            logical_block_size: SECTOR as u32,
            physical_block_size,
            alignment_offset: 0,
            min_io_size: physical_block_size,
            opt_io_size: 0,
            discard_granularity: if discard { unit } else { 0 },
            secure_erase: false,
        }
    }
}

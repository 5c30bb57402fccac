//! The file behind an image: what may be opened at all, how, and the lock that keeps others away from it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::bounce::Alignment;
use super::lock::{self, LockError};
use super::raw::Kind;
use super::{OpenOptions, OpenReason, limits};

/// An open and locked file or block device.
pub(super) struct HostFile {
    pub(super) file: File,
    pub(super) kind: Kind,
    /// What direct I/O asks for, if the file is open for it.
    pub(super) direct: Option<Alignment>,
    /// Others are kept away as long as this is open.
    pub(super) lock: Option<File>,
}

impl HostFile {
    /// Opens `path` as `options` say of the cache and of locking.
    pub(super) fn open(path: &Path, writable: bool, options: &OpenOptions) -> Result<Self, OpenReason> {
        let direct = options.cache.direct();
        let (file, kind) = open(path, writable, direct)?;
        let lock = match options.locking {
            true => Some(lock(path, &file, kind, writable)?),
            false => None,
        };
        let direct = match direct {
            true => Some(limits::direct_alignment(&file, kind)?.ok_or(OpenReason::NoDirect)?),
            false => None,
        };
        Ok(Self { file, kind, direct, lock })
    }
}

/// Opens the file behind an image.
fn open(path: &Path, writable: bool, direct: bool) -> Result<(File, Kind), OpenReason> {
    // Look before opening: opening some devices (a watchdog, a tape) does something.
    let kind = disk_kind(rustix::fs::stat(path)?.st_mode)?;
    let mut flags = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    flags |= OFlags::CLOEXEC | OFlags::NOCTTY;
    if kind == Kind::Regular {
        // Should the path have become a fifo meanwhile, do not wait for its other end.
        flags |= OFlags::NONBLOCK;
    }
    if direct {
        flags |= OFlags::DIRECT;
    }
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::ACCESS | Errno::PERM => OpenReason::Permission { writable },
        // What a file system without O_DIRECT says.
        Errno::INVAL if direct => OpenReason::NoDirect,
        error => error.into(),
    })?;
    if disk_kind(rustix::fs::fstat(&file)?.st_mode)? != kind {
        return Err(changed());
    }
    // O_NONBLOCK has done its part; io_uring would take it for "fail rather than wait".
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok((file.into(), kind))
}

/// Locks an open image for as long as the returned description of it is open. It is one of its own, which no
/// io_uring gets: what that has registered stays open for a moment after its process has ended, and whoever starts the same
/// machine again would find its disk in use.
fn lock(path: &Path, file: &File, kind: Kind, writable: bool) -> Result<File, OpenReason> {
    // Of a device that is to be written, ranges are discarded and zeroed by it.
    let claims = kind == Kind::BlockDevice && writable;
    let access = if claims { OFlags::RDWR } else { OFlags::RDONLY };
    let describe = |flags| {
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK | flags;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let exclude = |description: &OwnedFd| {
        lock::lock(description, writable).map_err(|error| match error {
            LockError::Held => OpenReason::Locked,
            LockError::Host(error) => OpenReason::CannotLock(error),
        })
    };
    // Not while the host has the device mounted (open(2), O_EXCL without O_CREAT).
    let alone = if claims { OFlags::EXCL } else { OFlags::empty() };
    let description = describe(alone).or_else(|error| match error {
        // Or is it another of our kind that has it?
        Errno::BUSY => exclude(&describe(OFlags::empty())?).and(Err(OpenReason::Mounted)),
        error => Err(error.into()),
    })?;
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    if identity(rustix::fs::fstat(&description)?) != identity(rustix::fs::fstat(file)?) {
        return Err(changed());
    }
    exclude(&description)?;
    Ok(description.into())
}

fn changed() -> OpenReason {
    OpenReason::Host(io::Error::other("changed while it was being opened; try again"))
}

fn disk_kind(mode: u32) -> Result<Kind, OpenReason> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(Kind::Regular),
        FileType::BlockDevice => Ok(Kind::BlockDevice),
        FileType::Directory => Err(OpenReason::NotADisk("directory")),
        FileType::Fifo => Err(OpenReason::NotADisk("fifo")),
        FileType::Socket => Err(OpenReason::NotADisk("socket")),
        FileType::CharacterDevice => Err(OpenReason::NotADisk("character device")),
        _ => Err(OpenReason::NotADisk("special file")),
    }
}

//! The file or block device behind an image: how it is opened, and what flushes it.
//!
//! Every format keeps its data in a [`HostFile`]. Opening one creates nothing, changes nothing and waits for nothing.
//! `image_file` reads the limits of a file, and `block_device` those of a block device. The formats and engines read and write
//! with the field `file`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{CWD, FileType, Mode, OFlags, SeekFrom, openat};
use rustix::io::Errno;

use super::OpenOptions;
use super::error::{FileError, is_refusal};
use super::observer::{FileChange, Observer};

/// What direct I/O requires of a transfer, in bytes; both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) memory: u32,
    /// Of offsets and lengths: the unit.
    pub(super) offset: u32,
}

/// What a host file is; nothing else can be a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Regular,
    BlockDevice,
}

/// An open file or block device, which is locked unless `locking=off`. Raw images and every file of a qcow2 chain are built on
/// it. It knows nothing of formats.
#[derive(Debug)]
pub(super) struct HostFile {
    pub(super) file: File,
    pub(super) kind: FileKind,
    /// What direct I/O requires of offsets and addresses, if the file was opened for it (O_DIRECT).
    pub(super) direct: Option<Alignment>,
    /// A second open file description, which holds the lock until it is closed, and claims a writable block device (O_EXCL). It must not
    /// be registered with an io_uring: a registered file stays open for a moment after the process has ended, and a machine that is
    /// started again at once would find its disk locked.
    pub(super) lock: Option<File>,
    /// The errno of the first failed flush of a file that goes through the page cache, else 0. Linux drops data that it could not write,
    /// so the next fdatasync(2) would succeed without it. So every later flush fails with this errno.
    failed_flush: AtomicI32,
    pub(super) observer: Option<Arc<dyn Observer>>,
}

impl HostFile {
    /// Opens `path` with the cache mode of `options`. The caller locks it, and asks what direct I/O requires.
    pub(super) fn open(
        path: &Path,
        writable: bool,
        options: &OpenOptions,
    ) -> Result<Self, FileError> {
        let (file, kind) = open(path, writable, options.cache.direct())?;
        Ok(Self::new(file, kind, None))
    }

    /// Wraps an open file, without a lock.
    pub(super) fn new(file: File, kind: FileKind, direct: Option<Alignment>) -> Self {
        let failed_flush = AtomicI32::new(0);
        Self { file, kind, direct, lock: None, failed_flush, observer: None }
    }

    /// Length in bytes now. Moves the file offset, which no transfer uses.
    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    /// Bytes that a transfer has to start and end on: the unit of direct I/O, or 1.
    pub(super) fn unit(&self) -> u32 {
        self.direct.map_or(1, |alignment| alignment.offset)
    }

    /// Makes completed writes durable. After one failure it always fails, except with direct I/O. There the data is still in the
    /// device's cache, and a later flush that succeeds covers it.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.check_flushed(Ok(()))?;
        let flush = || match rustix::fs::fdatasync(&self.file) {
            // A seccomp filter may allow only one of the two.
            Err(error) if is_refusal(&error.into()) => rustix::fs::fsync(&self.file),
            result => result,
        };
        let change = self.begin(FileChange::Sync);
        let result = rustix::io::retry_on_intr(flush);
        self.end(change, result.is_ok());
        self.check_flushed(result.map_err(io::Error::from))
    }

    /// Reports to the observer that a change is about to be made. Returns the observer's number for the change, to be passed to
    /// `end`. `None`: there is no observer.
    pub(super) fn begin(&self, change: FileChange<'_>) -> Option<usize> {
        waypoint!();
        self.observer.as_ref().map(|observer| observer.begin(change))
    }

    pub(super) fn end(&self, number: Option<usize>, succeeded: bool) {
        if let (Some(observer), Some(number)) = (&self.observer, number) {
            observer.end(number, succeeded);
        }
    }

    /// Turns the `result` of a flush into what the caller gets: an error if this flush or an earlier one has failed.
    pub(super) fn check_flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if let (Err(error), None) = (&result, self.direct)
            && !is_refusal(error)
        {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            // The first error stays.
            let _ =
                self.failed_flush.compare_exchange(0, errno, Ordering::Relaxed, Ordering::Relaxed);
        }
        match self.failed_flush.load(Ordering::Relaxed) {
            0 => result,
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Whether the file is in memory (tmpfs or ramfs, linux/magic.h), so that no call on it waits for a device.
    pub(super) fn in_memory(&self) -> bool {
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        const RAMFS_MAGIC: i64 = 0x8584_58f6;
        self.kind == FileKind::Regular
            && rustix::fs::fstatfs(&self.file)
                .is_ok_and(|status| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&status.f_type))
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(path: &Path, writable: bool, direct: bool) -> Result<(File, FileKind), FileError> {
    // The kind is checked before opening, because opening some devices (a watchdog, a tape) has effects.
    let kind = file_kind(rustix::fs::stat(path)?.st_mode)?;
    let mut flags = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    flags |= OFlags::CLOEXEC | OFlags::NOCTTY;
    if kind == FileKind::Regular {
        // If the path has become a fifo meanwhile, open(2) must not wait for a process at its other end.
        flags |= OFlags::NONBLOCK;
    }
    if direct {
        flags |= OFlags::DIRECT;
    }
    let file = openat(CWD, path, flags, Mode::empty()).map_err(|error| match error {
        Errno::ACCESS | Errno::PERM => FileError::Permission { writable },
        error => error.into(),
    })?;
    if file_kind(rustix::fs::fstat(&file)?.st_mode)? != kind {
        return Err(FileError::Changed);
    }
    // O_NONBLOCK was for open(2) only. With it, io_uring would fail a transfer that has to wait.
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok((file.into(), kind))
}

fn file_kind(mode: u32) -> Result<FileKind, FileError> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(FileKind::Regular),
        FileType::BlockDevice => Ok(FileKind::BlockDevice),
        FileType::Directory => Err(FileError::NotADisk("directory")),
        FileType::Fifo => Err(FileError::NotADisk("fifo")),
        FileType::Socket => Err(FileError::NotADisk("socket")),
        FileType::CharacterDevice => Err(FileError::NotADisk("character device")),
        _ => Err(FileError::NotADisk("special file")),
    }
}

//! Why a transfer failed, and why an image cannot be opened. Both are made from the host's errors here, so that all formats and
//! engines agree.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use rustix::io::Errno;

/// Why a transfer failed. Virtio has one status for most of these; the error policy tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The host reports this errno. It is EIO if another program has truncated the file.
    #[error("host I/O error: {}", std::io::Error::from_raw_os_error(*.0))]
    Host(i32),
    /// The host has no space left (ENOSPC, EDQUOT): an error of its own, because the error policy `enospc` waits for space.
    #[error("no space left on the host")]
    NoSpace,
    /// The disk or its host cannot do this operation at all, whatever the range.
    #[error("operation not supported by this disk")]
    Unsupported,
    /// The transfer reaches past the disk's capacity, or a range lies outside guest memory: the guest's mistake.
    #[error("out of range")]
    OutOfRange,
}

impl From<io::Error> for DiskError {
    fn from(error: io::Error) -> Self {
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, _) => Self::NoSpace,
            (io::ErrorKind::Unsupported, _) | (_, Some(libc::ENOTTY)) => Self::Unsupported,
            // Without an errno: another program has truncated the file.
            (_, errno) => Self::Host(errno.unwrap_or(libc::EIO)),
        }
    }
}

/// How an image was found to be damaged: it is not written to any more then. QMP's BLOCK_IMAGE_CORRUPTED reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What is wrong.
    pub message: String,
    /// The bytes of the image's file whose access showed the damage.
    pub range: Range<u64>,
}

/// Whether the error may come from a seccomp filter or a shortage of the calling thread instead of the file, so that another
/// system call may do.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EAGAIN | libc::ECANCELED)
    )
}

/// Why an image cannot be a disk: the path; the reason, and what would work, are its source.
#[derive(Debug, thiserror::Error)]
#[error("disk image {path:?}")]
pub struct OpenError {
    /// The file that was refused: the image, or one of the backing files that it builds on.
    pub path: PathBuf,
    /// What is wrong with it and what would help: a [`FileError`], or what a format, a lock or an option objects to. An error of the
    /// host is an [`io::Error`].
    #[source]
    pub reason: Box<dyn std::error::Error + Send + Sync>,
    /// What would help, where the reason has a cause of the host behind it, which a remedy in the message would separate from it.
    pub remedy: Option<&'static str>,
}

/// Why a file of the host cannot be opened as that of an image. The message names the remedy, too.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each message says what its variant means")]
pub enum FileError {
    #[error(
        "no such file; create one with `truncate -s 8G FILE` or give the path of an existing image"
    )]
    Missing,
    #[error("is a {0}; a disk is a regular file or a block device")]
    NotADisk(&'static str),
    #[error("permission denied; {}", permission_hint(*.writable))]
    Permission { writable: bool },
    #[error(
        "the host can only read it; use readonly=on, or snapshot=on for a disk whose writes vanish"
    )]
    ReadOnlyHost,
    #[error("changed while it was being opened; try again")]
    Changed,
    #[error(transparent)]
    Host(#[from] io::Error),
}

fn permission_hint(writable: bool) -> &'static str {
    if writable {
        "make it readable and writable for this user, or use readonly=on"
    } else {
        "make it readable for this user"
    }
}

impl From<Errno> for FileError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT => Self::Missing,
            Errno::ROFS => Self::ReadOnlyHost,
            error => Self::Host(error.into()),
        }
    }
}

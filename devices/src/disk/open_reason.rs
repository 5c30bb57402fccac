//! What locks, formats and options find wrong with an image, each with what would help.
//!
//! A capability: the core knows of an [`OpenError`] only that it has a reason. It hooks in as that reason: `open` and what it calls
//! return an [`OpenReason`], and [`OpenReason::of`] makes it the reason why one file was refused. What is wrong with every file is a
//! [`FileError`].

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::error::{FileError, OpenError};

/// What is wrong with an image. The message names the remedy, too; where the host has refused something, its error is the
/// source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its variant means")]
pub enum OpenReason {
    #[error(
        "is {0} bytes long, less than one 512-byte sector; make it larger, for example with `truncate -s 8G FILE`"
    )]
    TooSmall(u64),
    #[error(
        "is in use by another program, or twice in this machine; a disk has any number of readers, or one writer: stop the other one, use readonly=on for both, or locking=off if you must"
    )]
    Locked,
    #[error(
        "the host uses this device (mounted, or part of a volume); unmount it, use readonly=on, or locking=off if you must"
    )]
    Mounted,
    #[error("cannot be locked")]
    CannotLock(#[source] io::Error),
    #[error(
        "cannot bypass the page cache here (no O_DIRECT); use cache=writeback or cache=writethrough"
    )]
    NoDirect,
    #[error(
        "is {length} bytes long, and with cache=none or directsync a writable image must be a multiple of {unit} here; use cache=writeback, or enlarge it with `truncate -s %{unit} FILE`"
    )]
    DirectTail { length: u64, unit: u32 },
    #[error(
        "cannot take SCSI commands; scsi=on needs a whole SCSI disk of the host (such as /dev/sda, not a partition or volume), format=raw, and no snapshot=on"
    )]
    NotScsi,
    #[error(
        "builds on the backing file {0:?}; use backing=on if you trust the image to choose files of this host"
    )]
    Backing(String),
    #[error(
        "does not call its backing file {0:?} raw or qcow2, and formats are not guessed; say it with `qemu-img rebase -u -b FILE -F FORMAT IMAGE`"
    )]
    BackingFormat(String),
    #[error(
        "builds on {0:?}, which only QEMU understands; name the file itself with `qemu-img rebase -u -b FILE -F FORMAT IMAGE`"
    )]
    BackingProtocol(String),
    #[error(
        "is the end of a chain of more than {0} backing files; shorten it with `qemu-img commit` or `qemu-img convert`"
    )]
    BackingChain(usize),
    #[error("looks like a {0} image; use format=raw if the guest is to have its bytes, or {1}")]
    LooksLike(&'static str, &'static str),
    #[error(
        "detect-zeroes=unmap needs discard=unmap; use detect-zeroes=on to keep blocks allocated"
    )]
    UnmapWithoutDiscard,
    #[error("is not a qcow2 image; use format=raw if its bytes are the disk's")]
    NotQcow2,
    #[error("{0}, which is not supported; convert it with `qemu-img convert -O qcow2`")]
    Qcow2Feature(&'static str),
    #[error("{0}; repair it with `qemu-img check -r all IMAGE`, or use readonly=on")]
    Qcow2Repair(&'static str),
    #[error("is not usable as qcow2")]
    Qcow2(#[source] io::Error),
    #[error("cannot keep the writes of snapshot=on in {}", directory.display())]
    Overlay { directory: PathBuf, source: io::Error },
    #[error("the host refuses the system call {0}(2), which this format needs")]
    Refused(&'static str, #[source] io::Error),
    #[error(transparent)]
    File(#[from] FileError),
}

impl OpenReason {
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::CannotLock(_) => {
                Some("use locking=off and make sure that no other program writes the image")
            }
            Self::Qcow2(_) => Some(
                "`qemu-img check` may tell more, and `qemu-img check -r all` may repair the image",
            ),
            Self::File(FileError::Host(error)) if error.raw_os_error() == Some(libc::ENOTDIR) => {
                Some("check the path")
            }
            Self::Overlay { .. } => Some("set TMPDIR to a directory with space"),
            _ => None,
        }
    }

    /// Makes this the reason why `path` was refused.
    pub(super) fn of(self, path: &Path) -> OpenError {
        let (path, remedy) = (path.to_owned(), self.remedy());
        let reason = match self {
            Self::File(FileError::Host(error)) => error.into(),
            reason => reason.into(),
        };
        OpenError { path, reason, remedy }
    }
}

impl OpenError {
    /// What a lock, a format or an option objects to. `None`: the host refuses the file.
    pub fn objection(&self) -> Option<&OpenReason> {
        self.reason.downcast_ref()
    }
}

impl From<Errno> for OpenReason {
    fn from(error: Errno) -> Self {
        FileError::from(error).into()
    }
}

impl From<io::Error> for OpenReason {
    fn from(error: io::Error) -> Self {
        FileError::from(error).into()
    }
}

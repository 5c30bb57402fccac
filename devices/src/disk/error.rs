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

impl DiskError {
    /// The text of strerror(3) for the nearest errno, as QEMU's `BLOCK_IO_ERROR` has it.
    pub fn strerror(self) -> String {
        let errno = match self {
            Self::Host(errno) => errno,
            Self::NoSpace => libc::ENOSPC,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::OutOfRange => libc::EINVAL,
        };
        let text = io::Error::from_raw_os_error(errno).to_string();
        text.split(" (os error").next().unwrap_or_default().to_owned()
    }
}

impl From<io::Error> for DiskError {
    fn from(error: io::Error) -> Self {
        match (error.raw_os_error(), error.kind()) {
            (Some(libc::ENOSPC | libc::EDQUOT), _) | (None, io::ErrorKind::StorageFull) => {
                Self::NoSpace
            }
            (Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY), _)
            | (None, io::ErrorKind::Unsupported) => Self::Unsupported,
            (Some(errno), _) => Self::Host(errno),
            // Another program has truncated the file.
            (None, _) => Self::Host(libc::EIO),
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
    /// What is wrong with it and what would help.
    #[source]
    pub reason: OpenReason,
}

/// What is wrong with an image. The message names the remedy, too; where the host has refused something, its error is the
/// source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its variant means")]
pub enum OpenReason {
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
    #[error("changed while it was being opened; try again")]
    Changed,
    #[error(transparent)]
    Host(io::Error),
}

impl OpenReason {
    /// What would help, where the message has a cause of the host behind it, which a remedy in the message would separate
    /// from it.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::CannotLock(_) => {
                Some("use locking=off and make sure that no other program writes the image")
            }
            Self::Qcow2(_) => Some(
                "`qemu-img check` may tell more, and `qemu-img check -r all` may repair the image",
            ),
            Self::Overlay { .. } => Some("set TMPDIR to a directory with space"),
            _ => None,
        }
    }
}

fn permission_hint(writable: bool) -> &'static str {
    if writable {
        "make it readable and writable for this user, or use readonly=on"
    } else {
        "make it readable for this user"
    }
}

impl From<Errno> for OpenReason {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            Errno::ROFS => Self::ReadOnlyHost,
            error => Self::Host(error.into()),
        }
    }
}

impl From<io::Error> for OpenReason {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

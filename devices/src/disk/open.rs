//! From a path to a disk: what can be told before any guest runs. Opening never creates, changes or waits for anything.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::engine::ImageDisk;
use super::file::HostFile;
use super::image::Image;
use super::qcow2::Qcow2Image;
use super::raw::{Kind, Policy, RawFile};
use super::{DiscardMode, Disk, Format, OpenOptions, SECTOR, scsi};

/// Why an image cannot be a disk: one line with the path, the reason, and what would work. The line already quotes its
/// cause, so print it alone, without walking the chain.
#[derive(Debug, thiserror::Error)]
#[error("disk image {path:?}: {reason}")]
pub struct OpenError {
    /// The image, or the backing file of one, that was refused.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub reason: OpenReason,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenReason {
    /// There is nothing at the path.
    #[error("no such file; create one with `truncate -s 8G FILE` or give the path of an existing image")]
    Missing,
    /// There is something that cannot be a disk.
    #[error("is a {0}; a disk is a regular file or a block device")]
    NotADisk(&'static str),
    /// The user may not open it like this.
    #[error("permission denied; {}", permission_hint(*.writable))]
    Permission {
        /// Writing was asked for.
        writable: bool,
    },
    /// The file system or device is read-only.
    #[error("the host can only read it; use readonly=on, or snapshot=on for a disk whose writes vanish")]
    ReadOnlyHost,
    /// Less than a sector.
    #[error("is {0} bytes long, less than one 512-byte sector; make it larger, for example with `truncate -s 8G FILE`")]
    TooSmall(u64),
    /// Another program, or another disk of this machine, has it open.
    #[error(
        "is in use by another program, or twice in this machine; a disk has two readers or one writer: stop the other one, use readonly=on for both, or locking=off if you must"
    )]
    Locked,
    /// The host itself uses the block device.
    #[error(
        "the host uses this device (mounted, or part of a volume); unmount it, use readonly=on, or locking=off if you must"
    )]
    Mounted,
    /// The file system does not lock.
    #[error("cannot be locked ({0}); use locking=off and make sure that nobody else writes it")]
    CannotLock(#[source] io::Error),
    /// O_DIRECT does not work there.
    #[error("cannot bypass the page cache here (no O_DIRECT); use cache=writeback or cache=writethrough")]
    NoDirect,
    /// The last unit of direct I/O is not whole.
    #[error(
        "is {length} bytes long, and with cache=none or directsync a writable image must be a multiple of {unit} here; use cache=writeback, or enlarge it with `truncate -s %{unit} FILE`"
    )]
    DirectTail {
        /// Of the image, in bytes.
        length: u64,
        /// Alignment of direct I/O, in bytes.
        unit: u32,
    },
    /// SCSI commands were asked for where there is nobody to take them.
    #[error(
        "cannot take SCSI commands; scsi=on needs a whole SCSI disk of the host (such as /dev/sda, not a partition or volume), format=raw, and no snapshot=on"
    )]
    NotScsi,
    /// A qcow2 image that builds on another file, which nobody has allowed.
    #[error("builds on the backing file {0:?}; use backing=on if you trust the image to choose files of this host")]
    Backing(String),
    /// A qcow2 image that leaves the format of its backing file to guesswork.
    #[error(
        "does not call its backing file {0:?} raw or qcow2, and formats are not guessed; say it with `qemu-img rebase -u -b FILE -F FORMAT IMAGE`"
    )]
    BackingFormat(String),
    /// Backing files without end: a loop, most likely.
    #[error(
        "is the end of a chain of more than {0} backing files; shorten it with `qemu-img commit` or `qemu-img convert`"
    )]
    BackingChain(usize),
    /// Not what `format=qcow2` promised.
    #[error("is not a qcow2 image; use format=raw if its bytes are the disk's")]
    NotQcow2,
    /// A qcow2 feature that is not there.
    #[error("{0}, which is not supported; convert it with `qemu-img convert -O qcow2`")]
    Qcow2Feature(&'static str),
    /// A qcow2 image that cannot be used.
    #[error("is not usable as qcow2 ({0}); `qemu-img check` may tell more, and `qemu-img check -r all` may repair it")]
    Qcow2(#[source] io::Error),
    /// There is no place for the temporary overlay.
    #[error("cannot keep the writes of snapshot=on in {directory:?} ({source}); set TMPDIR to a directory with space")]
    Overlay {
        /// Where it was to be.
        directory: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Whatever else the host says.
    #[error("{0}")]
    Host(#[source] io::Error),
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

/// Opens an image as a disk.
///
/// # Errors
/// One line for the user. Nothing has been created or changed then.
pub fn open(options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    let mut locks = Vec::new();
    let image: Box<dyn Image> = match (options.format, options.snapshot && !options.read_only) {
        (Format::Raw, false) => {
            let raw = open_raw(options, &mut locks);
            Box::new(raw.map_err(|reason| OpenError { path: options.path.clone(), reason })?)
        }
        _ if options.scsi => return Err(OpenError { path: options.path.clone(), reason: OpenReason::NotScsi }),
        (_, snapshot) => Box::new(Qcow2Image::open(options, snapshot, &mut locks)?),
    };
    Ok(Arc::new(ImageDisk::new(image, options, locks)))
}

fn open_raw(options: &OpenOptions, locks: &mut Vec<File>) -> Result<RawFile, OpenReason> {
    let HostFile { file, kind, direct, lock } = HostFile::open(&options.path, !options.read_only, options)?;
    let claimed = match &lock {
        Some(lock) if kind == Kind::BlockDevice && !options.read_only => Some(lock.try_clone()?),
        _ => None,
    };
    locks.extend(lock);
    if options.scsi && !scsi::is_scsi_disk(&file) {
        return Err(OpenReason::NotScsi);
    }
    let length = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
    check_length(&options.path, length)?;
    match direct {
        Some(alignment) if !options.read_only && !length.is_multiple_of(u64::from(alignment.offset)) => {
            return Err(OpenReason::DirectTail { length, unit: alignment.offset });
        }
        _ => {}
    }
    let policy = Policy { discard: options.discard == DiscardMode::Unmap, direct };
    Ok(RawFile::new(file, kind, policy)?.claimed(claimed))
}

/// Refuses a disk without a whole sector, and says what a guest will see of one with a broken sector.
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{FileType, Mode};

    use super::*;
    use crate::disk::CacheMode;
    use crate::disk::tests::rig::without_forks;

    fn image(directory: &Path, name: &str, length: u64) -> PathBuf {
        let path = directory.join(name);
        File::create(&path).unwrap().set_len(length).unwrap();
        path
    }

    #[test]
    fn unsuitable_images_are_refused_in_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let dangling = directory.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        let below_a_file = image(directory.path(), "file", 512).join("x");
        let table = [
            (directory.path().join("missing"), "no such file"),
            (dangling, "no such file"),
            (below_a_file, "no such file"),
            (directory.path().into(), "is a directory"),
            (fifo, "is a fifo"),
            (socket, "is a socket"),
            ("/dev/null".into(), "is a character device"),
            (image(directory.path(), "empty", 0), "is 0 bytes long"),
            (image(directory.path(), "small", 511), "is 511 bytes long"),
            (PathBuf::from("nul\0byte"), "Invalid argument"),
        ];
        for (path, reason) in table {
            for read_only in [false, true] {
                let error = open(&OpenOptions { read_only, ..OpenOptions::new(&path) }).err().unwrap().to_string();
                assert!(error.contains(reason), "{error}");
                assert!(error.starts_with(&format!("disk image {path:?}: ")), "{error}");
                assert!(!error.contains('\n'), "{error}");
            }
        }
        assert!(!directory.path().join("missing").exists());
        let plain = OpenOptions { scsi: true, ..OpenOptions::new(image(directory.path(), "plain", 512)) };
        for snapshot in [false, true] {
            let error = open(&OpenOptions { snapshot, ..plain.clone() }).err().unwrap().to_string();
            assert!(error.contains("scsi=on needs a whole SCSI disk") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_file_without_permissions_says_what_would_help() {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), "image", 512);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        if rustix::process::geteuid().is_root() {
            eprintln!("running as root, whom no permission stops: only the wording is tested");
            let error = OpenError { path, reason: OpenReason::Permission { writable: true } }.to_string();
            assert!(error.contains("readonly=on"), "{error}");
            return;
        }
        let error = open(&OpenOptions::new(&path)).err().unwrap().to_string();
        assert!(error.contains("permission denied") && error.contains("readonly=on"), "{error}");
        assert!(open(&OpenOptions { read_only: true, ..OpenOptions::new(&path) }).is_ok());
    }

    #[test]
    fn the_capacity_is_whole_sectors() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        for (length, capacity) in [(512, 512), (513, 512), (1023, 512), (1 << 20, 1 << 20), ((1 << 20) + 511, 1 << 20)]
        {
            let path = image(directory.path(), "image", length);
            assert_eq!(open(&OpenOptions::new(&path)).unwrap().capacity(), capacity);
            assert_eq!(path.metadata().unwrap().len(), length, "opening changed the image");
        }
    }

    #[test]
    fn the_same_image_twice() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), "image", 4096);
        let writer = OpenOptions::new(&path);
        let reader = OpenOptions { read_only: true, ..writer.clone() };
        let unlocked = OpenOptions { locking: false, ..writer.clone() };

        let disk = open(&writer).unwrap();
        for refused in [&writer, &reader] {
            let error = open(refused).err().unwrap().to_string();
            assert!(error.contains("in use by another program, or twice in this machine"), "{error}");
        }
        assert!(open(&unlocked).is_ok());
        drop(disk);

        let _disk = open(&reader).unwrap();
        assert!(open(&reader).is_ok());
        assert!(matches!(open(&writer).err().unwrap().reason, OpenReason::Locked));
    }

    /// What io_uring keeps open a little longer does not keep the lock.
    #[test]
    fn the_lock_is_free_as_soon_as_the_disk_is_dropped() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        let options = OpenOptions::new(image(directory.path(), "image", 4096));
        let memory = crate::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap();
        for _ in 0..10 {
            let disk = open(&options).unwrap();
            drop(disk.engine(memory.clone(), 1).unwrap());
        }
    }

    #[test]
    fn direct_io_and_an_odd_length() {
        // Beside the test's own binary: on a real file system, not perhaps on a tmpfs.
        let directory = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = image(directory.path(), "image", 4096 + 100);
        let options = OpenOptions { cache: CacheMode::None, ..OpenOptions::new(&path) };
        match open(&options).err().map(|error| error.reason) {
            Some(OpenReason::DirectTail { length: 4196, unit }) => assert!(unit >= 512),
            Some(OpenReason::NoDirect) => eprintln!("no O_DIRECT on this file system: nothing to test"),
            other => panic!("{other:?}"),
        }
    }
}

//! Opens a disk as the options of `--disk` say. Chooses the backend for the image's format and the parts of its engines, and refuses
//! combinations that cannot work. The VM calls this before it makes anything else. Opening creates nothing, changes nothing and waits for
//! nothing.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bounce::Bounce;
use super::direct::Direct;
use super::engine::{WorkerEngine, threads, uring};
use super::host_file::{FileKind, HostFile};
use super::job::Job;
use super::observer::Observer;
use super::opened::{Backend, OpenedDisk};
use super::qcow2::Qcow2Image;
use super::raw::blocking::Blocking;
use super::raw::{DirectIo, RawImage};
use super::scsi::is_scsi_disk;
use super::{
    Aio, Corruption, DiscardMode, Disk, DiskError, DiskInfo, Engine, EngineSetup, Format,
    OpenError, OpenOptions, OpenReason, block_device, detect_zeroes, image_file, other_formats,
};

/// Opens an image as a disk.
///
/// # Errors
/// Says in one line what is wrong. Nothing has been created or changed then.
pub fn open(options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    open_observed(options, None)
}

/// As [`open`], with an observer of each change of the image's file.
pub(super) fn open_observed(
    options: &OpenOptions,
    observer: Option<Arc<dyn Observer>>,
) -> Result<Arc<dyn Disk>, OpenError> {
    let refused = |reason: OpenReason| reason.of(&options.path);
    detect_zeroes::check(options).map_err(refused)?;
    // With snapshot=on, the writes of the guest go to a temporary qcow2 image over the one that the user named.
    let overlay = options.snapshot && !options.read_only;
    let (backend, info) = if options.format.unwrap_or_default() == Format::Raw && !overlay {
        open_raw(options, observer).map_err(refused)?
    } else if options.scsi {
        return Err(refused(OpenReason::NotScsi));
    } else {
        let (image, info) = Qcow2Image::open(options, overlay, observer)?;
        (Backend::Qcow2(Box::new(image)), info)
    };
    let is_raw = matches!(backend, Backend::Raw(..));
    let uses_ring = options.aio == Aio::IoUring && is_raw && uring::available();
    let disk = OpenedDisk::new(backend, info, options, uses_ring);
    Ok(detect_zeroes::over(Arc::new(disk), options.detect_zeroes))
}

fn open_raw(
    options: &OpenOptions,
    observer: Option<Arc<dyn Observer>>,
) -> Result<(Backend, DiskInfo), OpenReason> {
    let mut file = image_file::open(&options.path, !options.read_only, options)?;
    file.observer = observer;
    if options.scsi && !is_scsi_disk(&file.file) {
        return Err(OpenReason::NotScsi);
    }
    let length = file.length()?;
    image_file::check_length(&options.path, length)?;
    if options.format.is_none() {
        other_formats::refuse(&file)?;
    }
    if !options.read_only {
        image_file::check_tail(&file, length)?;
    }
    Ok(raw_image(file, options)?)
}

/// The raw image in `file`.
pub(super) fn raw_image(file: HostFile, options: &OpenOptions) -> io::Result<(Backend, DiskInfo)> {
    let discard = options.discard == DiscardMode::Unmap;
    let (block_limits, lifetime) = match file.kind {
        FileKind::Regular => (file.limits(discard), None),
        FileKind::BlockDevice => {
            (block_device::limits(&file, discard)?, block_device::lifetime(&file))
        }
    };
    let direct = file.direct.map(|alignment| Arc::new(Direct::new(alignment)));
    let raw = RawImage::new(file, direct.clone().map(|direct| direct as Arc<dyn DirectIo>))?;
    let backend = Backend::Raw(raw, Blocking::new(block_limits, direct, discard));
    let OpenOptions { read_only, scsi, .. } = *options;
    Ok((backend, DiskInfo { read_only, block_limits, lifetime, scsi, backing_images: Vec::new() }))
}

impl Disk for OpenedDisk {
    fn capacity(&self) -> u64 {
        self.capacity()
    }

    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn first_sector(&self) -> Option<[u8; 512]> {
        self.first_sector()
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        match &self.backend {
            Backend::Raw(image, _) => image.refresh_capacity(),
            Backend::Qcow2(image) => image.refresh_capacity(),
        }
    }

    fn take_corruption(&self) -> Option<Corruption> {
        if let Backend::Qcow2(image) = &self.backend { image.take_corruption() } else { None }
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        match &self.backend {
            _ if self.info.read_only => {
                Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only"))
            }
            Backend::Raw(image, _) => image.resize(bytes),
            Backend::Qcow2(image) => image.resize(bytes),
        }
    }

    fn allocated(&self) -> u64 {
        let status = self.file.as_ref().and_then(|file| rustix::fs::fstat(file).ok());
        status.map_or(0, |status| status.st_blocks as u64 * 512)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.execute(&mut Job::default(), &mut Bounce::default())
    }

    fn engine(self: Arc<Self>, setup: EngineSetup) -> io::Result<Box<dyn Engine>> {
        let depth = setup.depth.max(1) as usize;
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let ring = if self.uses_ring { uring::make(&self, depth, &event)? } else { None };
        let pool = threads::make(&self, depth, &setup, ring.is_some(), &event)?;
        Ok(Box::new(WorkerEngine::new(self, setup.memory, depth, event, ring, pool)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};

    use rustix::fs::{FileType, Mode};

    use super::*;
    use crate::disk::tests::rig::{refusal, without_forks};
    use crate::disk::{CacheMode, FileError};

    fn image(directory: &Path, name: &str, length: u64) -> PathBuf {
        let path = directory.join(name);
        File::create(&path).unwrap().set_len(length).unwrap();
        path
    }

    #[test]
    fn unsuitable_images_are_refused_in_one_line() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let dangling = directory.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        let below_a_file = image(directory.path(), "file", 512).join("x");
        let table = [
            (directory.path().join("missing"), "no such file"),
            (dangling, "no such file"),
            (below_a_file, "Not a directory"),
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
                let error = refusal(&OpenOptions { read_only, ..OpenOptions::new(&path) });
                assert!(error.contains(reason), "{error}");
                assert!(error.starts_with(&format!("disk image {path:?}: ")), "{error}");
                assert!(!error.contains('\n'), "{error}");
            }
        }
        let direct = OpenOptions { cache: CacheMode::None, ..OpenOptions::new("nul\0byte") };
        assert!(refusal(&direct).contains("Invalid argument"));
        assert!(!directory.path().join("missing").exists());
        let plain =
            OpenOptions { scsi: true, ..OpenOptions::new(image(directory.path(), "plain", 512)) };
        for snapshot in [false, true] {
            let error = refusal(&OpenOptions { snapshot, ..plain.clone() });
            assert!(
                error.contains("scsi=on needs a whole SCSI disk") && !error.contains('\n'),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_without_permissions_says_what_would_help() {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), "image", 512);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        if rustix::process::geteuid().is_root() {
            eprintln!("running as root, whom no permission stops: only the wording is tested");
            let error = FileError::Permission { writable: true }.to_string();
            assert!(error.contains("readonly=on"), "{error}");
            return;
        }
        let error = refusal(&OpenOptions::new(&path));
        assert!(error.contains("permission denied") && error.contains("readonly=on"), "{error}");
        assert!(open(&OpenOptions { read_only: true, ..OpenOptions::new(&path) }).is_ok());
    }

    #[test]
    fn the_capacity_is_whole_sectors() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        for (length, capacity) in
            [(512, 512), (513, 512), (1023, 512), (1 << 20, 1 << 20), ((1 << 20) + 511, 1 << 20)]
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
            let error = refusal(refused);
            assert!(
                error.contains("in use by another program, or twice in this machine"),
                "{error}"
            );
        }
        assert!(open(&unlocked).is_ok());
        drop(disk);

        let _disk = open(&reader).unwrap();
        assert!(open(&reader).is_ok());
        assert!(matches!(open(&writer).err().unwrap().objection(), Some(OpenReason::Locked)));
    }

    /// What io_uring keeps open a little longer does not keep the lock.
    #[test]
    fn the_lock_is_free_as_soon_as_the_disk_is_dropped() {
        let _turn = without_forks();
        let directory = tempfile::tempdir().unwrap();
        let options = OpenOptions::new(image(directory.path(), "image", 4096));
        let memory =
            crate::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap();
        for _ in 0..10 {
            let disk = open(&options).unwrap();
            drop(disk.engine(EngineSetup::new(memory.clone(), 1)).unwrap());
        }
    }

    #[test]
    fn direct_io_and_an_odd_length() {
        // Beside the test's own binary: on a real file system, not perhaps on a tmpfs.
        let directory =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = image(directory.path(), "image", 4096 + 100);
        let options = OpenOptions { cache: CacheMode::None, ..OpenOptions::new(&path) };
        match open(&options).err().as_ref().and_then(OpenError::objection) {
            Some(OpenReason::DirectTail { length: 4196, unit }) => assert!(*unit >= 512),
            Some(OpenReason::NoDirect) => {
                eprintln!("no O_DIRECT on this file system: nothing to test")
            }
            other => panic!("{other:?}"),
        }
    }
}

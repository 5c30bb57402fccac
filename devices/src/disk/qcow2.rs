//! qcow2 images and `snapshot=on`, both through the imago crate, whose calls block: engines make them on the pool's threads.
//!
//! Data goes through the calling thread's bounce buffer. imago would make Rust slices of guest memory otherwise, which
//! the guest may write to at any time.

mod header;
mod storage;
mod tables;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder};
use rustix::fs::{Mode, OFlags};

use self::storage::HostStorage;
use self::tables::{Tables, in_place};
use super::bounce::Bounce;
use super::file::HostFile;
use super::image::{Image, Job};
use super::open::check_length;
use super::{DiscardMode, DiskError, Format, Limits, OpenError, OpenOptions, OpenReason, Operation, SECTOR};

/// One layer of a chain, with all below it.
type Layer = FormatAccess<HostStorage>;

/// Most backing files one below the other.
const MAX_CHAIN: usize = 64;

/// A qcow2 image, or any image below a temporary qcow2 overlay.
pub(super) struct Qcow2Image {
    /// Shared for transfers, exclusive for what may free clusters under a transfer's feet.
    top: RwLock<Layer>,
    /// Held, below `top`, by those who take clusters and by those who write the tables back.
    tables: Mutex<Tables>,
    /// Bytes, a multiple of the sector size.
    capacity: AtomicU64,
    /// What can be zeroed without writing zeroes, in bytes.
    cluster: Option<u64>,
    limits: Limits,
    /// Discards reach the image (`discard=unmap`).
    discard: bool,
}

impl Qcow2Image {
    /// Opens the chain of images that `options` name, below a temporary overlay if `overlay` says so. What keeps others
    /// from writing them goes to `locks`.
    pub(super) fn open(options: &OpenOptions, overlay: bool, locks: &mut Vec<File>) -> Result<Self, OpenError> {
        let writable = !options.read_only && !overlay;
        let image = open_layer(&options.path, options.format, writable, options, locks, 0)?;
        let refused = |reason| OpenError { path: options.path.clone(), reason };
        check_length(&options.path, image.size()).map_err(refused)?;
        let top = if overlay { temporary_overlay(image).map_err(refused)? } else { image };
        let discard = options.discard == DiscardMode::Unmap;
        // The clusters of version 2 cannot be given back.
        let cluster = top.inner().zero_granularity();
        let limits = Limits {
            logical_block_size: SECTOR as u32,
            physical_block_size: 4096,
            alignment_offset: 0,
            min_io_size: 4096,
            opt_io_size: 0,
            discard_granularity: cluster.filter(|_| discard).unwrap_or(0) as u32,
            secure_erase: false,
        };
        let capacity = AtomicU64::new(sectors(top.size()));
        let tables = Mutex::new(Tables::new(cluster));
        Ok(Self { top: RwLock::new(top), tables, capacity, cluster, limits, discard })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Layer> {
        self.top.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Layer> {
        self.top.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 {
            let buffer = piece(bounce, job);
            self.shared().read(&mut *buffer, job.offset)?;
            job.fill(buffer);
        }
        Ok(())
    }

    fn write(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 {
            let (buffer, offset) = (piece(bounce, job), job.offset);
            job.take(buffer);
            self.put(buffer, offset)?;
        }
        Ok(())
    }

    /// Writes `data`: beside others where the image has clusters for it, in turn with them where it has not.
    fn put(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let (top, range) = (self.shared(), offset..offset + data.len() as u64);
        if in_place(&top, &range)? {
            return top.write(data, offset);
        }
        let mut tables = self.tables();
        let result = top.write(data, offset);
        tables.settle(&top, range).and(result)
    }

    /// Zeroes that keep their clusters, or give them back.
    fn write_zeroes(&self, job: &mut Job, unmap: bool, bounce: &mut Bounce) -> io::Result<()> {
        // imago 0.2.6 miscalculates zeroing part of an image's last cluster. So it only gets whole clusters, of which the
        // last may be short; what is before and after is written.
        let cluster = self.cluster.unwrap_or(SECTOR);
        let (start, end) = (job.offset, job.end());
        let from = start.next_multiple_of(cluster).min(end);
        let to = if end == self.capacity() { end } else { end - end % cluster }.max(from);
        self.write_plain_zeroes(start..from, bounce)?;
        let result = match unmap && self.discard {
            _ if from == to => Ok(()),
            true => {
                let mut top = self.exclusive();
                let result = top.discard_to_zero(from, to - from);
                self.tables().settle(&top, from..to).and(result)
            }
            false => {
                let (top, mut tables) = (self.shared(), self.tables());
                let result = top.write_zeroes(from, to - from);
                tables.settle(&top, from..to).and(result)
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_plain_zeroes(from..to, bounce)?,
            result => result?,
        }
        self.write_plain_zeroes(to..end, bounce)
    }

    fn write_plain_zeroes(&self, range: Range<u64>, bounce: &mut Bounce) -> io::Result<()> {
        let buffer = bounce.buffer();
        buffer.fill(0);
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(buffer.len() as u64);
            self.put(&buffer[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }

    fn discard(&self, job: &Job) -> io::Result<()> {
        match self.discard {
            // A hint: what cannot be given back stays.
            true => {
                let mut top = self.exclusive();
                let result = top.discard_to_any(job.offset, job.length);
                self.tables().settle(&top, job.offset..job.end())?;
                result.or_else(|error| if error.kind() == io::ErrorKind::Unsupported { Ok(()) } else { Err(error) })
            }
            false => Ok(()),
        }
    }

    /// Metadata that imago still holds goes to the file, and the file to the medium.
    fn flush(&self) -> io::Result<()> {
        let top = self.shared();
        let tables = self.tables();
        top.flush()?;
        drop(tables);
        top.sync()
    }
}

/// Room for the next part of `job`.
fn piece<'a>(bounce: &'a mut Bounce, job: &Job) -> &'a mut [u8] {
    let buffer = bounce.buffer();
    let length = job.length.min(buffer.len() as u64) as usize;
    &mut buffer[..length]
}

fn sectors(bytes: u64) -> u64 {
    bytes - bytes % SECTOR
}

impl Image for Qcow2Image {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        let capacity = sectors(self.shared().size());
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the size must be a multiple of 512 bytes"));
        }
        let mut top = self.exclusive();
        let result = top.resize(bytes, PreallocateMode::Zero);
        // The first-level table may be new, and second-level ones gone.
        *self.tables() = Tables::new(self.cluster);
        top.flush().and(result)?;
        drop(top);
        self.refresh_capacity().map(drop)
    }

    fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        let durable = match job.operation {
            Operation::Read => return Ok(self.read(job, bounce)?),
            Operation::Flush => true,
            Operation::Write { durable } => {
                self.write(job, bounce)?;
                durable
            }
            Operation::WriteZeroes { unmap, durable } => {
                self.write_zeroes(job, unmap, bounce)?;
                durable
            }
            Operation::Discard => return Ok(self.discard(job)?),
            Operation::SecureErase => return Err(DiskError::Unsupported),
        };
        Ok(if durable { self.flush() } else { Ok(()) }?)
    }
}

/// Opens the image at `path` and, if it is one that builds on others, those too.
fn open_layer(
    path: &Path,
    format: Format,
    writable: bool,
    options: &OpenOptions,
    locks: &mut Vec<File>,
    depth: usize,
) -> Result<Layer, OpenError> {
    let refused = |reason| OpenError { path: path.to_owned(), reason };
    let unusable = |error| refused(OpenReason::Qcow2(error));
    if depth > MAX_CHAIN {
        return Err(refused(OpenReason::BackingChain(MAX_CHAIN)));
    }
    let HostFile { file, direct, lock, .. } = HostFile::open(path, writable, options).map_err(refused)?;
    locks.extend(lock);
    let storage = |file: File| HostStorage::new(file, writable, direct).map_err(|error| refused(error.into()));
    if format == Format::Raw {
        return Ok(Layer::new(Raw::open_image(storage(file)?, writable).map_err(|error| refused(error.into()))?));
    }
    header::check(&file, direct).map_err(refused)?;
    // Opening for writing may write, so look first whether the image will do.
    let second = file.try_clone().map_err(|error| refused(error.into()))?;
    let mut image = Qcow2::open_image(storage(second)?, false).map_err(unusable)?;
    if image.requires_external_data_file() {
        return Err(refused(OpenReason::Qcow2Feature("keeps its data in another file")));
    }
    let backing = match image.implicit_backing_file().cloned() {
        Some(name) if !options.backing => return Err(refused(OpenReason::Backing(name))),
        Some(name) => {
            let format = match image.implicit_backing_format().and_then(|word| word.parse().ok()) {
                Some(format) => format,
                None => return Err(refused(OpenReason::BackingFormat(name))),
            };
            let path = path.parent().unwrap_or(Path::new("")).join(name);
            Some(open_layer(&path, format, false, options, locks, depth + 1)?)
        }
        None => None,
    };
    if writable {
        image = Qcow2::open_image(storage(file)?, true).map_err(unusable)?;
    }
    image.set_data_file(None);
    image.set_backing(backing);
    Ok(Layer::new(image))
}

/// A qcow2 image over `base` in a file that has no name, so that it goes when it is closed, however that happens.
fn temporary_overlay(base: Layer) -> Result<Layer, OpenReason> {
    // As QEMU: not /tmp, which may be memory and small.
    let directory = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let create = || -> io::Result<Layer> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&directory, flags, Mode::RUSR | Mode::WUSR)?);
        let storage = HostStorage::new(file, true, None)?;
        let size = sectors(base.size());
        let overlay = Qcow2::create_builder(storage)
            .size(size)
            .create_open(DenyImplicitOpenGate::default(), |storage| Ok(Qcow2::builder(storage).backing(Some(base))))?;
        Ok(Layer::new(overlay))
    };
    create().map_err(|source| OpenReason::Overlay { directory: directory.clone(), source })
}

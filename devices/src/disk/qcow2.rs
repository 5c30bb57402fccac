//! qcow2 images and `snapshot=on`. The crate imago translates offsets of the disk into clusters of the file.
//!
//! imago finds, allocates and copies clusters. Its calls block, so engines make them on the pool's threads. Below imago,
//! [`ordered`] keeps the image on the medium sound at every moment, and refuses writes of the guest to the image's metadata.
//! This file is between a disk and imago. Its rules:
//!
//! - Data is copied through the calling thread's bounce buffer. Otherwise imago would make Rust slices of guest memory, which
//!   the guest may write to at any time.
//! - Writes to allocated clusters go to the file, several at a time. A change of the mapping excludes other changes and flushes
//!   (the lock `allocating`), since a publication needs tables that agree with each other.
//! - An operation that frees clusters excludes all transfers (the lock `top`), because a transfer in flight may still use them.
//! - Zeroes without deallocation zero the file in place, so that they need no metadata.
//!
//! | file | what it does |
//! |---|---|
//! | `header` | says whether an image can be used, before imago sees it |
//! | `chain`, `overlay` | open an image and its backing files, and the temporary overlay of `snapshot=on` |
//! | `ordered`, `metadata`, `publish` | hold metadata back and publish it in order |
//! | `storage` | a host file as imago sees it |

mod chain;
mod header;
mod metadata;
mod ordered;
mod overlay;
mod publish;
mod storage;

use std::io;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::ShallowMapping;
use imago::format::PreallocateMode;

use self::chain::{Layer, Opened};
use self::header::Header;
use self::metadata::Metadata;
#[cfg(test)]
pub(super) use self::ordered::without;
use self::ordered::{Order, OrderedStorage};
use super::bounce::Bounce;
use super::image_file::check_length;
use super::job::Job;
use super::observer::Observer;
use super::{
    BlockLimits, Corruption, DiscardMode, DiskError, DiskInfo, OpenError, OpenOptions, OpenReason,
    Operation, SECTOR,
};
use crate::lock;

/// The top layer with no transfer under way.
type ExclusiveLayer<'a> = RwLockWriteGuard<'a, Layer>;

/// Most bytes of metadata that wait for a flush. Above that, the next change publishes them first.
const MAX_HELD: usize = 32 << 20;
/// How often a change is repeated if a cluster is not free on the medium yet. A publication makes all freed clusters free on the medium.
/// A change can itself free a table and then need its cluster, but only once.
const MAX_PUBLICATIONS: usize = 3;

/// A qcow2 image, or any image below a temporary qcow2 overlay.
pub(super) struct Qcow2Image {
    path: PathBuf,
    /// Transfers hold it shared, and operations that free clusters exclusively. Taken before `allocating`.
    top: RwLock<Layer>,
    /// Held while the mapping is changed or published.
    allocating: Mutex<()>,
    storage: OrderedStorage,
    capacity: AtomicU64,
    header: Header,
    /// A cluster can be marked as zeroes, so that the layer below does not show (version 3).
    has_zero_clusters: bool,
    /// Bytes of the layer below; 0 without one.
    backing: u64,
    /// Discards reach the image (`discard=unmap`).
    discard: bool,
}

impl Qcow2Image {
    /// Opens the chain of images that `options` name, below a temporary overlay if `overlay` says so.
    pub(super) fn open(
        options: &OpenOptions,
        overlay: bool,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<(Self, DiskInfo), OpenError> {
        let writable = !options.read_only && !overlay;
        let mut opened = chain::open(options, writable, observer)?;
        let refused = |reason: OpenReason| reason.of(&options.path);
        check_length(&options.path, opened.layer.size()).map_err(refused)?;
        if overlay {
            opened = overlay::temporary_overlay(opened).map_err(refused)?;
        }
        let Opened { layer, storage, header, backing, below, .. } = opened;
        let discard = options.discard == DiscardMode::Unmap;
        // In version 2 a discarded cluster would show what is below it.
        let discards = discard && (header.version >= 3 || backing == 0);
        let block_limits = BlockLimits {
            logical_block_size: SECTOR as u32,
            physical_block_size: 4096,
            alignment_offset: 0,
            min_io_size: 4096,
            opt_io_size: 0,
            discard_granularity: if discards { header.cluster as u32 } else { 0 },
            secure_erase: false,
        };
        let image = Self {
            path: options.path.clone(),
            capacity: AtomicU64::new(sectors(layer.size())),
            top: RwLock::new(layer),
            allocating: Mutex::new(()),
            storage,
            has_zero_clusters: header.version >= 3,
            header,
            backing,
            discard: discards,
        };
        let read_only = options.read_only;
        let (lifetime, scsi, backing_images) = (None, false, below);
        Ok((image, DiskInfo { read_only, block_limits, lifetime, scsi, backing_images }))
    }

    fn shared(&self) -> RwLockReadGuard<'_, Layer> {
        self.top.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> ExclusiveLayer<'_> {
        self.top.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 {
            let buffer = piece(bounce, job);
            self.shared().read(&mut *buffer, job.offset)?;
            job.copy_to_guest(buffer);
        }
        Ok(())
    }

    fn write(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 {
            let (buffer, offset) = (piece(bounce, job), job.offset);
            job.copy_from_guest(buffer);
            self.put(&mut self.shared(), buffer, offset)?;
        }
        Ok(())
    }

    /// Called before each change of the image.
    fn begin_change(&self) -> io::Result<()> {
        if self.storage.order().map_or(Ok(false), Order::begin_change)? {
            tracing::warn!(
                "disk image {:?}: written to from now on, so its persistent dirty bitmaps become invalid; make a new full backup before the next incremental one",
                self.path
            );
        }
        Ok(())
    }

    /// Writes `data` to the clusters that are allocated for it, or allocates new ones.
    fn put<L>(&self, top: &mut L, mut data: &[u8], mut offset: u64) -> io::Result<()>
    where
        L: Deref<Target = Layer>,
    {
        while !data.is_empty() {
            let length = match top.get_shallow_mapping(offset, data.len() as u64)? {
                (ShallowMapping::Raw { writable: true, offset: at, .. }, length) => {
                    self.storage.write_data(&data[..length as usize], at, false)?;
                    length
                }
                (_, length) => {
                    let data = &data[..length as usize];
                    self.change(top, |top| allocate(&self.storage, top, data, offset))?
                }
            };
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data = &data[length as usize..];
            offset += length;
        }
        Ok(())
    }

    /// Makes a change that may allocate or free clusters. Other changes wait. If `change` is refused because a cluster is not free on
    /// the medium yet, this publishes and calls `change` again, so it must be repeatable.
    fn change<L: Deref<Target = Layer>, R>(
        &self,
        top: &mut L,
        mut change: impl FnMut(&mut L) -> io::Result<R>,
    ) -> io::Result<R> {
        let _turn = lock(&self.allocating);
        let Some(order) = self.storage.order() else { return change(top) };
        if order.metadata().held_bytes() > MAX_HELD {
            self.publish(top)?;
        }
        let mut publications = 0;
        loop {
            let result = change(top);
            let mut metadata = order.metadata();
            let refused = std::mem::take(&mut metadata.refused) && result.is_err();
            if !refused || publications == MAX_PUBLICATIONS {
                metadata.settled = false;
                return result;
            }
            drop(metadata);
            self.publish(top)?;
            publications += 1;
        }
    }

    /// Writes imago's cached tables to the storage below it, which publishes them in order. The caller excludes other changes of the
    /// mapping. Returns the result of [`Order::publish`].
    fn publish(&self, top: &Layer) -> io::Result<bool> {
        top.flush()?;
        self.storage.order().map_or(Ok(false), Order::publish)
    }

    /// Zeroes a range. With `unmap` its clusters are freed, and otherwise stay allocated.
    fn write_zeroes(&self, job: &Job, unmap: bool, bounce: &mut Bounce) -> io::Result<()> {
        let whole = self.whole_clusters(job.offset..job.end());
        self.write_plain_zeroes(job.offset..whole.start, bounce)?;
        let mut at = whole.start;
        while at < whole.end {
            at = match unmap && self.discard {
                true => self.deallocate(at..whole.end, true)?,
                false => self.zero_run(at..whole.end, bounce)?,
            };
        }
        self.write_plain_zeroes(whole.end..job.end(), bounce)
    }

    /// The part of `range` that consists of whole clusters; the end of the disk may cut the last one short. Asked for a part of the last
    /// cluster, imago 0.2.6 zeroes a wrong range.
    fn whole_clusters(&self, range: Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(self.header.cluster).min(range.end);
        let end = match range.end == self.capacity() {
            true => range.end,
            false => range.end - range.end % self.header.cluster,
        };
        start..end.max(start)
    }

    /// Zeroes the clusters at the start of `range` that are all mapped in the same way. Returns their end.
    fn zero_run(&self, range: Range<u64>, bounce: &mut Bounce) -> io::Result<u64> {
        let mut top = self.shared();
        let (mapping, length) = top.get_shallow_mapping(range.start, range.end - range.start)?;
        let end = range.start + length;
        match mapping {
            ShallowMapping::Raw { writable: true, offset, .. } => {
                self.storage.zero_data(offset, length)?;
            }
            ShallowMapping::Zero { .. } => {}
            ShallowMapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if self.has_zero_clusters => {
                self.change(&mut top, |top| top.write_zeroes(range.start, length))?;
            }
            _ => {
                drop(top);
                self.write_plain_zeroes(range.start..end, bounce)?;
            }
        }
        Ok(end)
    }

    /// Frees the clusters at the start of `range` that are all mapped in the same way. Returns their end. They read as zeroes then.
    /// Without `zero`, clusters that were not allocated stay as they are.
    fn deallocate(&self, range: Range<u64>, zero: bool) -> io::Result<u64> {
        let mut top = self.exclusive();
        let (mapping, length) = top.get_shallow_mapping(range.start, range.end - range.start)?;
        match mapping {
            ShallowMapping::Zero { .. } => {}
            ShallowMapping::Indirect { .. } if !zero => {}
            ShallowMapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => self.change(&mut top, |top| match self.has_zero_clusters {
                true => top.discard_to_zero(range.start, length),
                false => top.discard_to_backing(range.start, length),
            })?,
        }
        Ok(range.start + length)
    }

    fn write_plain_zeroes(&self, range: Range<u64>, bounce: &mut Bounce) -> io::Result<()> {
        let buffer = bounce.buffer();
        buffer.fill(0);
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(buffer.len() as u64);
            self.put(&mut self.shared(), &buffer[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }

    /// A discard is a hint: clusters that cannot be freed stay.
    fn discard(&self, job: &Job) -> io::Result<()> {
        let Range { start: mut at, end } = self.whole_clusters(job.offset..job.end());
        while at < end && self.discard {
            at = self.deallocate(at..end, false)?;
        }
        Ok(())
    }

    /// Publishes imago's metadata, and flushes the file to the medium.
    fn flush(&self) -> io::Result<()> {
        let top = self.shared();
        let turn = lock(&self.allocating);
        let durable = self.publish(&top)?;
        drop(turn);
        if durable { Ok(()) } else { top.sync() }
    }

    fn set(&self, set: impl FnOnce(&mut Metadata)) {
        if let Some(order) = self.storage.order() {
            set(&mut order.metadata());
        }
    }

    /// Makes the disk larger. The new part reads as zeroes on the medium before it becomes part of the disk.
    fn grow(&self, top: &mut ExclusiveLayer<'_>, bytes: u64) -> io::Result<()> {
        let old = top.size();
        let below = self.backing.min(bytes);
        if below > old && !self.has_zero_clusters {
            return Err(unsupported(
                "the backing file is longer than the image, and a version 2 image cannot hide that; use `qemu-img amend -o compat=1.1`",
            ));
        }
        self.set(|metadata| metadata.size_limit = old);
        let result = self
            .change(top, |top| top.resize(bytes, PreallocateMode::None))
            .and_then(|()| self.hide(top, old..bytes, below));
        if result.is_err() {
            self.shrink(top, old)?;
        }
        self.set(|metadata| metadata.size_limit = u64::MAX);
        result
    }

    /// Makes the new part of the disk read as zeroes. Old data may be in the cluster in which the disk ended, and in the images below,
    /// which end at byte `below`.
    fn hide(&self, top: &mut ExclusiveLayer<'_>, new: Range<u64>, below: u64) -> io::Result<()> {
        let mut at = new.start.next_multiple_of(self.header.cluster).min(new.end);
        if at > new.start
            && !matches!(top.get_shallow_mapping(new.start, 1)?.0, ShallowMapping::Zero { .. })
        {
            self.put(top, &vec![0; (at - new.start) as usize], new.start)?;
        }
        let end = below.next_multiple_of(self.header.cluster).min(new.end);
        while at < end {
            let (mapping, length) = top.get_shallow_mapping(at, end - at)?;
            if !matches!(mapping, ShallowMapping::Zero { .. }) {
                self.change(top, |top| top.write_zeroes(at, length))?;
            }
            at += length.max(SECTOR);
        }
        Ok(())
    }

    /// Makes the disk smaller. The new size is on the medium before clusters beyond it are freed: a freed cluster may read as anything, so it
    /// must not be part of the disk any more.
    fn shrink(&self, top: &mut ExclusiveLayer<'_>, bytes: u64) -> io::Result<()> {
        self.set(|metadata| metadata.size_limit = bytes);
        let result = self.publish(top).and_then(|_| self.cut_off(top, bytes));
        self.set(|metadata| metadata.size_limit = u64::MAX);
        result
    }

    fn cut_off(&self, top: &mut ExclusiveLayer<'_>, bytes: u64) -> io::Result<()> {
        let (mut at, end) = (bytes.next_multiple_of(self.header.cluster), top.size());
        while at < end {
            let (mapping, length) = top.get_shallow_mapping(at, end - at)?;
            let is_allocated = !matches!(
                mapping,
                ShallowMapping::Zero { explicit: false, .. } | ShallowMapping::Indirect { .. }
            );
            if is_allocated {
                self.change(top, |top| top.discard_to_backing(at, length))?;
            }
            at += length.max(SECTOR);
        }
        // To free a range without an L2 table, imago would allocate an empty one. If it cannot, it goes on, and logs that the new table
        // is lost: `NoSubscriber` drops this message.
        self.set(|metadata| metadata.no_new_tables = true);
        let silent = tracing::subscriber::NoSubscriber::default();
        let result = tracing::subscriber::with_default(silent, || {
            self.change(top, |top| top.resize(bytes, PreallocateMode::None))
        });
        self.set(|metadata| metadata.no_new_tables = false);
        result
    }
}

/// Allocates clusters for the start of `data`, writes it there and maps them. Returns how much that was.
fn allocate(storage: &OrderedStorage, top: &Layer, data: &[u8], offset: u64) -> io::Result<u64> {
    // Another write may have allocated them meanwhile.
    if let (ShallowMapping::Raw { writable: true, offset, .. }, length) =
        top.get_shallow_mapping(offset, data.len() as u64)?
    {
        storage.write_data(&data[..length as usize], offset, false)?;
        return Ok(length);
    }
    let mapping = top.prepare_data_mapping(offset, data.len() as u64, true)?;
    let length = mapping.length();
    storage.write_data(&data[..length as usize], mapping.offset(), true)?;
    top.commit_data_mapping(mapping)?;
    Ok(length)
}

/// The buffer for the next part of `job`.
fn piece<'a>(bounce: &'a mut Bounce, job: &Job) -> &'a mut [u8] {
    let buffer = bounce.buffer();
    let length = job.length.min(buffer.len() as u64) as usize;
    &mut buffer[..length]
}

fn sectors(bytes: u64) -> u64 {
    bytes - bytes % SECTOR
}

fn unsupported(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}

impl Qcow2Image {
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn take_corruption(&self) -> Option<Corruption> {
        lock(&self.storage.order()?.corruption).take()
    }

    pub(super) fn refresh_capacity(&self) -> io::Result<u64> {
        let capacity = sectors(self.shared().size());
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }

    /// Refuses and allows what QEMU does. Only tables change: the new part is not allocated.
    pub(super) fn resize(&self, bytes: u64) -> io::Result<()> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the size must be a multiple of 512 bytes",
            ));
        }
        if self.header.has_snapshots && !self.has_zero_clusters {
            return Err(unsupported(
                "a version 2 image with snapshots cannot be resized; use `qemu-img amend -o compat=1.1`",
            ));
        }
        self.begin_change()?;
        let mut top = self.exclusive();
        match bytes > top.size() {
            true => self.grow(&mut top, bytes)?,
            false => self.shrink(&mut top, bytes)?,
        }
        drop(top);
        self.flush()?;
        self.refresh_capacity().map(drop)
    }

    pub(super) fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        if !matches!(job.operation, Operation::Read | Operation::Flush) {
            self.begin_change()?;
        }
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

impl Drop for Qcow2Image {
    /// Writes what is held even with `cache=unsafe`, whose flushes do nothing. All others have flushed before, with the result
    /// seen by their caller.
    fn drop(&mut self) {
        if let Err(error) = self.publish(&self.shared()) {
            tracing::error!("disk image {:?}: what was written last is lost: {error}", self.path);
        }
    }
}

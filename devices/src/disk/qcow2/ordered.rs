//! The storage that imago gets: the order of a qcow2 image's writes on the medium.
//!
//! After a power cut, the medium has everything that the last completed fdatasync covered, and any part of later writes, in any order,
//! torn at sectors. Three properties of imago 0.2.6 are unsafe then:
//!
//! - It writes its tables in the right order, but makes no fdatasync between them.
//! - In two places it refers to a new L2 table or refcount block before that is counted.
//! - It reuses a freed cluster at once, while the file still refers to it.
//!
//! So after a power cut a cluster could be in use without being counted, and after the next start it was allocated a second time.
//!
//! This layer lies below imago. Its rule: **imago's writes to metadata stay in memory until they are published. The order of a
//! publication is such that each step refers only to data that is durable**. Guest data goes to the file at once.
//!
//! | step of `Order::publish` writes | fdatasync |
//! |---|---|
//! | 1. refcount blocks, with the larger of the file's count and the new one | after them: counts, data, copied data and new tables are durable |
//! | 2. if refcount blocks were added: the refcount table; if it moved: the header's pointer to it | after each |
//! | 3. L2 tables and the L1 table | the next step's, or the caller's |
//! | 4. if the header changed (a resize, a moved L1 table): the header | before it |
//! | 5. refcount blocks in which counts go down | before them |
//!
//! The caller ends a flush with an fdatasync of its own. So a flush that publishes new clusters costs two, as in QEMU, and one that
//! publishes nothing costs one. Each entry of a table is valid in its old and in its new form at every step, so a torn or missing
//! write of a step does no harm. At worst a count stays too high and a cluster leaks, as in QEMU.
//!
//! **Reuse.** While the file counts a freed cluster, it may still refer to it. So new data for the cluster is refused. The caller then
//! publishes, which removes the references, and repeats its change.
//!
//! **Metadata and guests.** A guest's write never reaches a cluster of metadata: see [`metadata`](super::metadata). If the tables of an
//! image lead a write there, the image is marked corrupt, as by QEMU, and no longer written to.
//!
//! Other ways were rejected:
//!
//! - The dirty bit, with refcounts rebuilt at the next start: version 2 images have none, and it does not help against reuse.
//! - An fdatasync before each of imago's own writes: the two places with the wrong order remain.
//! - A patched copy of imago: it would have to follow imago's releases.
//!
//! This layer only requires that imago writes metadata through its `Storage`.
//!
//! imago calls it through `Storage`, and [`Qcow2Image`](super::Qcow2Image) for guest data, because it knows whether the target is in
//! use. Calls that allocate or publish come from one thread at a time. Layers that are only read have no metadata here. A temporary
//! overlay has none either, because it does not outlive the process. Calls for both go to the file unchanged.

#![expect(unsafe_code, reason = "imago declares the calls of `Storage` unsafe")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};

use super::header::{self, AUTOCLEAR, CORRUPT, DIRTY, FEATURES_END, INCOMPATIBLE, damaged};
use super::metadata::{Kind, Metadata, read};
use super::storage::HostStorage;
use crate::disk::Corruption;
use crate::lock;

/// The [`Storage`] that imago gets for one file: see the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct OrderedStorage(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    file: Arc<HostStorage>,
    /// Hides the dirty, corrupt and autoclear bits from imago. It would refuse to open a dirty or corrupt image, which can still be read,
    /// and clear autoclear bits when it opens an image, before the guest writes.
    hides_features: bool,
    order: Option<Order>,
    helper: CommonStorageHelper,
}

/// The state of an image that is written to.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) file: Arc<HostStorage>,
    metadata: Mutex<Metadata>,
    /// The corruption that was found, until the main loop reports it. It has a lock of its own, because `metadata` is locked during
    /// host I/O, for which the main loop must not wait.
    pub(super) corruption: Mutex<Option<Corruption>>,
    /// A publication makes each step durable before the next. False with `cache=unsafe`.
    pub(super) barriers: bool,
}

impl OrderedStorage {
    /// A file without an order: it is only read, or imago's writes go to it unchanged.
    pub(super) fn plain(file: HostStorage) -> Self {
        Self::new(Arc::new(file), false, None)
    }

    /// A qcow2 image whose header has been checked. If it is `writable`, its writes are ordered.
    pub(super) fn qcow2(
        file: HostStorage,
        version: u64,
        writable: bool,
        barriers: bool,
    ) -> io::Result<Self> {
        #[cfg(test)]
        if writable && without::ORDER.get() {
            return Ok(Self::plain(file));
        }
        let file = Arc::new(file);
        let order = writable.then(|| Order::new(Arc::clone(&file), barriers));
        Ok(Self::new(file, version >= 3, order.transpose()?))
    }

    fn new(file: Arc<HostStorage>, hides_features: bool, order: Option<Order>) -> Self {
        Self(Arc::new(Shared { file, hides_features, order, helper: Default::default() }))
    }

    /// The state of the ordering. `None` if the file has no order.
    pub(super) fn order(&self) -> Option<&Order> {
        self.0.order.as_ref()
    }

    /// Writes guest data to clusters to which an L2 table refers, or (`new`) which have just been allocated for it.
    pub(super) fn write_data(&self, data: &[u8], offset: u64, new: bool) -> io::Result<()> {
        self.check_data(offset, data.len() as u64, new)?;
        self.0.file.write(data, offset)
    }

    /// Zeroes guest data in clusters to which an L2 table refers. They stay allocated.
    pub(super) fn zero_data(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_data(offset, length, false)?;
        self.0.file.write_allocated_zeroes(offset, length)
    }

    fn check_data(&self, offset: u64, length: u64, new: bool) -> io::Result<()> {
        self.order().map_or(Ok(()), |order| order.check_data(offset, length, new))
    }

    fn read_header(&self, mut buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let end = offset + buffers.len();
        let mut bytes = read(&self.0.file, 0, FEATURES_END.max(end) as usize)?;
        let at = INCOMPATIBLE as usize;
        let features = header::long(&bytes, at) & !(DIRTY | CORRUPT);
        bytes[at..at + 8].copy_from_slice(&features.to_be_bytes());
        bytes[AUTOCLEAR as usize..][..8].fill(0);
        buffers.copy_from_slice(&bytes[offset as usize..end as usize]);
        Ok(())
    }
}

impl Order {
    fn new(file: Arc<HostStorage>, barriers: bool) -> io::Result<Self> {
        #[cfg(test)]
        let barriers = barriers && !without::BARRIERS.get();
        let metadata = Mutex::new(Metadata::load(&file)?);
        Ok(Self { file, metadata, corruption: Mutex::default(), barriers })
    }

    pub(super) fn metadata(&self) -> MutexGuard<'_, Metadata> {
        lock(&self.metadata)
    }

    pub(super) fn barrier(&self) -> io::Result<()> {
        if self.barriers { self.file.sync() } else { Ok(()) }
    }

    /// Called before each change. Refuses it if the image is corrupt. Before the first change it clears the autoclear bits, because the
    /// change makes the data for which they vouch out of date. Returns whether it has cleared them.
    pub(super) fn begin_change(&self) -> io::Result<bool> {
        let mut metadata = self.metadata();
        metadata.check_usable()?;
        if metadata.vouched {
            self.file.write(&[0; 8][..], AUTOCLEAR)?;
            self.barrier()?;
        }
        Ok(std::mem::take(&mut metadata.vouched))
    }

    /// Refuses guest data in a cluster of metadata, and new data in a cluster to which the file may still refer.
    fn check_data(&self, offset: u64, length: u64, new: bool) -> io::Result<()> {
        let mut metadata = self.metadata();
        metadata.check_usable()?;
        for cluster in metadata.clusters(offset, length) {
            if let Some(kind) = metadata.kind(cluster) {
                let why = format!("guest data would overwrite metadata ({kind:?})");
                return Err(self.judge(metadata, damaged(&why), offset..offset + length));
            }
            if new && !metadata.settled && metadata.is_counted(&self.file, cluster)? {
                metadata.refused = true;
                return Err(io::Error::other("the cluster is not free on the medium yet"));
            }
        }
        Ok(())
    }

    /// The error that the guest gets for an access to `range` of the file. If `error` says that the image is damaged, the image is not
    /// written to any more, and is marked corrupt. Only the header of version 3 has a bit for that.
    fn judge(
        &self,
        mut metadata: MutexGuard<'_, Metadata>,
        error: io::Error,
        range: Range<u64>,
    ) -> io::Error {
        if error.kind() != io::ErrorKind::InvalidData {
            return error;
        }
        if !std::mem::replace(&mut metadata.is_corrupt, true) {
            tracing::error!(
                "disk image {}: corrupt, and not written to any more: {error}; `qemu-img check -r all` may repair it",
                self.file
            );
            *lock(&self.corruption) = Some(Corruption { message: error.to_string(), range });
            let mark = || {
                let features = header::long(&read(&self.file, INCOMPATIBLE, 8)?, 0) | CORRUPT;
                self.file.write(&features.to_be_bytes()[..], INCOMPATIBLE)?;
                self.file.sync()
            };
            if metadata.has_features
                && let Err(error) = mark()
            {
                tracing::error!("disk image {}: cannot be marked as corrupt: {error}", self.file);
            }
        }
        io::Error::from_raw_os_error(libc::EIO)
    }

    /// A write by imago: to metadata, or to a cluster that it has just allocated.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut metadata = self.metadata();
        let kind = metadata.kind(metadata.cluster(offset));
        let Some(kind) = kind else {
            if metadata.no_new_tables {
                return Err(io::ErrorKind::Unsupported.into());
            }
            drop(metadata);
            self.check_data(offset, data.len() as u64, true)?;
            return self.file.write(data, offset);
        };
        let range = offset..offset + data.len() as u64;
        let taken = metadata.take_write(&self.file, kind, data, offset);
        taken.map_err(|error| self.judge(metadata, error, range))
    }

    /// A read by imago. A held cluster is returned in place of the file's content. An L2 table from the file is checked.
    fn read(&self, mut buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let metadata = self.metadata();
        let (cluster, size) = (metadata.cluster(offset), metadata.cluster_size());
        let is_whole = buffers.len() == size as u64 && offset.is_multiple_of(size as u64);
        let kind = metadata.kind(cluster).filter(|_| is_whole);
        let held = metadata.held.get(&cluster).cloned();
        drop(metadata);
        let Some(kind) = kind else { return self.file.readv(buffers, offset) };
        if let Some(held) = held {
            buffers.copy_from_slice(&held);
            return Ok(());
        }
        let content = read(&self.file, offset, size)?;
        let mut metadata = self.metadata();
        if kind == Kind::L2
            && let Err(error) = metadata.check_l2(&self.file, &content)
        {
            return Err(self.judge(metadata, error, offset..offset + size as u64));
        }
        buffers.copy_from_slice(&content);
        Ok(())
    }
}

impl fmt::Display for OrderedStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.file.fmt(f)
    }
}

// Requests need no alignment here. The file below has one, and pads requests to it.
impl Storage for OrderedStorage {
    fn size(&self) -> io::Result<u64> {
        self.0.file.size()
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        match self.order() {
            _ if self.0.hides_features && offset < FEATURES_END => {
                self.read_header(buffers, offset)
            }
            Some(order) => order.read(buffers, offset),
            None => self.0.file.readv(buffers, offset),
        }
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Some(order) = self.order() else { return self.0.file.writev(buffers, offset) };
        let mut data = vec![0; buffers.len() as usize];
        buffers.copy_into_slice(&mut data);
        order.write(&data, offset)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_data(offset, length, true)?;
        self.0.file.write_zeroes(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.file.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.0.file.resize(size, mode)
    }
}

/// Switches that turn parts of the order off for images that a test's thread opens. The power-cut rig then has to find a fault.
#[cfg(test)]
pub(in crate::disk) mod without {
    use std::cell::Cell;

    thread_local! {
        pub(in crate::disk) static ORDER: Cell<bool> = const { Cell::new(false) };
        pub(in crate::disk) static BARRIERS: Cell<bool> = const { Cell::new(false) };
    }
}

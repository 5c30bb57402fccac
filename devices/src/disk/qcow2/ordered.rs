//! The storage that imago gets: the order of a qcow2 image's writes on the medium.
//!
//! After a power cut the medium holds what the last completed fdatasync covered and any part of what was written later, in
//! any order, torn at sectors. imago 0.2.6 writes its tables in the right order, but with no fdatasync between them, with two
//! gaps (a new L2 table or refcount block is referred to before it is counted), and it reuses a cluster at once after giving
//! it back, while the file still refers to it. So after a cut a cluster could be in use and not counted, and the next start
//! gave it away a second time.
//!
//! This layer below imago closes all of that with one idea: **what imago writes to metadata stays in memory until it is
//! published, in an order in which each step refers only to what is durable**. Data goes straight to the file.
//!
//! | step of `Order::publish` writes | fdatasync |
//! |---|---|
//! | 1. refcount blocks, with the larger of the file's count and the new one | after them: counts, data, copied data and new tables are durable |
//! | 2. if refcount blocks were added: the refcount table; if it moved: the header's pointer to it | after each |
//! | 3. L2 tables and the L1 table | the next step's, or the caller's |
//! | 4. if the header changed (a resize, a moved L1 table): the header | before it |
//! | 5. refcount blocks in which counts go down | before them |
//!
//! The caller's fdatasync ends a flush, so one that publishes new clusters costs two of them, as QEMU's does, and one that
//! publishes nothing costs one. Each table is one cluster or a sequence of entries, and each entry is valid in its old and in
//! its new form at every step, so a torn or missing write of a step does no harm. What is lost at worst is a count that is too
//! high: a leaked cluster, as in QEMU.
//!
//! **Reuse.** A cluster that the file counts may still be referred to by the file, so a write to it is refused unless it is
//! known to be in use. The caller publishes, which makes the references go, and repeats what it did.
//!
//! **Metadata and guests.** A guest's write never reaches a cluster of metadata: see [`metadata`](super::metadata). An image
//! in which it would is marked corrupt, as by QEMU, and no longer written to.
//!
//! Why not otherwise: the dirty bit with refcounts rebuilt at the next start does not exist in version 2 images and does not
//! help against reuse; a barrier before each of imago's own writes leaves the two gaps, whose writes imago would have to make
//! in another order; a patched copy of imago would have to follow its releases. All of this needs imago only to write metadata
//! through its `Storage`.
//!
//! Who calls: imago, through `Storage`, and [`Qcow2Image`](super::Qcow2Image) for guest data, which knows whether the target
//! is in use. Calls that allocate or publish come from one thread at a time. Layers that are only read have no metadata here,
//! nor has a temporary overlay, which does not outlive the process: their calls go to the file as they are.

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

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct OrderedStorage(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    file: Arc<HostStorage>,
    /// imago refuses images with unknown incompatible bits, and clears autoclear bits when it opens an image for writing.
    /// Neither suits: a dirty or corrupt image can be read, and nothing is written before the guest writes.
    hides_features: bool,
    order: Option<Order>,
    helper: CommonStorageHelper,
}

/// What there is of an image that is written to.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) file: Arc<HostStorage>,
    metadata: Mutex<Metadata>,
    /// How the image was found to be corrupt, until that is reported. Not in `metadata`, which is locked while the host is waited
    /// for: the main loop asks.
    pub(super) corruption: Mutex<Option<Corruption>>,
    /// Publishing makes each step durable before the next (not with `cache=unsafe`).
    pub(super) barriers: bool,
}

impl OrderedStorage {
    /// A file that is written as imago says, or only read.
    pub(super) fn plain(file: HostStorage) -> Self {
        Self::new(Arc::new(file), false, None)
    }

    /// A qcow2 image whose header has been checked, to be read, or to be written to in order.
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

    /// What keeps the order; `None` if nothing does.
    pub(super) fn order(&self) -> Option<&Order> {
        self.0.order.as_ref()
    }

    /// Writes guest data to clusters that an L2 table refers to, or (`new`) that have just been allocated for it.
    pub(super) fn write_data(&self, data: &[u8], offset: u64, new: bool) -> io::Result<()> {
        self.check_data(offset, data.len() as u64, new)?;
        self.0.file.write(data, offset)
    }

    /// Zeroes guest data in clusters that an L2 table refers to, and leaves them allocated.
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

    /// To be called before each change: refuses it once the image is corrupt, and before the first withdraws what the
    /// autoclear bits vouch for. Returns whether it has done that.
    pub(super) fn begin_change(&self) -> io::Result<bool> {
        let mut metadata = self.metadata();
        metadata.check_usable()?;
        if metadata.vouched {
            self.file.write(&[0; 8][..], AUTOCLEAR)?;
            self.barrier()?;
        }
        Ok(std::mem::take(&mut metadata.vouched))
    }

    /// Refuses guest data where metadata is, and new data where the file may still refer to something else.
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

    /// The error for the guest of an access to `range`. If it says that the image is damaged, the image is marked corrupt, where
    /// its header has room for that.
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
                tracing::error!(%error, "disk image {}: cannot be marked as corrupt", self.file);
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

    /// A read by imago: what is held wins over the file, and L2 tables are checked.
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

// Requests need no alignment here: the file below has its own, and pads requests to it.
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

/// What the tests take out, for images that their thread opens, to see that the power-cut rig finds it.
#[cfg(test)]
pub(in crate::disk) mod without {
    use std::cell::Cell;

    thread_local! {
        pub(in crate::disk) static ORDER: Cell<bool> = const { Cell::new(false) };
        pub(in crate::disk) static BARRIERS: Cell<bool> = const { Cell::new(false) };
    }
}

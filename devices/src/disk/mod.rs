//! Disks: an opened image, and the engines that move data between it and guest memory.
//!
//! A [`Disk`] is the opened image. All workers share it, and only its size changes. Each worker asks it for an [`Engine`] of
//! its own. The worker uses every engine in the same way, whether the engine finishes a transfer at once or later: it calls `submit`
//! for each transfer, `commit` after several of them, and `reap` for what is finished. `block/` calls these two traits, its tests
//! implement them, and [`open()`] makes the real ones. Nothing here knows virtio.
//!
//! `open.rs` puts a disk together from a host file, a format and the parts of its engines. Then a cached write to a raw image passes
//! these files:
//!
//! - `engine/` moves the data, with `job.rs` and `positioned_io.rs`; `engine/route.rs` decides who moves it;
//! - `opened.rs` names the formats, and `raw.rs` is the raw one;
//! - `host_file.rs` is the file below each format.
//!
//! Beside that path: `image_file.rs` locks a file, `direct.rs` and `bounce.rs` are direct I/O, and `block_device.rs` asks what only
//! block devices know. What has to wait for the host is executed on the threads of `engine/threads.rs`: `execute.rs` passes it to the
//! format, which is `raw/blocking.rs` or `qcow2.rs`. `qcow2/ordered.rs` has the order of qcow2's metadata.
//!
#![doc = include_str!("../../docs/disk-engines.md")]

use std::any::Any;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use crate::GuestMemory;
pub use crate::GuestRange;
use crate::spawn::Spawn;

mod block_device;
mod bounce;
mod detect_zeroes;
mod direct;
mod engine;
mod error;
mod execute;
mod host_file;
mod image_file;
pub mod injected_faults;
mod job;
mod layer;
mod lock;
pub mod log_writes;
mod observer;
mod open;
mod open_reason;
mod opened;
mod option_words;
mod options;
mod other_formats;
mod positioned_io;
#[cfg(test)]
mod powercut;
mod qcow2;
mod raw;
mod scsi;
pub mod temporary_file;
#[cfg(test)]
mod tests;

pub use error::{Corruption, DiskError, FileError, OpenError};
pub use open::open;
pub use open_reason::OpenReason;
pub use option_words::UnknownWord;
pub use options::{Aio, CacheMode, DetectZeroes, DiscardMode, Format, OpenOptions};
pub use scsi::{CDB_MAX, SENSE_MAX, ScsiCommand, ScsiDirection, ScsiReply};

/// Bytes of a sector, the unit of capacities and of every transfer's offset and length.
pub const SECTOR: u64 = 512;

/// What to do with a range of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Disk to guest memory. If a write to the same sectors is in flight, the read may get the old or the new data.
    Read,
    /// Guest memory to disk. Of two writes in flight to the same sectors, either may be the last.
    Write {
        /// The data survives a power cut once the write is complete (write-through).
        durable: bool,
    },
    /// Makes the data of all writes durable that completed before the flush was submitted. If it fails, that data may be lost.
    #[default]
    Flush,
    /// Says that the content is no longer needed. This is a hint: an engine may do nothing and succeed.
    Discard,
    /// The content becomes zeroes. No data is moved from guest memory.
    WriteZeroes {
        /// The blocks may be deallocated. Otherwise they must stay allocated, so that later writes find space.
        unmap: bool,
        /// The zeroes survive a power cut once the operation is complete.
        durable: bool,
    },
    /// Destroys the content and all copies that the device has made of it.
    SecureErase,
}

/// One transfer for an engine. The ranges are borrowed for the call of `submit` only, so an engine copies what it needs.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The caller's number for the transfer, which its [`Completion`] returns. It is less than the engine's depth, and no other
    /// transfer in flight has it.
    pub tag: u32,
    /// What to do with the range of the disk that `offset` and `length` give.
    pub operation: Operation,
    /// Where the range starts on the disk, in bytes: a multiple of 512.
    pub offset: u64,
    /// How long the range is, in bytes: a multiple of 512, and for reads and writes the sum of `ranges`.
    pub length: u64,
    /// The guest memory of reads and writes, in the order of the disk's bytes. Empty for other operations.
    pub ranges: &'a [GuestRange],
}

impl Transfer<'_> {
    /// A flush with tag 0.
    pub(crate) const FLUSH: Self =
        Self { tag: 0, operation: Operation::Flush, offset: 0, length: 0, ranges: &[] };
}

/// A finished transfer. The caller may use its tag and its guest memory again.
#[derive(Debug)]
pub struct Completion {
    /// The tag that the transfer was submitted with.
    pub tag: u32,
    /// `Ok`: all of the transfer was done. After an error, any part of it may have been done.
    pub result: Result<(), DiskError>,
}

/// A backing image, as it was when it was opened. Its lock keeps other programs from writing to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingImage {
    /// The path that was opened.
    pub path: std::path::PathBuf,
    /// The format of the image.
    pub format: Format,
    /// The size of the disk in the image, in bytes.
    pub capacity: u64,
    /// The bytes that the image occupies on the host.
    pub allocated: u64,
}

/// Sizes that the disk announces to the guest, in bytes. They come from statx(2), statvfs(3) and the BLK* ioctls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLimits {
    /// The smallest unit that the host can write, so that minivmm need not read, modify and write back: 512 for regular files.
    pub logical_block_size: u32,
    /// The unit in which the medium writes. Smaller writes are correct, but slower.
    pub physical_block_size: u32,
    /// Where the first physical block starts, which is not at 0 for some partitions.
    pub alignment_offset: u32,
    /// The smallest transfer that the host suggests; 0 if it suggests none.
    pub min_io_size: u32,
    /// The best transfer size that the host suggests, such as a stripe; 0 if it suggests none.
    pub opt_io_size: u32,
    /// The unit of discards; smaller ones do nothing. 0: the disk cannot discard.
    pub discard_granularity: u32,
    /// Whether the device can destroy data and all copies of it.
    pub secure_erase: bool,
}

/// How worn the medium is, in eMMC's terms (JESD84-B51 §7.4.46-48), which virtio 1.2 §5.2.6 uses unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Reserved blocks consumed: 1 normal, 2 warning (80%), 3 urgent (90%); 0 unknown.
    pub pre_eol_info: u16,
    /// Wear of the SLC part in steps of 10%: 1 is 0-10%, 0x0b is exceeded; 0 unknown.
    pub device_lifetime_est_typ_a: u16,
    /// Wear of the MLC part, in the same steps of 10%.
    pub device_lifetime_est_typ_b: u16,
}

/// What does not change while a disk is open.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Writes, discards and zeroes are refused.
    pub read_only: bool,
    /// What the host's file or device prefers.
    pub block_limits: BlockLimits,
    /// How worn the medium was when the image was opened, if the host knows.
    pub lifetime: Option<Lifetime>,
    /// Engines take SCSI commands: the image is a SCSI disk of the host, and `scsi=on` allows the guest to send them.
    pub scsi: bool,
    /// The images of a chain that are below this one, the nearest first. As in QEMU, the base of `snapshot=on` is one of them.
    pub backing_images: Vec<BackingImage>,
}

/// A command for the device behind a disk that is no transfer, such as a SCSI command. An engine executes it without knowing
/// its content. The reply stays in the command, where the submitter finds it.
pub trait DeviceCommand: Any + Send + Sync {
    /// Sends the command to `device` and waits for the reply, which may say that the command failed.
    ///
    /// # Errors
    /// When the host refuses the command, so that there is no reply.
    ///
    /// # Safety
    /// `data` are valid for reads and writes during the call.
    #[expect(unsafe_code, reason = "the data is guest memory, which the kernel reads and writes")]
    unsafe fn execute(&self, device: BorrowedFd<'_>, data: &[libc::iovec])
    -> Result<(), DiskError>;
}

/// An opened image. The workers of all queues share it, and it keeps its locks until it is dropped. Methods about the host have no
/// default implementation: a disk around another one has to pass them on.
pub trait Disk: Any + Send + Sync {
    /// The size in bytes now, a multiple of 512. `resize` and `refresh_capacity` change it at any moment.
    fn capacity(&self) -> u64;

    /// What does not change while the disk is open.
    fn info(&self) -> &DiskInfo;

    /// The first 512 bytes, where a partition table may state the geometry. Read on the calling thread. `None`: unreadable.
    fn first_sector(&self) -> Option<[u8; 512]>;

    /// Reads the size of the file or device again, which another program may have changed, and returns the new capacity.
    ///
    /// # Errors
    /// What the host says. The capacity stays as it was.
    fn refresh_capacity(&self) -> std::io::Result<u64>;

    /// Makes the disk `bytes` long (a multiple of 512). Transfers past a smaller end fail from now on. Of a block device, which only its
    /// owner can resize, `bytes` must be the new size.
    ///
    /// # Errors
    /// `Unsupported` if images of this kind cannot be resized. Otherwise what the host says. The capacity stays as it was.
    fn resize(&self, bytes: u64) -> std::io::Result<()>;

    /// Bytes that the image occupies on the host. For a qcow2 chain, those of its first file. 0 if the host does not say.
    fn allocated(&self) -> u64;

    /// Returns the damage that a transfer has found in the image, and then `None`. Does not wait for the host.
    fn take_corruption(&self) -> Option<Corruption> {
        None
    }

    /// Executes an [`Operation::Flush`] on the calling thread, which may have to wait for the host.
    ///
    /// # Errors
    /// As [`Operation::Flush`].
    fn flush(&self) -> Result<(), DiskError>;

    /// Makes an engine for one worker, with all the threads and descriptors that it will ever need.
    ///
    /// # Errors
    /// When the host has no descriptors or memory for it.
    fn engine(self: Arc<Self>, setup: EngineSetup) -> std::io::Result<Box<dyn Engine>>;
}

/// What an engine is made of.
pub struct EngineSetup {
    /// Guest memory, which the engine keeps mapped.
    pub memory: GuestMemory,
    /// The most transfers in flight.
    pub depth: u32,
    /// The most threads in the engine's pool, which wait for the host.
    pub threads: usize,
    /// Starts these threads.
    pub spawn: Spawn,
}

/// The threads of a disk that wait for the host. The engines of its workers share them out, but none gets fewer than
/// [`MIN_THREADS`]. 16 keep a fast device busy without io_uring.
pub(crate) const MAX_THREADS: usize = 16;
/// The least threads of an engine, even if the disk has many engines: its worker may be the only busy one. Also the most, if an
/// io_uring or the worker itself executes nearly everything.
pub(crate) const MIN_THREADS: usize = 4;

/// What executes the transfers of one worker, through all resets of the device. From the first `commit` on it belongs to one thread.
/// Dropping it waits for what is in flight.
pub trait Engine: Send {
    /// Accepts a transfer. When this returns, it may be finished (see `reap`), or it may not start before `commit`. The caller keeps at
    /// most `depth` transfers in flight, and has checked each against `capacity`. If the image has shrunk since, the completion is an
    /// error.
    fn submit(&mut self, transfer: Transfer<'_>);

    /// Accepts a SCSI command, as `submit` does a transfer. `data`: the guest memory that its data comes from or goes to. The
    /// command succeeds if there is a reply, even one that reports a failure. It fails unless the disk's `scsi` is true.
    fn submit_scsi(&mut self, tag: u32, command: Arc<dyn DeviceCommand>, data: &[GuestRange]);

    /// Hands everything submitted so far to the host. Called after several `submit`s, since it may cost a system call.
    fn commit(&mut self);

    /// Whether the caller may merge requests for adjacent sectors into one transfer. If not, each request is a transfer, or
    /// several if it is large.
    fn merges(&self) -> bool {
        true
    }

    /// How many finished transfers `reap` would return without asking the host: those that finished within `submit`.
    fn finished(&self) -> usize {
        0
    }

    /// Appends finished transfers to `done`, in any order, without waiting.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// An eventfd that is written to when a transfer finishes after the last `reap`. Poll it edge-triggered (`EventSet::EDGE_TRIGGERED`),
    /// so that it need not be read. It need not be written to for transfers that finish within `submit` or `commit`, so call `reap` after
    /// `commit` and before sleeping. `None`: everything finishes within `submit` or `commit`.
    fn completion_fd(&self) -> Option<RawFd>;

    /// Waits until everything in flight is finished and appends it to `done`.
    fn wait_for_all(&mut self, done: &mut Vec<Completion>);
}

//! Disks: an opened image, and the engines that move data between it and guest memory.
//!
//! A [`Disk`] is the image: shared, immutable but for its size. Each queue worker asks it for an [`Engine`] of its own.
//! An engine that finishes at once (inline, synchronous) and one that finishes later (io_uring, worker threads) look
//! the same to the worker: `submit` many, `commit` once a batch, `reap`. Nothing here knows virtio.
//!
#![doc = include_str!("../../docs/disk-engines.md")]

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::GuestMemory;

mod block;
mod bounce;
mod buffers;
mod engine;
mod file;
mod image;
mod inline;
mod limits;
mod lock;
mod open;
mod options;
mod pool;
mod qcow2;
mod raw;
mod ring;
mod scsi;
#[cfg(test)]
mod tests;

pub use open::{OpenError, OpenReason, open};
pub use options::{Aio, CacheMode, DetectZeroes, DiscardMode, Format, OpenOptions, UnknownWord};
pub use scsi::{CDB_MAX, SENSE_MAX, ScsiCommand, ScsiDirection, ScsiReply};

/// Bytes of a sector, the unit of capacities and of every transfer's offset and length.
pub const SECTOR: u64 = 512;

/// A piece of guest RAM that a request names: checked to lie inside guest memory when the request was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte, guest-physical.
    pub address: GuestAddress,
    /// Length in bytes.
    pub length: u32,
}

/// What to do with a stretch of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to guest memory.
    Read,
    /// Guest memory to disk. `durable`: complete only when the data survives a power cut (write-through).
    Write {
        /// Durable before completion.
        durable: bool,
    },
    /// Everything that completed before this was submitted becomes durable.
    Flush,
    /// The content is no longer needed. A hint: succeeding without doing anything is allowed.
    Discard,
    /// The content becomes zeroes; with `unmap` the blocks may be deallocated, without it they must stay allocated.
    /// It is a write: `durable` means the same.
    WriteZeroes {
        /// Deallocation is welcome.
        unmap: bool,
        /// Durable before completion.
        durable: bool,
    },
    /// The content and all copies of it are destroyed.
    SecureErase,
}

/// One transfer handed to an engine.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The caller's name for the transfer; comes back in its [`Completion`]. Below the engine's depth, unique among those in flight.
    pub tag: u32,
    /// What to do.
    pub operation: Operation,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How much, in bytes: for reads and writes the sum of `ranges`.
    pub length: u64,
    /// Where in guest memory, for reads and writes.
    pub ranges: &'a [GuestRange],
}

/// A finished transfer.
#[derive(Debug)]
pub struct Completion {
    /// The tag it was submitted with.
    pub tag: u32,
    /// All of it was done, or why not.
    pub result: Result<(), DiskError>,
}

/// Why a transfer failed, in terms that do not know virtio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The host reports an error (an errno).
    #[error("host I/O error: {}", std::io::Error::from_raw_os_error(*.0))]
    Host(i32),
    /// The host has no space left (ENOSPC, EDQUOT).
    #[error("no space left on the host")]
    NoSpace,
    /// The disk cannot do this operation.
    #[error("operation not supported by this disk")]
    Unsupported,
    /// Past the end of the image, or a range outside guest memory.
    #[error("out of range")]
    OutOfRange,
}

/// Sizes that the disk asks its users to respect, all in bytes. Sources: STATX, BLK* ioctls, or the user's options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Smallest addressable unit the host can do without read-modify-write by us (512 for regular files).
    pub logical_block_size: u32,
    /// Unit the medium writes at once.
    pub physical_block_size: u32,
    /// Offset of the first physical block, in bytes.
    pub alignment_offset: u32,
    /// Suggested smallest I/O, 0 for none.
    pub min_io_size: u32,
    /// Suggested best I/O, 0 for none.
    pub opt_io_size: u32,
    /// Discards below this do nothing; 0: the disk cannot discard.
    pub discard_granularity: u32,
    /// Secure erase works.
    pub secure_erase: bool,
}

/// How worn the medium is, in eMMC's terms (JESD84-B51 §7.4.46-48), which virtio 1.2 §5.2.6 takes over as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Reserved blocks consumed: 1 normal, 2 warning (80%), 3 urgent (90%); 0 unknown.
    pub pre_eol_info: u16,
    /// Wear of the SLC part in steps of 10%: 1 is 0-10%, 0x0b is exceeded; 0 unknown.
    pub device_lifetime_est_typ_a: u16,
    /// Wear of the MLC part, likewise.
    pub device_lifetime_est_typ_b: u16,
}

/// An opened image.
pub trait Disk: Send + Sync {
    /// Size in bytes: a multiple of 512. May change while running.
    fn capacity(&self) -> u64;

    /// Neither the guest nor we may write.
    fn read_only(&self) -> bool;

    /// What the medium prefers.
    fn limits(&self) -> Limits;

    /// How worn the medium is, where the host tells.
    fn lifetime(&self) -> Option<Lifetime> {
        None
    }

    /// It is a SCSI disk of the host, and the user lets the guest talk to it: engines take SCSI commands.
    fn scsi(&self) -> bool {
        false
    }

    /// Looks at the host file or device again and returns the capacity from now on: somebody else may have resized it.
    ///
    /// # Errors
    /// When the host does not tell; the capacity stays.
    fn refresh_capacity(&self) -> std::io::Result<u64>;

    /// Makes the disk `bytes` long (a multiple of 512). Transfers past a smaller end fail from now on. A block device
    /// cannot be resized from here: `bytes` must then be what it already is, since its owner resized it.
    ///
    /// # Errors
    /// `Unsupported` when this kind of image cannot; otherwise what the host says. The capacity stays.
    fn resize(&self, bytes: u64) -> std::io::Result<()>;

    /// A private engine for one worker, with at most `depth` transfers in flight. It keeps `memory` mapped while any are.
    ///
    /// # Errors
    /// When the host lends no resources for it.
    fn engine(self: Arc<Self>, memory: GuestMemory, depth: u32) -> std::io::Result<Box<dyn Engine>>;
}

/// One worker's way to the disk. Used by one thread; dropping it waits for what is in flight.
pub trait Engine: Send {
    /// Accepts a transfer. It may already be finished on return (see `reap`), or not started before `commit`.
    /// The caller keeps at most `depth` in flight. Bounds were checked against `capacity` by the caller, but the image may
    /// have shrunk since: that is an error completion, not a panic.
    fn submit(&mut self, transfer: Transfer<'_>);

    /// Accepts a SCSI command, as `submit` does a transfer. Its completion says whether there is a reply; one that reports a
    /// failure is a reply. `data`: where its data is in guest memory, or goes. Fails unless the disk says `scsi`.
    fn submit_scsi(&mut self, tag: u32, command: Arc<ScsiCommand>, data: &[GuestRange]);

    /// Hands everything submitted so far to the host, once per batch.
    fn commit(&mut self);

    /// Appends finished transfers to `done`, without waiting.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// An eventfd that is written to when a transfer finishes after the last `reap`. Poll it edge-triggered
    /// (`EventSet::EDGE_TRIGGERED`): nobody ever reads it, which saves a system call each time. What finishes within
    /// `submit` or `commit` need not show here, so always `reap` after `commit` and before sleeping.
    /// `None`: everything finishes within `submit` or `commit`.
    fn completion_fd(&self) -> Option<RawFd>;

    /// Waits until everything in flight is finished and appends it to `done`.
    fn drain(&mut self, done: &mut Vec<Completion>);
}

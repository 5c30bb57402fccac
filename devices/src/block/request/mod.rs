//! What a descriptor chain asks the disk to do, as one value.
//!
//! [`parse()`] turns the buffers of a chain into a [`Request`], or into the [`Refusal`] that answers it. A request has passed
//! every check. It says what to do, and where its status byte goes. Its data is what is left of the chain's buffers.
//!
//! [`RequestTypes`] makes the requests that are no read, write or flush (`segments`, `identity`, SCSI commands). The device
//! plugs its implementations in: [`parse()`] and the worker know only the trait.

pub(super) mod identity;
mod parse;
pub(super) mod segments;

use vm_memory::GuestAddress;

use super::stats::{IoStatus, Kind};
use crate::GuestMemory;
use crate::disk::{Disk, DiskError, Engine, Operation};
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec::blk;

pub(super) use parse::parse;

/// What requests are checked against. One value serves all chains that are taken together.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RequestLimits {
    pub(super) features: u64,
    pub(super) capacity: u64,
    /// Logical block size in bytes.
    pub(super) block_size: u64,
    /// Largest data buffer in bytes, when SIZE_MAX was negotiated.
    pub(super) size_max: u32,
    pub(super) read_only: bool,
    /// Writes are durable before they complete.
    pub(super) write_through: bool,
    /// The limiter decides when they may start.
    pub(super) throttled: bool,
}

/// A request that passed every check. It owns nothing, so that it stays in registers.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) status: GuestAddress,
    pub(super) action: Action,
    /// The range of the disk that is transferred. For ranges, the offset of the first and the length of all.
    pub(super) range: DiskRange,
    /// Bytes of data that the device has written to guest memory when the request succeeds.
    pub(super) written: u32,
}

/// What the worker has to do for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Read the range into the writable buffers, or write the readable ones to it.
    Transfer,
    /// Make the writes durable that completed before this request was taken (virtio 1.2 §5.2.6.2).
    Flush,
    /// Discard, zero or erase the ranges in [`Details`], one after the other.
    Ranges,
    /// Nothing more: the data is written.
    Answered,
    /// Let the engine carry out the command in [`Details`].
    Command,
}

/// What requests are checked against, and what belongs to the request at hand beside a [`Request`]. The worker keeps one value.
#[derive(Default)]
pub(super) struct Details {
    pub(super) limits: RequestLimits,
    /// The offset of the first range, and the length of all.
    pub(super) range: DiskRange,
    pub(super) ranges: Vec<DiskRange>,
    /// Bytes of data that are written.
    pub(super) written: u32,
    pub(super) command: Option<Box<dyn CommandRequest>>,
    pub(super) refusal: Refusal,
}

/// An operation on a byte range of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskRange {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Why a chain did not become a request. The host's disk and the error policy never see these chains: they are counted
/// apart from the host's errors, and logged with a rate limit, because a guest can send any number of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The status `code` goes to `address`, after `written` bytes of data.
    Status { kind: Kind, address: GuestAddress, code: u8, written: u32 },
    /// No writable byte: there is nowhere to put a status.
    #[default]
    Unanswerable,
}

/// Request types beyond reads, writes and flushes, which `device` plugs in.
pub(super) trait RequestTypes: Send + Sync {
    /// Makes a request from the buffers behind the header. `None`: it does not know this request type.
    ///
    /// # Errors
    /// The inner `Err` is the status that refuses the request, and the bytes that were written before it.
    fn parse(
        &self,
        request_type: u32,
        buffers: &mut ChainBuffers,
        memory: &GuestMemory,
        details: &mut Details,
    ) -> Option<(Kind, Result<Action, Unsuitable>)>;

    /// Adds the feature bits of its request types to `features`, and their fields to the configuration space of `disk`.
    fn offer(&self, _disk: &dyn Disk, _features: &mut u64, _config: &mut blk::Config) {}
}

/// The status that refuses a request, and how many bytes of data were written before the status byte.
pub(super) type Unsuitable = (u8, u32);

/// Decides what becomes of requests that the host failed. `device` plugs the error policies in.
pub(super) trait HostErrors: Send + Sync {
    /// The status that the driver gets. `None`: the request is stopped until the VM is resumed.
    fn decide(&self, kind: Kind, error: DiskError) -> Option<u8>;

    /// Whether an error has stopped the VM.
    fn io_status(&self) -> IoStatus;

    /// The VM is resumed.
    fn clear(&self);
}

/// The byte offset of `sector`. `None`: the `length` bytes from there are not whole logical blocks, or reach past the disk's
/// end.
pub(super) fn byte_offset(sector: u64, length: u64, limits: &RequestLimits) -> Option<u64> {
    let offset = sector.checked_mul(blk::SECTOR_SIZE)?;
    let end = offset.checked_add(length)?;
    // The block size is a power of two.
    let aligned = (offset | length) & (limits.block_size - 1) == 0;
    (aligned && end <= limits.capacity).then_some(offset)
}

/// A request that the engine carries out neither as a transfer nor as a flush, such as a SCSI command.
pub(super) trait CommandRequest: Send {
    /// Hands the command to the engine, with its data in `buffers`. The completion will have this tag.
    fn submit(&self, tag: u32, buffers: &ChainBuffers, engine: &mut dyn Engine);

    /// The command is finished: writes its reply to guest memory. Returns the status, and how many bytes were written before
    /// the status byte. The driver gets every failure: the error policy does not apply.
    fn reply(&self, memory: &GuestMemory, result: Result<(), DiskError>) -> (u8, u32);
}

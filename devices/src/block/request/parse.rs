//! From the buffers of a chain to a checked request (virtio 1.2 §5.2.6), or to the status that refuses it.
//!
//! Header and status are found by byte position, never by descriptor (§2.7.4.1). Each field is copied once and the copy is
//! checked, because the driver may change its memory at any time.

use super::{
    Action, DiskRange, Refusal, Request, RequestLimits, RequestTypes, Unsuitable, byte_offset,
};
use crate::block::stats::Kind;
use crate::disk::Operation;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec::blk;
use crate::{GuestMemory, GuestRange};

/// Checks the chain in `buffers` and makes a request from it, whose data stays in `buffers`. `request_types` make the requests that
/// are no read, write or flush.
pub(in crate::block) fn parse(
    buffers: &mut ChainBuffers,
    memory: &GuestMemory,
    limits: &RequestLimits,
    request_types: &[Box<dyn RequestTypes>],
) -> Result<Request, Refusal> {
    waypoint!();
    let status = buffers.take_last_writable().ok_or(Refusal::Unanswerable)?;
    let refused = |kind, code, written| Refusal::Status { kind, address: status, code, written };
    // Type and a reserved field (32 bits each), then the sector (64 bits).
    let header = buffers.read::<[u64; 2]>(memory);
    let header = header.ok_or_else(|| refused(Kind::Other, blk::S_IOERR, 0))?;
    let [request_type, sector] = header.map(u64::from_le);
    let (kind, action) = match request_type as u32 {
        blk::T_IN => (Kind::Read, transfer(buffers.writable(), Operation::Read, sector, limits)),
        blk::T_OUT => {
            let operation = Operation::Write { durable: limits.write_through };
            (Kind::Write, transfer(buffers.readable(), operation, sector, limits))
        }
        blk::T_FLUSH => (Kind::Flush, Ok(Action::Flush)),
        other => {
            let parsed =
                request_types.iter().find_map(|types| types.parse(other, buffers, memory, limits));
            // Unknown types, and zone management (§5.2.6.2), whose feature is never offered.
            parsed.unwrap_or((Kind::Other, Err((blk::S_UNSUPP, 0))))
        }
    };
    match action {
        Ok(action) => Ok(Request { kind, status, action }),
        Err((code, written)) => Err(refused(kind, code, written)),
    }
}

/// A read or a write. Without data it succeeds if its sector exists, as in QEMU.
fn transfer(
    data: &[GuestRange],
    operation: Operation,
    sector: u64,
    limits: &RequestLimits,
) -> Result<Action, Unsuitable> {
    let (mut length, mut oversized) = (0, false);
    for range in data {
        length += u64::from(range.length);
        oversized |= range.length > limits.size_max;
    }
    let read_only = operation != Operation::Read && limits.read_only;
    // The used length has 32 bits and includes the status byte.
    if read_only || oversized || length >= u64::from(u32::MAX) {
        return Err((blk::S_IOERR, 0));
    }
    let offset = byte_offset(sector, length, limits).ok_or((blk::S_IOERR, 0))?;
    Ok(Action::Transfer(DiskRange { operation, offset, length }))
}

//! From the buffers of a chain to a checked request (virtio 1.2 §5.2.6), or to the status that refuses it.
//!
//! Header and status are found by byte position, never by descriptor (§2.7.4.1). Each field is copied once and the copy is
//! checked, because the driver may change its memory at any time.

use super::{
    Action, DiskRange, Refusal, Request, RequestLimits, RequestTypes, UnsuitableRequest,
    byte_offset,
};
use crate::block::stats::Kind;
use crate::disk::Operation;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec::blk;
use crate::{GuestMemory, GuestRange};

/// Checks the chain in `buffers` and makes a request from it, which borrows its data ranges from `buffers`. `request_types`
/// make the requests that are no read, write or flush.
pub(in crate::block) fn parse<'a>(
    buffers: &'a mut ChainBuffers,
    memory: &GuestMemory,
    limits: &RequestLimits,
    request_types: &[Box<dyn RequestTypes>],
) -> Result<Request<'a>, Refusal> {
    waypoint!();
    let status = buffers.take_last_writable().ok_or(Refusal::Unanswerable)?;
    let refused = |kind, code, written| Refusal::Status { kind, address: status, code, written };
    // Type and a reserved field (32 bits each), then the sector (64 bits).
    let header = buffers.read::<[u64; 2]>(memory);
    let header = header.ok_or_else(|| refused(Kind::Other, blk::S_IOERR, 0))?;
    let [request_type, sector] = header.map(u64::from_le);
    let transfer = |kind, data, operation| match transfer(data, operation, sector, limits) {
        Ok(action) => Ok(Request { kind, status, action, data }),
        Err(code) => Err(refused(kind, code, 0)),
    };
    let (kind, action) = match request_type as u32 {
        blk::T_IN => return transfer(Kind::Read, buffers.writable(), Operation::Read),
        blk::T_OUT => {
            let operation = Operation::Write { durable: limits.write_through };
            return transfer(Kind::Write, buffers.readable(), operation);
        }
        blk::T_FLUSH => (Kind::Flush, Action::Flush),
        other => {
            let parsed =
                request_types.iter().find_map(|types| types.parse(other, buffers, memory, limits));
            // Unknown types, and zone management (§5.2.6.2), whose feature is never offered.
            let unknown = (Kind::Other, Err(UnsuitableRequest { code: blk::S_UNSUPP, written: 0 }));
            let (kind, action) = parsed.unwrap_or(unknown);
            let refused = |bad: UnsuitableRequest| refused(kind, bad.code, bad.written);
            (kind, action.map_err(refused)?)
        }
    };
    let data = match &action {
        Action::Command(_) if !buffers.readable().is_empty() => buffers.readable(),
        _ => buffers.writable(),
    };
    Ok(Request { kind, status, action, data })
}

/// A read or a write. Without data it succeeds if its sector exists, as in QEMU.
fn transfer(
    data: &[GuestRange],
    operation: Operation,
    sector: u64,
    limits: &RequestLimits,
) -> Result<Action, u8> {
    let (mut length, mut oversized) = (0, false);
    for range in data {
        length += u64::from(range.length);
        oversized |= range.length > limits.size_max;
    }
    let read_only = operation != Operation::Read && limits.read_only;
    // The used length has 32 bits and includes the status byte.
    if read_only || oversized || length >= u64::from(u32::MAX) {
        return Err(blk::S_IOERR);
    }
    let offset = byte_offset(sector, length, limits).ok_or(blk::S_IOERR)?;
    Ok(Action::Transfer(DiskRange { operation, offset, length }))
}

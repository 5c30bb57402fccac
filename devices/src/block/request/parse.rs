//! From the buffers of a chain to a checked request (virtio 1.2 §5.2.6), or to the status that refuses it.
//!
//! Header and status are found by byte position, never by descriptor (§2.7.4.1). Each field is copied once and the copy is
//! checked, because the driver may change its memory at any time.

use super::{
    Action, Details, DiskRange, Refusal, Request, RequestLimits, RequestTypes, byte_offset,
};
use crate::block::stats::Kind;
use crate::disk::Operation;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::spec::blk;
use crate::{GuestMemory, GuestRange};

/// Checks the chain in `buffers` and makes a request from it, whose data stays in `buffers`. `request_types` make the requests that
/// are no read, write or flush. `None`: `details` have the [`Refusal`].
#[inline]
pub(in crate::block) fn parse(
    buffers: &mut ChainBuffers,
    memory: &GuestMemory,
    request_types: &[Box<dyn RequestTypes>],
    details: &mut Details,
) -> Option<Request> {
    waypoint!();
    (details.refusal, details.written) = (Refusal::Unanswerable, 0);
    let status = buffers.take_last_writable()?;
    let refuse = |details: &mut Details, kind, code, written| {
        details.refusal = Refusal::Status { kind, address: status, code, written };
        None
    };
    // Type and a reserved field (32 bits each), then the sector (64 bits).
    let Some(header) = buffers.read::<[u64; 2]>(memory) else {
        return refuse(details, Kind::Other, blk::S_IOERR, 0);
    };
    let [request_type, sector] = header.map(u64::from_le);
    let write = Operation::Write { durable: details.limits.write_through };
    let transfer = |data, operation| transfer(data, operation, sector, &details.limits);
    let (kind, action, range) = match request_type as u32 {
        blk::T_IN => (Kind::Read, Action::Transfer, transfer(buffers.writable(), Operation::Read)),
        blk::T_OUT => (Kind::Write, Action::Transfer, transfer(buffers.readable(), write)),
        blk::T_FLUSH => (Kind::Flush, Action::Flush, Some(DiskRange::default())),
        other => {
            details.range = DiskRange::default();
            let mut types = request_types.iter();
            let parsed = types.find_map(|types| types.parse(other, buffers, memory, details));
            // Unknown types, and zone management (§5.2.6.2), whose feature is never offered.
            match parsed.unwrap_or((Kind::Other, Err((blk::S_UNSUPP, 0)))) {
                (kind, Err((code, written))) => return refuse(details, kind, code, written),
                (kind, Ok(action)) => (kind, action, Some(details.range)),
            }
        }
    };
    let Some(range) = range else { return refuse(details, kind, blk::S_IOERR, 0) };
    let written = if kind == Kind::Read { range.length as u32 } else { details.written };
    Some(Request { kind, status, action, range, written })
}

/// The range of a read or a write. `None`: it breaks a limit. Without data it succeeds if its sector exists, as in QEMU.
fn transfer(
    data: &[GuestRange],
    operation: Operation,
    sector: u64,
    limits: &RequestLimits,
) -> Option<DiskRange> {
    let (mut length, mut oversized) = (0, false);
    for range in data {
        length += u64::from(range.length);
        oversized |= range.length > limits.size_max;
    }
    let read_only = operation != Operation::Read && limits.read_only;
    // The used length has 32 bits and includes the status byte.
    if read_only || oversized || length >= u64::from(u32::MAX) {
        return None;
    }
    let offset = byte_offset(sector, length, limits)?;
    Some(DiskRange { operation, offset, length })
}

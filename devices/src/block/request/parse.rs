//! From the buffers of a chain to a checked request (virtio 1.2 §5.2.6), or to the status that refuses it.
//!
//! Header, segments and status are found by byte position, never by descriptor (§2.7.4.1). Each field is read once, into
//! a local value, and checked there, because the driver may change its memory at any time.

use super::{Action, CommandSet, DiskRange, Refusal, Request, RequestLimits};
use crate::block::config_space::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::block::stats::Kind;
use crate::disk::Operation;
use crate::virtio::queue::{ChainBuffers, total};
use crate::virtio::spec::blk::{self, Segment};
use crate::{GuestMemory, GuestRange};

/// Checks the chain in `buffers` and makes a request of it, whose data stays there.
pub(in crate::block) fn parse<'a>(
    buffers: &'a mut ChainBuffers,
    memory: &GuestMemory,
    limits: &RequestLimits,
    commands: &dyn CommandSet,
) -> Result<Request<'a>, Refusal> {
    waypoint!();
    let status = buffers.take_last_writable().ok_or(Refusal::Unanswerable)?;
    let refused = |kind, code, written| Refusal::Status { kind, address: status, code, written };
    // Two words: the type with a reserved field, and the sector.
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
        blk::T_FLUSH => (Kind::Flush, Ok(Action::Flush)),
        blk::T_GET_ID => (Kind::Other, Ok(Action::GetId)),
        blk::T_DISCARD => (Kind::Discard, ranges(buffers, memory, Kind::Discard, limits)),
        blk::T_WRITE_ZEROES => {
            (Kind::WriteZeroes, ranges(buffers, memory, Kind::WriteZeroes, limits))
        }
        blk::T_SECURE_ERASE => {
            (Kind::SecureErase, ranges(buffers, memory, Kind::SecureErase, limits))
        }
        blk::T_GET_LIFETIME if limits.features & blk::F_LIFETIME != 0 => {
            (Kind::Other, Ok(Action::GetLifetime))
        }
        // Zone management ends here, too (§5.2.6.2): its feature is never offered.
        other => match commands.parse(other, buffers, memory) {
            Some(Ok(command)) => (Kind::Other, Ok(Action::Command(command))),
            Some(Err((code, written))) => return Err(refused(Kind::Other, code, written)),
            None => (Kind::Other, Err(blk::S_UNSUPP)),
        },
    };
    let action = action.map_err(|code| refused(kind, code, 0))?;
    let data = match &action {
        Action::Command(_) if !buffers.readable().is_empty() => buffers.readable(),
        _ => buffers.writable(),
    };
    Ok(Request { kind, status, action, data })
}

/// A read or a write. Without data it succeeds when its sector exists, as in QEMU.
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
    // The used length has 32 bits and counts the status too.
    if read_only || oversized || length >= u64::from(u32::MAX) {
        return Err(blk::S_IOERR);
    }
    let offset = byte_offset(sector, length, limits).ok_or(blk::S_IOERR)?;
    Ok(Action::Transfer(DiskRange { operation, offset, length }))
}

/// A discard, write-zeroes or secure-erase request. All of its segments are checked before anything is done.
fn ranges(
    buffers: &mut ChainBuffers,
    memory: &GuestMemory,
    kind: Kind,
    limits: &RequestLimits,
) -> Result<Action, u8> {
    let (feature, known_flags) = match kind {
        Kind::Discard => (blk::F_DISCARD, 0),
        Kind::WriteZeroes => (blk::F_WRITE_ZEROES, blk::SEGMENT_UNMAP),
        _ => (blk::F_SECURE_ERASE, 0),
    };
    if limits.read_only {
        return Err(blk::S_IOERR);
    }
    if limits.features & feature == 0 {
        return Err(blk::S_UNSUPP);
    }
    let length = total(buffers.readable());
    let count = length / Segment::SIZE as u64;
    if !length.is_multiple_of(Segment::SIZE as u64)
        || !(1..=u64::from(MAX_SEGMENTS)).contains(&count)
    {
        return Err(blk::S_IOERR);
    }
    let mut ranges = Vec::with_capacity(count as usize);
    let mut valid = true;
    for _ in 0..count {
        let bytes = buffers.read(memory).ok_or(blk::S_IOERR)?;
        let Segment { sector, sectors, flags } = Segment::from_le_bytes(&bytes);
        // §5.2.6.2: an unknown flag anywhere makes the whole request UNSUPP, whatever else is wrong with it.
        if flags & !known_flags != 0 {
            return Err(blk::S_UNSUPP);
        }
        let operation = match kind {
            Kind::Discard => Operation::Discard,
            Kind::WriteZeroes => Operation::WriteZeroes {
                unmap: flags & blk::SEGMENT_UNMAP != 0,
                durable: limits.write_through,
            },
            _ => Operation::SecureErase,
        };
        let length = u64::from(sectors) * blk::SECTOR_SIZE;
        match byte_offset(sector, length, limits) {
            Some(_) if sectors > MAX_SEGMENT_SECTORS => valid = false,
            Some(offset) if length > 0 => ranges.push(DiskRange { operation, offset, length }),
            Some(_) => {}
            None => valid = false,
        }
    }
    if valid { Ok(Action::Ranges(ranges)) } else { Err(blk::S_IOERR) }
}

/// Byte offset of `sector`, when it and the `length` bytes from there are whole logical blocks of the disk.
fn byte_offset(sector: u64, length: u64, limits: &RequestLimits) -> Option<u64> {
    let offset = sector.checked_mul(blk::SECTOR_SIZE)?;
    let end = offset.checked_add(length)?;
    // The block size is a power of two.
    let aligned = (offset | length) & (limits.block_size - 1) == 0;
    (aligned && end <= limits.capacity).then_some(offset)
}

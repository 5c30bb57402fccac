//! Discards, zeroes and secure erasures (virtio 1.2 §5.2.6): requests for some segments of the disk, without data.
//!
//! A capability: `device` plugs [`Segments`] in as [`RequestTypes`]. The worker knows the ranges of the disk that a request is for,
//! and hands them to the engine in pieces.

use super::{Action, Details, DiskRange, RequestLimits, RequestTypes, Unsuitable, byte_offset};
use crate::GuestMemory;
use crate::block::stats::Kind;
use crate::disk::{Disk, Operation};
use crate::virtio::queue::{ChainBuffers, total};
use crate::virtio::spec::blk::{self, Segment};

/// Most segments in a discard, write-zeroes or secure-erase request; one page of them, and Linux's own maximum.
pub(in crate::block) const MAX_SEGMENTS: u32 = 256;
/// Most sectors in one of those segments: 2 GiB, a multiple of every granularity.
pub(in crate::block) const MAX_SEGMENT_SECTORS: u32 = 1 << 22;

/// The request types that have segments.
pub(in crate::block) struct Segments;

impl RequestTypes for Segments {
    fn parse(
        &self,
        request_type: u32,
        buffers: &mut ChainBuffers,
        memory: &GuestMemory,
        details: &mut Details,
    ) -> Option<(Kind, Result<Action, Unsuitable>)> {
        let kind = match request_type {
            blk::T_DISCARD => Kind::Discard,
            blk::T_WRITE_ZEROES => Kind::WriteZeroes,
            blk::T_SECURE_ERASE => Kind::SecureErase,
            _ => return None,
        };
        let action = parse_segments(buffers, memory, kind, &details.limits, &mut details.ranges);
        let length = details.ranges.iter().map(|range| range.length).sum();
        let first = details.ranges.first().copied().unwrap_or_default();
        details.range = DiskRange { length, ..first };
        Some((kind, action.map_err(|code| (code, 0))))
    }

    fn offer(&self, disk: &dyn Disk, features: &mut u64, config: &mut blk::Config) {
        if disk.info().read_only {
            return;
        }
        let limits = disk.info().block_limits;
        *features |= blk::F_WRITE_ZEROES;
        config.max_write_zeroes_sectors = MAX_SEGMENT_SECTORS;
        config.max_write_zeroes_seg = MAX_SEGMENTS;
        let unit = limits.discard_granularity.max(config.blk_size) / blk::SECTOR_SIZE as u32;
        if limits.discard_granularity > 0 {
            *features |= blk::F_DISCARD;
            config.max_discard_sectors = MAX_SEGMENT_SECTORS;
            config.max_discard_seg = MAX_SEGMENTS;
            config.discard_sector_alignment = unit;
            config.write_zeroes_may_unmap = 1;
        }
        if limits.secure_erase {
            *features |= blk::F_SECURE_ERASE;
            config.max_secure_erase_sectors = MAX_SEGMENT_SECTORS;
            config.max_secure_erase_seg = MAX_SEGMENTS;
            config.secure_erase_sector_alignment = unit;
        }
    }
}

/// A discard, write-zeroes or secure-erase request. All of its segments are checked before anything is done.
fn parse_segments(
    buffers: &mut ChainBuffers,
    memory: &GuestMemory,
    kind: Kind,
    limits: &RequestLimits,
    ranges: &mut Vec<DiskRange>,
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
    ranges.clear();
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
    if valid { Ok(Action::Ranges) } else { Err(blk::S_IOERR) }
}

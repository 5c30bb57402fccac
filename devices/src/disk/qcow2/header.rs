//! What a qcow2 header has to say before imago may see the image. It takes the header's word for how much memory the tables
//! need, and for clusters that nobody counts it looks without end. The limits are QEMU's (block/qcow2.h), the fields those of
//! its docs/interop/qcow2.txt.

use std::fs::File;
use std::io;

use crate::disk::bounce::{Alignment, Bounce};
use crate::disk::{OpenReason, SECTOR};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header; version 3 has more.
const HEADER_SIZE: usize = 72;
/// Most entries of the first-level table: 32 MiB of them.
const L1_MAX: u64 = 4 << 20;
/// Most bytes of the refcount table.
const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
/// Incompatible features of which no repair rids an image.
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Checks the header of `file`, which wants `direct` I/O or does not care.
pub(super) fn check(file: &File, direct: Option<Alignment>) -> Result<(), OpenReason> {
    let unit = direct.map_or(1, |alignment| alignment.offset);
    let mut bounce = Bounce::default();
    let mut read = |offset, length| {
        let mut bytes = Vec::new();
        let result = bounce.read(file, unit, offset, length, |data| bytes.extend_from_slice(data));
        // Where the file ends early, what there is.
        result.or_else(|error| if error.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(error) })?;
        Ok::<_, OpenReason>(bytes)
    };
    let header = read(0, SECTOR)?;
    if header.len() < HEADER_SIZE || header[..4] != MAGIC {
        return Err(OpenReason::NotQcow2);
    }
    let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from(u32::from_be_bytes(*bytes)));
    let long = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));

    let features = if word(4) >= 3 { long(72) } else { 0 };
    for (present, feature) in [
        (word(32) != 0, "is encrypted"),
        (features & COMPRESSION_TYPE != 0, "has clusters that zstd compressed"),
        (features & EXTENDED_L2 != 0, "has extended L2 entries"),
    ] {
        if present {
            return Err(OpenReason::Qcow2Feature(feature));
        }
    }

    let cluster_bits @ 9..=21 = word(20) else { return Err(damaged("its clusters have an impossible size")) };
    let mapped_by_l2 = 1 << (2 * cluster_bits - 3);
    if word(36) > L1_MAX || long(24).div_ceil(mapped_by_l2) > L1_MAX {
        return Err(damaged("its L1 table is larger than 32 MiB, or should be"));
    }
    match word(56) << cluster_bits {
        1..=REFCOUNT_TABLE_MAX => {}
        0 => return Err(damaged("it has no refcount table")),
        _ => return Err(damaged("its refcount table is larger than 8 MiB")),
    }
    // The first entry is for the clusters from the header's on.
    let offset = long(48);
    if offset > i64::MAX as u64 - SECTOR || read(offset, 8)?.iter().all(|byte| *byte == 0) {
        return Err(damaged("its refcount table does not count the header"));
    }
    Ok(())
}

fn damaged(why: &'static str) -> OpenReason {
    OpenReason::Qcow2(io::Error::new(io::ErrorKind::InvalidData, why))
}

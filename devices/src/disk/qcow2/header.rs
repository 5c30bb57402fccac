//! Checks the header of a qcow2 image before imago sees it, and says what cannot be used and why.
//!
//! imago trusts the header. It allocates as much memory for tables as the header asks for. If the refcount table counts nothing, it searches
//! for free clusters without end. If a table of feature names ends within an entry, it panics. So this file checks sizes, with the limits of
//! QEMU's block/qcow2.h, and refuses features that imago lacks by name. The fields are those of QEMU's docs/interop/qcow2.txt.

use std::io;

use crate::disk::bounce::Bounce;
use crate::disk::host_file::HostFile;
use crate::disk::{OpenReason, SECTOR};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header. In any version, imago changes only these after it has opened the image.
pub(super) const HEADER_SIZE: usize = 72;
/// Where version 3's feature bits are, and where the fixed part of its header ends.
pub(super) const INCOMPATIBLE: u64 = 72;
pub(super) const AUTOCLEAR: u64 = 88;
pub(super) const FEATURES_END: u64 = 104;
/// Most entries of the first-level table: 32 MiB of them.
pub(super) const L1_MAX: u64 = 4 << 20;
/// Most bytes of the refcount table.
const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
/// Types of header extensions.
const BACKING_FORMAT: u64 = 0xe279_2aca;
const FEATURE_NAMES: u64 = 0x6803_f857;
/// Bytes of an entry in the table of feature names: type, bit and name.
const FEATURE_NAME: usize = 48;
/// Incompatible feature bits: closed without writing the refcounts; found corrupt.
pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 2;
/// Incompatible features that no repair removes.
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// The fields of the header that other files of this module need.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u64,
    /// Bytes of a cluster.
    pub(super) cluster: u64,
    pub(super) has_snapshots: bool,
    /// What the image calls its backing file's format. imago looks for this in version 3 only.
    pub(super) backing_format: Option<String>,
}

impl Header {
    /// Stands for a raw image, which can only be below an overlay. Then no field is used.
    pub(super) const OF_RAW: Self =
        Self { version: 3, cluster: SECTOR, has_snapshots: false, backing_format: None };
    /// What imago creates.
    pub(super) const OF_OVERLAY: Self =
        Self { version: 3, cluster: 64 << 10, has_snapshots: false, backing_format: None };
}

pub(super) fn check(file: &HostFile, writable: bool) -> Result<Header, OpenReason> {
    let mut bounce = Bounce::default();
    let mut read = |offset, length| {
        let mut bytes = Vec::new();
        let result =
            bounce.read(file, file.unit(), offset, length, |data| bytes.extend_from_slice(data));
        // If the file ends early, its bytes up to the end.
        result.or_else(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(error) }
        })?;
        Ok::<_, OpenReason>(bytes)
    };
    let header = read(0, FEATURES_END)?;
    if header.len() < HEADER_SIZE || header[..4] != MAGIC {
        return Err(OpenReason::NotQcow2);
    }
    check_features(&header, writable)?;
    let cluster_bits @ 9..=21 = word(&header, 20) else {
        return Err(OpenReason::Qcow2(damaged("its clusters have an impossible size")));
    };
    check_tables(&header, cluster_bits).map_err(OpenReason::Qcow2)?;
    // The first entry of the refcount table is for the first clusters of the file, which have the header.
    let offset = long(&header, 48);
    if offset > i64::MAX as u64 - SECTOR || read(offset, 8)?.iter().all(|byte| *byte == 0) {
        return Err(OpenReason::Qcow2(damaged("its refcount table does not count the header")));
    }
    let version = word(&header, 4);
    let extensions_start = if version >= 3 { word(&header, 100) } else { HEADER_SIZE as u64 };
    let first_cluster = read(0, 1 << cluster_bits)?;
    let mut backing_format = None;
    for (kind, data) in extensions(&first_cluster, extensions_start as usize) {
        match kind {
            BACKING_FORMAT => backing_format = String::from_utf8(data.to_vec()).ok(),
            FEATURE_NAMES if !data.len().is_multiple_of(FEATURE_NAME) => {
                return Err(OpenReason::Qcow2(damaged("its table of feature names is damaged")));
            }
            _ => {}
        }
    }
    Ok(Header {
        version,
        cluster: 1 << cluster_bits,
        has_snapshots: word(&header, 60) != 0,
        backing_format,
    })
}

/// Refuses features that imago does not have, and to write to an image that has to be repaired first.
fn check_features(header: &[u8], writable: bool) -> Result<(), OpenReason> {
    let features = if word(header, 4) >= 3 { long(header, INCOMPATIBLE as usize) } else { 0 };
    for (present, feature) in [
        (word(header, 32) != 0, "is encrypted"),
        (features & DATA_FILE != 0, "keeps its data in another file"),
        (features & COMPRESSION_TYPE != 0, "has clusters that zstd compressed"),
        (features & EXTENDED_L2 != 0, "has extended L2 entries"),
    ] {
        if present {
            return Err(OpenReason::Qcow2Feature(feature));
        }
    }
    for (bit, why) in [
        (CORRUPT, "was found to be corrupt, by QEMU or by minivmm"),
        (DIRTY, "was not closed properly and its refcounts are out of date (lazy_refcounts=on)"),
    ] {
        if writable && features & bit != 0 {
            return Err(OpenReason::Qcow2Repair(why));
        }
    }
    Ok(())
}

/// Refuses tables that are larger than QEMU allows, or too small for the disk.
fn check_tables(header: &[u8], cluster_bits: u64) -> io::Result<()> {
    let mapped_by_l2 = 1 << (2 * cluster_bits - 3);
    let (entries, needed) = (word(header, 36), long(header, 24).div_ceil(mapped_by_l2));
    if entries.max(needed) > L1_MAX {
        return Err(damaged(
            "its L1 table is larger than 32 MiB, or would have to be for its size",
        ));
    }
    if entries < needed {
        return Err(damaged("its L1 table is too small for its size"));
    }
    if word(header, 4) >= 3 && word(header, 96) > 6 {
        return Err(damaged("its refcounts have more than 64 bits"));
    }
    match word(header, 56) << cluster_bits {
        1..=REFCOUNT_TABLE_MAX => Ok(()),
        0 => Err(damaged("it has no refcount table")),
        _ => Err(damaged("its refcount table is larger than 8 MiB")),
    }
}

/// The types and the data of the header extensions, which start at `at`, as far as they are in the first cluster.
fn extensions(first_cluster: &[u8], mut at: usize) -> impl Iterator<Item = (u64, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, length) = (word(first_cluster, at), word(first_cluster, at + 4) as usize);
        let data = first_cluster.get(at + 8..at + 8 + length)?;
        at += 8 + length.next_multiple_of(8);
        (kind != 0).then_some((kind, data))
    })
}

/// An error that says what is wrong with the image.
pub(super) fn damaged(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The 32-bit number at `at` of a header or table; 0 past its end.
pub(super) fn word(bytes: &[u8], at: usize) -> u64 {
    let number = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    number.map_or(0, |bytes| u64::from(u32::from_be_bytes(*bytes)))
}

/// The 64-bit number at `at`.
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    let number = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    number.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

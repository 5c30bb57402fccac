//! The block device's features and configuration space in the specification's words, for people.
//!
//! A capability: `--verbose` prints what a driver took, and `--explain` what a disk offers. The numbers are those of [`blk`](super::blk).
//! A test compares the places of the fields with [`Config::to_le_bytes`](super::blk::Config::to_le_bytes).

use super::blk::{
    F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_GEOMETRY, F_LIFETIME, F_MQ, F_RO, F_SCSI,
    F_SECURE_ERASE, F_SEG_MAX, F_SIZE_MAX, F_TOPOLOGY, F_WRITE_ZEROES,
};
use super::{F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1};

const FEATURES: [(u64, &str); 19] = [
    (F_SIZE_MAX, "SIZE_MAX"),
    (F_SEG_MAX, "SEG_MAX"),
    (F_GEOMETRY, "GEOMETRY"),
    (F_RO, "RO"),
    (F_BLK_SIZE, "BLK_SIZE"),
    (F_SCSI, "SCSI"),
    (F_FLUSH, "FLUSH"),
    (F_TOPOLOGY, "TOPOLOGY"),
    (F_CONFIG_WCE, "CONFIG_WCE"),
    (F_MQ, "MQ"),
    (F_DISCARD, "DISCARD"),
    (F_WRITE_ZEROES, "WRITE_ZEROES"),
    (F_LIFETIME, "LIFETIME"),
    (F_SECURE_ERASE, "SECURE_ERASE"),
    (F_INDIRECT_DESC, "INDIRECT_DESC"),
    (F_EVENT_IDX, "EVENT_IDX"),
    (F_VERSION_1, "VERSION_1"),
    (F_IN_ORDER, "IN_ORDER"),
    (F_RING_RESET, "RING_RESET"),
];

/// Name, offset and size in bytes of each field of the configuration space, and the feature that makes it valid; 0: always.
const FIELDS: [(&str, usize, usize, u64); 22] = [
    ("capacity", 0, 8, 0),
    ("size_max", 8, 4, F_SIZE_MAX),
    ("seg_max", 12, 4, F_SEG_MAX),
    ("cylinders", 16, 2, F_GEOMETRY),
    ("heads", 18, 1, F_GEOMETRY),
    ("sectors", 19, 1, F_GEOMETRY),
    ("blk_size", 20, 4, F_BLK_SIZE),
    ("physical_block_exp", 24, 1, F_TOPOLOGY),
    ("alignment_offset", 25, 1, F_TOPOLOGY),
    ("min_io_size", 26, 2, F_TOPOLOGY),
    ("opt_io_size", 28, 4, F_TOPOLOGY),
    ("writeback", 32, 1, F_CONFIG_WCE),
    ("num_queues", 34, 2, F_MQ),
    ("max_discard_sectors", 36, 4, F_DISCARD),
    ("max_discard_seg", 40, 4, F_DISCARD),
    ("discard_sector_alignment", 44, 4, F_DISCARD),
    ("max_write_zeroes_sectors", 48, 4, F_WRITE_ZEROES),
    ("max_write_zeroes_seg", 52, 4, F_WRITE_ZEROES),
    ("write_zeroes_may_unmap", 56, 1, F_WRITE_ZEROES),
    ("max_secure_erase_sectors", 60, 4, F_SECURE_ERASE),
    ("max_secure_erase_seg", 64, 4, F_SECURE_ERASE),
    ("secure_erase_sector_alignment", 68, 4, F_SECURE_ERASE),
];

/// The names of the bits in `features`, the block device's and the common ones. A bit without a name here is not offered.
pub fn features(features: u64) -> String {
    let taken = FEATURES.into_iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| name);
    taken.collect::<Vec<_>>().join(" ")
}

/// The fields of a configuration space that are valid with `features`, each as `name=value`.
pub fn config(config: &[u8], features: u64) -> String {
    let valid = FIELDS.into_iter().filter(|(.., feature)| feature & !features == 0);
    let shown = valid.map(|(name, offset, size, _)| {
        let mut value = [0; 8];
        if let Some(field) = config.get(offset..offset + size) {
            value[..size].copy_from_slice(field);
        }
        format!("{name}={}", u64::from_le_bytes(value))
    });
    shown.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::blk::Config;
    use super::*;

    #[test]
    fn each_field_is_where_the_encoding_puts_it() {
        let filled = Config {
            capacity: 0x0102_0304_0506_0708,
            size_max: 2 << 24,
            seg_max: 3 << 24,
            cylinders: 4 << 8,
            heads: 5,
            sectors: 6,
            blk_size: 7 << 24,
            physical_block_exp: 8,
            alignment_offset: 9,
            min_io_size: 10 << 8,
            opt_io_size: 11 << 24,
            writeback: 12,
            num_queues: 13 << 8,
            max_discard_sectors: 14 << 24,
            max_discard_seg: 15 << 24,
            discard_sector_alignment: 16 << 24,
            max_write_zeroes_sectors: 17 << 24,
            max_write_zeroes_seg: 18 << 24,
            write_zeroes_may_unmap: 19,
            max_secure_erase_sectors: 20 << 24,
            max_secure_erase_seg: 21 << 24,
            secure_erase_sector_alignment: 22 << 24,
        };
        // As derived, `Config { capacity: 1, size_max: 2, ... }`.
        let derived = format!("{filled:?}");
        let fields = derived.trim_start_matches("Config { ").trim_end_matches(" }");
        let expected = fields.replace(": ", "=").replace(", ", " ");
        assert_eq!(config(&filled.to_le_bytes(), u64::MAX), expected);
    }

    #[test]
    fn a_field_without_its_feature_is_not_shown() {
        let bytes = Config { capacity: 8, blk_size: 512, ..Config::default() }.to_le_bytes();
        assert_eq!(config(&bytes, 0), "capacity=8");
        assert_eq!(config(&bytes, F_BLK_SIZE), "capacity=8 blk_size=512");
        assert_eq!(features(F_BLK_SIZE | F_VERSION_1), "BLK_SIZE VERSION_1");
    }
}

//! The block device (virtio 1.2 §5.2): feature bits, requests, status bytes and configuration space.
//!
//! Request types beyond reads, writes and flushes have their numbers in `optional`, which this module exports, too.
//!
//! Feature bits (§5.2.3):
//!
//! | constant | meaning |
//! |---|---|
//! | `F_SIZE_MAX` | Feature 1: `size_max` is valid. |
//! | `F_SEG_MAX` | Feature 2: `seg_max` is valid. |
//! | `F_GEOMETRY` | Feature 4: `geometry` is valid. |
//! | `F_RO` | Feature 5: the disk is read-only. |
//! | `F_BLK_SIZE` | Feature 6: `blk_size` is valid. |
//! | `F_FLUSH` | Feature 9: there may be a volatile write cache, and [`T_FLUSH`] empties it. A driver that does not accept it must not lose acknowledged writes (§5.2.5.1). |
//! | `F_TOPOLOGY` | Feature 10: `topology` is valid. |
//! | `F_CONFIG_WCE` | Feature 11: the driver may switch the write cache by `writeback`. Offered only together with [`F_FLUSH`] (§5.2.5.2). |
//! | `F_MQ` | Feature 12: there are `num_queues` queues rather than one. |
//!
//! A request (§5.2.6) is a 16-byte header that the device reads, data in either direction, and a status byte that the device
//! writes. Where one descriptor ends and the next begins is up to the driver (§2.7.4.1). Its types:
//!
//! | constant | meaning |
//! |---|---|
//! | `T_IN` | Read. |
//! | `T_OUT` | Write. |
//! | `T_FLUSH` | With [`F_FLUSH`]: completed writes become durable. |
//!
//! Sizes, offsets and status bytes:
//!
//! | constant | meaning |
//! |---|---|
//! | `SECTOR_SIZE` | Bytes in a sector: the unit of every sector number and sector count in the protocol, whatever `blk_size` says (§5.2.4, §5.2.6). |
//! | `HEADER_SIZE` | Bytes in the request header: type (le32), reserved, formerly ioprio (le32), sector (le64). |
//! | `HEADER_SECTOR` | Offset in bytes of the starting sector in the header, in units of [`SECTOR_SIZE`]. |
//! | `STATUS_SIZE` | Bytes in the status that ends a request. |
//! | `S_OK` | Done. |
//! | `S_IOERR` | Failed, by the device's or the driver's fault. |
//! | `S_UNSUPP` | The device does not do that. |

#![expect(missing_docs, reason = "the tables above and those of the structures describe each name")]

mod optional;

pub use self::optional::*;

pub const SECTOR_SIZE: u64 = 512;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_GEOMETRY: u64 = 1 << 4;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;

pub const HEADER_SIZE: usize = 16;
pub const HEADER_SECTOR: usize = 8;
pub const STATUS_SIZE: usize = 1;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;

/// The configuration space (§5.2.4, `virtio_blk_config`) without the zoned part.
///
/// Every field but `capacity` is valid only with the feature named beside it, and 0 otherwise.
///
/// | field | meaning |
/// |---|---|
/// | `capacity` | Size of the disk in sectors of 512 bytes. |
/// | `size_max` | [`F_SIZE_MAX`]: largest segment of a request, in bytes. |
/// | `seg_max` | [`F_SEG_MAX`]: most data segments in a request. |
/// | `cylinders` | [`F_GEOMETRY`]: cylinders. |
/// | `heads` | [`F_GEOMETRY`]: heads. |
/// | `sectors` | [`F_GEOMETRY`]: sectors on a track. |
/// | `blk_size` | [`F_BLK_SIZE`]: logical block size in bytes. |
/// | `physical_block_exp` | [`F_TOPOLOGY`]: log2 of the logical blocks in a physical one. |
/// | `alignment_offset` | [`F_TOPOLOGY`]: the first logical block that begins a physical one. |
/// | `min_io_size` | [`F_TOPOLOGY`]: suggested smallest I/O in logical blocks. |
/// | `opt_io_size` | [`F_TOPOLOGY`]: suggested largest I/O in logical blocks. |
/// | `writeback` | [`F_CONFIG_WCE`]: 1 for a write-back cache, 0 for write-through. The one field that the driver writes. |
/// | `num_queues` | [`F_MQ`]: the number of queues. |
/// | `max_discard_sectors` | [`F_DISCARD`]: most sectors (512 bytes) in a segment. |
/// | `max_discard_seg` | [`F_DISCARD`]: most segments in a request. |
/// | `discard_sector_alignment` | [`F_DISCARD`]: alignment of segments, in sectors (512 bytes). |
/// | `max_write_zeroes_sectors` | [`F_WRITE_ZEROES`]: most sectors (512 bytes) in a segment. |
/// | `max_write_zeroes_seg` | [`F_WRITE_ZEROES`]: most segments in a request. |
/// | `write_zeroes_may_unmap` | [`F_WRITE_ZEROES`]: 1 when [`SEGMENT_UNMAP`] may deallocate. |
/// | `max_secure_erase_sectors` | [`F_SECURE_ERASE`]: most sectors (512 bytes) in a segment. |
/// | `max_secure_erase_seg` | [`F_SECURE_ERASE`]: most segments in a request. |
/// | `secure_erase_sector_alignment` | [`F_SECURE_ERASE`]: alignment of segments, in sectors (512 bytes). |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub capacity: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub cylinders: u16,
    pub heads: u8,
    pub sectors: u8,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub writeback: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
    pub max_secure_erase_sectors: u32,
    pub max_secure_erase_seg: u32,
    pub secure_erase_sector_alignment: u32,
}

impl Config {
    pub const SIZE: usize = 72;
    /// Offset in bytes of `writeback`.
    pub const WRITEBACK_OFFSET: u64 = 32;

    /// Encodes the layout that the driver reads; padding is 0 (§5.2.5.2).
    pub fn to_le_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field)
        };
        put(0, &self.capacity.to_le_bytes());
        put(8, &self.size_max.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(16, &self.cylinders.to_le_bytes());
        put(18, &[self.heads, self.sectors]);
        put(20, &self.blk_size.to_le_bytes());
        put(24, &[self.physical_block_exp, self.alignment_offset]);
        put(26, &self.min_io_size.to_le_bytes());
        put(28, &self.opt_io_size.to_le_bytes());
        put(32, &[self.writeback]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[self.write_zeroes_may_unmap]);
        put(60, &self.max_secure_erase_sectors.to_le_bytes());
        put(64, &self.max_secure_erase_seg.to_le_bytes());
        put(68, &self.secure_erase_sector_alignment.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk as linux;

    use super::*;

    /// The layout that Linux compiles its driver with says where each field belongs.
    #[test]
    fn config_has_the_layout_of_the_linux_header() {
        type Linux = linux::virtio_blk_config;
        let mark4 = 0x4433_2211_u32;
        let with = |config: Config, offset: usize, expected: &[u8]| {
            let bytes = config.to_le_bytes();
            assert_eq!(&bytes[offset..offset + expected.len()], expected);
            assert_eq!(
                bytes.iter().filter(|byte| **byte != 0).count(),
                expected.iter().filter(|byte| **byte != 0).count()
            );
        };
        let four = mark4.to_le_bytes();
        let eight = 0x8877_6655_4433_2211_u64;
        let d = Config::default();
        with(Config { capacity: eight, ..d }, offset_of!(Linux, capacity), &eight.to_le_bytes());
        with(Config { size_max: mark4, ..d }, offset_of!(Linux, size_max), &four);
        with(Config { seg_max: mark4, ..d }, offset_of!(Linux, seg_max), &four);
        let geometry = Config { cylinders: 0x2211, heads: 0x33, sectors: 0x44, ..d };
        with(geometry, offset_of!(Linux, geometry), &four);
        with(Config { blk_size: mark4, ..d }, offset_of!(Linux, blk_size), &four);
        let exponents = Config { physical_block_exp: 1, alignment_offset: 2, ..d };
        with(exponents, offset_of!(Linux, physical_block_exp), &[1, 2]);
        with(Config { min_io_size: 0x2211, ..d }, offset_of!(Linux, min_io_size), &[0x11, 0x22]);
        with(Config { opt_io_size: mark4, ..d }, offset_of!(Linux, opt_io_size), &four);
        with(Config { writeback: 1, ..d }, offset_of!(Linux, wce), &[1]);
        assert_eq!(offset_of!(Linux, wce) as u64, Config::WRITEBACK_OFFSET);
        with(Config { num_queues: 0x2211, ..d }, offset_of!(Linux, num_queues), &[0x11, 0x22]);
        with(
            Config { max_discard_sectors: mark4, ..d },
            offset_of!(Linux, max_discard_sectors),
            &four,
        );
        with(Config { max_discard_seg: mark4, ..d }, offset_of!(Linux, max_discard_seg), &four);
        with(
            Config { discard_sector_alignment: mark4, ..d },
            offset_of!(Linux, discard_sector_alignment),
            &four,
        );
        with(
            Config { max_write_zeroes_sectors: mark4, ..d },
            offset_of!(Linux, max_write_zeroes_sectors),
            &four,
        );
        with(
            Config { max_write_zeroes_seg: mark4, ..d },
            offset_of!(Linux, max_write_zeroes_seg),
            &four,
        );
        with(
            Config { write_zeroes_may_unmap: 1, ..d },
            offset_of!(Linux, write_zeroes_may_unmap),
            &[1],
        );
        with(
            Config { max_secure_erase_sectors: mark4, ..d },
            offset_of!(Linux, max_secure_erase_sectors),
            &four,
        );
        with(
            Config { max_secure_erase_seg: mark4, ..d },
            offset_of!(Linux, max_secure_erase_seg),
            &four,
        );
        let alignment = Config { secure_erase_sector_alignment: mark4, ..d };
        with(alignment, offset_of!(Linux, secure_erase_sector_alignment), &four);
        assert_eq!(offset_of!(Linux, zoned), Config::SIZE);
    }

    #[test]
    fn numbers_agree_with_the_linux_header() {
        for (mask, bit) in [
            (F_SIZE_MAX, linux::VIRTIO_BLK_F_SIZE_MAX),
            (F_SEG_MAX, linux::VIRTIO_BLK_F_SEG_MAX),
            (F_GEOMETRY, linux::VIRTIO_BLK_F_GEOMETRY),
            (F_RO, linux::VIRTIO_BLK_F_RO),
            (F_BLK_SIZE, linux::VIRTIO_BLK_F_BLK_SIZE),
            (F_SCSI, linux::VIRTIO_BLK_F_SCSI),
            (F_FLUSH, linux::VIRTIO_BLK_F_FLUSH),
            (F_TOPOLOGY, linux::VIRTIO_BLK_F_TOPOLOGY),
            (F_CONFIG_WCE, linux::VIRTIO_BLK_F_CONFIG_WCE),
            (F_MQ, linux::VIRTIO_BLK_F_MQ),
            (F_DISCARD, linux::VIRTIO_BLK_F_DISCARD),
            (F_WRITE_ZEROES, linux::VIRTIO_BLK_F_WRITE_ZEROES),
            (F_SECURE_ERASE, linux::VIRTIO_BLK_F_SECURE_ERASE),
        ] {
            assert_eq!(mask, 1 << bit);
        }
        for (ours, theirs) in [
            (T_IN, linux::VIRTIO_BLK_T_IN),
            (T_OUT, linux::VIRTIO_BLK_T_OUT),
            (T_SCSI_CMD, linux::VIRTIO_BLK_T_SCSI_CMD),
            (T_FLUSH, linux::VIRTIO_BLK_T_FLUSH),
            (T_GET_ID, linux::VIRTIO_BLK_T_GET_ID),
            (T_DISCARD, linux::VIRTIO_BLK_T_DISCARD),
            (T_WRITE_ZEROES, linux::VIRTIO_BLK_T_WRITE_ZEROES),
            (T_SECURE_ERASE, linux::VIRTIO_BLK_T_SECURE_ERASE),
        ] {
            assert_eq!(ours, theirs);
        }
        assert_eq!(size_of::<linux::virtio_blk_outhdr>(), HEADER_SIZE);
        assert_eq!(offset_of!(linux::virtio_blk_outhdr, sector), HEADER_SECTOR);
        assert_eq!(size_of::<linux::virtio_scsi_inhdr>(), SCSI_TRAILER_SIZE);
        assert_eq!(size_of::<linux::virtio_blk_discard_write_zeroes>(), Segment::SIZE);
    }
}

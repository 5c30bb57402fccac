//! Numbers of the block device's request types beyond reads, writes and flushes (virtio 1.2 §5.2.6).
//!
//! A capability: the request types that `block/device.rs` plugs in use them (`segments`, `identity`, SCSI commands), and
//! [`blk`](super) exports them beside its own. The core serves a disk without them.
//!
//! Feature bits (§5.2.3):
//!
//! | constant | meaning |
//! |---|---|
//! | `F_SCSI` | Feature 7, legacy (§5.2.3.1): SCSI packet commands. |
//! | `F_DISCARD` | Feature 13: [`T_DISCARD`] and its limits. |
//! | `F_WRITE_ZEROES` | Feature 14: [`T_WRITE_ZEROES`] and its limits. |
//! | `F_LIFETIME` | Feature 15: [`T_GET_LIFETIME`]. |
//! | `F_SECURE_ERASE` | Feature 16: [`T_SECURE_ERASE`] and its limits. |
//!
//! Request types:
//!
//! | constant | meaning |
//! |---|---|
//! | `T_SCSI_CMD` | Legacy (§5.2.6.3), with [`F_SCSI`]: a SCSI command in `virtio_scsi_pc_req` framing. |
//! | `T_SCSI_CMD_OUT` | The same (§5.2.6.3): what Linux's driver said when the command sends data. |
//! | `T_GET_ID` | The device's name, [`ID_SIZE`] bytes. |
//! | `T_GET_LIFETIME` | With [`F_LIFETIME`]: how worn the medium is, a [`Lifetime`]. |
//! | `T_DISCARD` | With [`F_DISCARD`]: the content of some [`Segment`]s is no longer needed. |
//! | `T_WRITE_ZEROES` | With [`F_WRITE_ZEROES`]: some [`Segment`]s become zeroes. |
//! | `T_SECURE_ERASE` | With [`F_SECURE_ERASE`]: some [`Segment`]s and all copies of them are destroyed. |
//!
//! Sizes:
//!
//! | constant | meaning |
//! |---|---|
//! | `ID_SIZE` | Bytes in the answer to [`T_GET_ID`]: ASCII, padded with NUL, and without a NUL when it is this long (§5.2.6). |
//! | `SCSI_TRAILER_SIZE` | Bytes in the trailer of [`T_SCSI_CMD`] before the status byte: errors, data_len, sense_len, residual, each 32 bits (§5.2.6.3). |
//! | `SCSI_SENSE_SIZE` | Bytes in the sense buffer before that trailer (§5.2.6.3). |

#![expect(missing_docs, reason = "the tables above and those of the structures describe each name")]

pub const F_SCSI: u64 = 1 << 7;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
pub const F_LIFETIME: u64 = 1 << 15;
pub const F_SECURE_ERASE: u64 = 1 << 16;

pub const T_SCSI_CMD: u32 = 2;
pub const T_SCSI_CMD_OUT: u32 = 3;
pub const T_GET_ID: u32 = 8;
pub const T_GET_LIFETIME: u32 = 10;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;
pub const T_SECURE_ERASE: u32 = 14;

pub const ID_SIZE: usize = 20;
pub const SCSI_TRAILER_SIZE: usize = 16;
pub const SCSI_SENSE_SIZE: usize = 96;

/// One range of a discard, write-zeroes or secure-erase request (§5.2.6, `virtio_blk_discard_write_zeroes`).
///
/// | field | meaning |
/// |---|---|
/// | `sector` | The first sector, in units of [`SECTOR_SIZE`](super::SECTOR_SIZE). |
/// | `sectors` | How many sectors. |
/// | `flags` | [`SEGMENT_UNMAP`]; all other bits are reserved and an error (§5.2.6.2). |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

/// [`Segment`] flag: write-zeroes may deallocate. An error in a discard or secure erase (§5.2.6.2).
pub const SEGMENT_UNMAP: u32 = 1;

impl Segment {
    pub const SIZE: usize = 16;

    /// Decodes the layout in the request.
    pub fn from_le_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
        Self {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        }
    }

    /// Encodes the layout in the request.
    pub fn to_le_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// The answer to [`T_GET_LIFETIME`] (§5.2.6, `virtio_blk_lifetime`); 0 in any field: not known.
///
/// | field | meaning |
/// |---|---|
/// | `pre_eol_info` | Reserved blocks consumed: 1 below 80 %, 2 from 80 %, 3 from 90 %. |
/// | `estimate_type_a` | Wear of SLC cells: n is up to 10n % of the lifetime, 11 is beyond it. |
/// | `estimate_type_b` | Wear of MLC cells, as type A. |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    pub pre_eol_info: u16,
    pub estimate_type_a: u16,
    pub estimate_type_b: u16,
}

impl Lifetime {
    pub const SIZE: usize = 6;

    /// Encodes the layout in the request.
    pub fn to_le_bytes(self) -> [u8; Self::SIZE] {
        let [a0, a1] = self.pre_eol_info.to_le_bytes();
        let [b0, b1] = self.estimate_type_a.to_le_bytes();
        let [c0, c1] = self.estimate_type_b.to_le_bytes();
        [a0, a1, b0, b1, c0, c1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_survives_the_round_trip() {
        let segment =
            Segment { sector: 0x0102_0304_0506_0708, sectors: 0x0a0b_0c0d, flags: SEGMENT_UNMAP };
        let bytes = segment.to_le_bytes();
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 1, 0, 0, 0]);
        assert_eq!(Segment::from_le_bytes(&bytes), segment);
    }
}

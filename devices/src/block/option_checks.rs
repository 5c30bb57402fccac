//! Which values and combinations of a disk's options are refused: checked against each other, and against what the disk prefers.
//!
//! A capability: `device` calls [`BlockOptions::check`] when it makes a disk; what is refused gets no further.

use super::geometry::Geometry;
use super::options::{BlockError, BlockOptions, BlockSizes};
use crate::disk::BlockLimits;
use crate::virtio::spec::blk;

/// Largest queue, in descriptors. A chain then always fits one vectored transfer (IOV_MAX is 1024).
pub(super) const QUEUE_SIZE_MAX: u16 = 1024;
/// Smallest queue: a header, two data segments and a status byte.
pub(super) const QUEUE_SIZE_MIN: u16 = 4;
const QUEUES_MAX: u16 = 1024;
/// Largest logical block in bytes.
const LOGICAL_BLOCK_MAX: u32 = 32768;

impl BlockOptions {
    /// Checks the options against each other and against the disk's own `limits`.
    ///
    /// # Errors
    /// `BlockError::Option` for the first option that does not work.
    pub(super) fn check(&self, limits: &BlockLimits) -> Result<BlockSizes, BlockError> {
        self.throttling.check()?;
        let sizes = self.check_sizes(limits)?;
        let in_range = (1..=QUEUES_MAX).contains(&self.num_queues);
        require(in_range, "num-queues", self.num_queues, "must be from 1 to 1024")?;
        let size = self.queue_size;
        let fits = size.is_power_of_two() && (QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&size);
        require(fits, "queue-size", size, "must be a power of two from 4 to 1024")?;
        if let Some(serial) = &self.serial {
            let printable = serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
            let fits = printable && serial.len() <= blk::ID_SIZE;
            require(fits, "serial", serial, "must be at most 20 printable ASCII characters")?;
        }
        if let Some(Geometry { cylinders, heads, sectors }) = self.geometry {
            let all = cylinders > 0 && heads > 0 && sectors > 0;
            let given = format!("{cylinders}, {heads}, {sectors}");
            require(all, "cyls, heads, secs", given, "must all be at least 1")?;
        }
        Ok(sizes)
    }

    /// The block sizes and the suggested I/O sizes, from the options or else from the disk.
    fn check_sizes(&self, limits: &BlockLimits) -> Result<BlockSizes, BlockError> {
        let logical = self.logical_block_size.unwrap_or(limits.logical_block_size);
        let fits = logical.is_power_of_two()
            && (blk::SECTOR_SIZE as u32..=LOGICAL_BLOCK_MAX).contains(&logical);
        let why = "must be a power of two from 512 to 32768";
        require(fits, "logical-block-size", logical, why)?;
        let why = "must not be below what the host device can address";
        require(logical >= limits.logical_block_size, "logical-block-size", logical, why)?;
        let physical = self.physical_block_size.unwrap_or(limits.physical_block_size.max(logical));
        let fits = physical.is_power_of_two() && physical >= logical;
        let why = "must be a power of two and not below the logical block size";
        require(fits, "physical-block-size", physical, why)?;
        let min_io = self.min_io_size.unwrap_or(limits.min_io_size / logical * logical);
        let fits = min_io.is_multiple_of(logical) && min_io / logical <= u32::from(u16::MAX);
        let why = "must be a multiple of the logical block size, at most 65535 of them";
        require(fits, "min-io-size", min_io, why)?;
        let opt_io = self.opt_io_size.unwrap_or(limits.opt_io_size / logical * logical);
        let why = "must be a multiple of the logical block size";
        require(opt_io.is_multiple_of(logical), "opt-io-size", opt_io, why)?;
        // The first logical block of an aligned physical one; the host tells it in bytes.
        let alignment = u8::try_from(limits.alignment_offset / logical).unwrap_or(0);
        Ok(BlockSizes { logical, physical, min_io, opt_io, alignment })
    }
}

fn require(
    condition: bool,
    option: &'static str,
    value: impl ToString,
    reason: &'static str,
) -> Result<(), BlockError> {
    if condition {
        Ok(())
    } else {
        Err(BlockError::Option { option, value: value.to_string(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::TestDisk;
    use super::*;

    type Change = fn(&mut BlockOptions);

    fn check(change: Change) -> Result<BlockSizes, BlockError> {
        let mut options = BlockOptions::new("vda");
        change(&mut options);
        options.check(&TestDisk::LIMITS)
    }

    #[test]
    fn what_does_not_work_is_named() {
        let table: [(&str, Change); _] = [
            ("logical-block-size=0", |o| o.logical_block_size = Some(0)),
            ("logical-block-size=256", |o| o.logical_block_size = Some(256)),
            ("logical-block-size=1536", |o| o.logical_block_size = Some(1536)),
            ("logical-block-size=65536", |o| o.logical_block_size = Some(65536)),
            ("physical-block-size=0", |o| o.physical_block_size = Some(0)),
            ("physical-block-size=6144", |o| o.physical_block_size = Some(6144)),
            ("physical-block-size=512", |o| {
                (o.logical_block_size, o.physical_block_size) = (Some(4096), Some(512));
            }),
            ("min-io-size=100", |o| o.min_io_size = Some(100)),
            ("min-io-size=33554432", |o| o.min_io_size = Some(32 << 20)),
            ("opt-io-size=513", |o| o.opt_io_size = Some(513)),
            ("num-queues=0", |o| o.num_queues = 0),
            ("num-queues=1025", |o| o.num_queues = 1025),
            ("queue-size=0", |o| o.queue_size = 0),
            ("queue-size=2", |o| o.queue_size = 2),
            ("queue-size=100", |o| o.queue_size = 100),
            ("queue-size=2048", |o| o.queue_size = 2048),
            ("serial=123456789012345678901", |o| {
                o.serial = Some("123456789012345678901".to_owned())
            }),
            ("serial=a\nb", |o| o.serial = Some("a\nb".to_owned())),
            ("serial=\u{fc}", |o| o.serial = Some("\u{fc}".to_owned())),
            ("cyls, heads, secs=0, 1, 1", |o| {
                o.geometry = Some(Geometry { cylinders: 0, heads: 1, sectors: 1 });
            }),
        ];
        for (expected, change) in table {
            let message = check(change).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{expected}: must")), "{expected}: {message}");
        }
    }

    #[test]
    fn a_logical_block_is_not_finer_than_the_host_can_address() {
        let limits = BlockLimits { logical_block_size: 4096, ..TestDisk::LIMITS };
        let mut options = BlockOptions::new("vda");
        assert_eq!(options.check(&limits).unwrap().logical, 4096);
        options.logical_block_size = Some(512);
        assert!(options.check(&limits).is_err());
    }

    #[test]
    fn the_disk_fills_in_what_is_not_given() {
        let expected =
            BlockSizes { logical: 512, physical: 4096, min_io: 4096, opt_io: 65536, alignment: 0 };
        assert_eq!(check(|_| {}).unwrap(), expected);
        // The disk's suggestions never stand in the way of an option.
        let coarse = check(|o| o.logical_block_size = Some(32768)).unwrap();
        assert_eq!(
            coarse,
            BlockSizes { logical: 32768, physical: 32768, min_io: 0, opt_io: 65536, alignment: 0 }
        );
    }
}

//! What the driver is told before the first request: features and configuration space (virtio 1.2 §5.2.3-5.2.5).

use super::options::{BlockOptions, BlockSizes};
use super::request::RequestTypes;
use crate::disk::Disk;
use crate::virtio::spec::{self, blk};

/// What one vectored system call moves at most (MAX_RW_COUNT in Linux: INT_MAX rounded down to a page).
const MAX_TRANSFER: u32 = 0x7fff_f000;
const PAGE: u32 = 4096;

/// Fills in the geometry of a configuration space whose other fields are known.
pub(super) type GeometryRule = Box<dyn Fn(&mut blk::Config) + Send + Sync>;

/// The part of features and configuration space that stays as long as the device lives.
pub(super) struct ConfigSpace {
    pub(super) features: u64,
    /// Everything but `capacity`, `writeback`, and the geometry, which may follow the capacity.
    base: blk::Config,
    geometry: GeometryRule,
    /// Logical block size in bytes.
    pub(super) block_size: u32,
}

impl ConfigSpace {
    pub(super) fn new(
        options: &BlockOptions,
        sizes: &BlockSizes,
        disk: &dyn Disk,
        geometry: GeometryRule,
        request_types: &[Box<dyn RequestTypes>],
    ) -> Self {
        // Two descriptors of a full queue are left for header and status, as QEMU does.
        let seg_max = u32::from(options.queue_size) - 2;
        let mut features = blk::F_SIZE_MAX
            | blk::F_SEG_MAX
            | blk::F_GEOMETRY
            | blk::F_BLK_SIZE
            | blk::F_FLUSH
            | blk::F_TOPOLOGY
            | blk::F_CONFIG_WCE
            | spec::F_INDIRECT_DESC
            | spec::F_EVENT_IDX;
        let mut base = blk::Config {
            // With it a full request still fits one system call, so that no transfer needs a second for its length.
            size_max: MAX_TRANSFER / seg_max / PAGE * PAGE,
            seg_max,
            blk_size: sizes.logical,
            physical_block_exp: (sizes.physical / sizes.logical).trailing_zeros() as u8,
            alignment_offset: sizes.alignment,
            min_io_size: (sizes.min_io / sizes.logical) as u16,
            opt_io_size: sizes.opt_io / sizes.logical,
            num_queues: options.num_queues,
            ..blk::Config::default()
        };
        if options.num_queues > 1 {
            features |= blk::F_MQ;
        }
        if disk.info().read_only {
            features |= blk::F_RO;
        }
        request_types.iter().for_each(|types| types.offer(disk, &mut features, &mut base));
        Self { features, base, geometry, block_size: sizes.logical }
    }

    /// The largest data buffer in bytes, when `features` say that the driver agreed to one.
    pub(super) fn size_max(&self, features: u64) -> u32 {
        if features & blk::F_SIZE_MAX != 0 { self.base.size_max } else { u32::MAX }
    }

    /// The configuration space of a disk of `capacity` bytes, as the driver reads it.
    pub(super) fn config(&self, capacity: u64, writeback: bool) -> blk::Config {
        let mut config = blk::Config {
            capacity: capacity / blk::SECTOR_SIZE,
            writeback: u8::from(writeback),
            ..self.base
        };
        (self.geometry)(&mut config);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::device::request_types;
    use crate::block::geometry::{self, Geometry};
    use crate::block::tests::TestDisk;
    use crate::disk::{BlockLimits, Lifetime};

    fn config_space(change: impl FnOnce(&mut BlockOptions, &mut TestDisk)) -> ConfigSpace {
        let mut options = BlockOptions::new("vda");
        let mut disk = TestDisk::new(8);
        change(&mut options, &mut disk);
        let sizes = options.check(&disk.info.block_limits).unwrap();
        let geometry = Box::new(geometry::rule(options.geometry, &disk));
        let request_types = request_types(&options, &disk);
        ConfigSpace::new(&options, &sizes, &disk, geometry, &request_types)
    }

    const ALWAYS: u64 = blk::F_SIZE_MAX
        | blk::F_SEG_MAX
        | blk::F_GEOMETRY
        | blk::F_BLK_SIZE
        | blk::F_FLUSH
        | blk::F_TOPOLOGY
        | blk::F_CONFIG_WCE
        | spec::F_INDIRECT_DESC
        | spec::F_EVENT_IDX;

    #[test]
    fn features_follow_the_disk_and_the_options() {
        let all = blk::F_WRITE_ZEROES | blk::F_DISCARD | blk::F_SECURE_ERASE;
        let lifetime = Lifetime {
            pre_eol_info: 1,
            device_lifetime_est_typ_a: 1,
            device_lifetime_est_typ_b: 0,
        };
        for (expected, facts) in [
            (all, config_space(|_, _| {})),
            (all | blk::F_MQ, config_space(|options, _| options.num_queues = 4)),
            (all | blk::F_LIFETIME, config_space(|_, disk| disk.info.lifetime = Some(lifetime))),
            (
                all & !blk::F_SECURE_ERASE,
                config_space(|_, disk| disk.info.block_limits.secure_erase = false),
            ),
            (
                all & !blk::F_DISCARD,
                config_space(|_, disk| disk.info.block_limits.discard_granularity = 0),
            ),
            // A read-only disk offers nothing that writes.
            (blk::F_RO, config_space(|_, disk| disk.info.read_only = true)),
        ] {
            assert_eq!(facts.features, ALWAYS | expected);
        }
    }

    #[test]
    fn the_configuration_space_has_real_values() {
        let config = config_space(|options, _| options.num_queues = 3).config(1 << 30, true);
        let expected = blk::Config {
            capacity: 1 << 21,
            size_max: 8_454_144,
            seg_max: 254,
            cylinders: 2080,
            heads: 16,
            sectors: 63,
            blk_size: 512,
            physical_block_exp: 3,
            alignment_offset: 0,
            min_io_size: 8,
            opt_io_size: 128,
            writeback: 1,
            num_queues: 3,
            max_discard_sectors: 1 << 22,
            max_discard_seg: 256,
            discard_sector_alignment: 8,
            max_write_zeroes_sectors: 1 << 22,
            max_write_zeroes_seg: 256,
            write_zeroes_may_unmap: 1,
            max_secure_erase_sectors: 1 << 22,
            max_secure_erase_seg: 256,
            secure_erase_sector_alignment: 8,
        };
        assert_eq!(config, expected);
        // A full request fits one system call.
        assert!(u64::from(config.size_max) * u64::from(config.seg_max) <= u64::from(MAX_TRANSFER));
    }

    #[test]
    fn options_override_the_disk() {
        let facts = config_space(|options, disk| {
            disk.info.block_limits.alignment_offset = 1 << 12;
            options.queue_size = 1024;
            options.logical_block_size = Some(1024);
            options.physical_block_size = Some(8192);
            options.min_io_size = Some(16384);
            options.opt_io_size = Some(0);
            options.geometry = Some(Geometry { cylinders: 1, heads: 2, sectors: 3 });
        });
        let config = facts.config(1 << 20, false);
        assert_eq!((config.seg_max, config.blk_size, config.physical_block_exp), (1022, 1024, 3));
        assert_eq!((config.alignment_offset, config.min_io_size, config.opt_io_size), (4, 16, 0));
        assert_eq!(
            (config.cylinders, config.heads, config.sectors, config.writeback),
            (1, 2, 2, 0)
        );
    }

    #[test]
    fn limits_are_zero_exactly_when_nothing_is_offered() {
        let none = BlockLimits { discard_granularity: 0, secure_erase: false, ..TestDisk::LIMITS };
        let config = config_space(|_, disk| disk.info.block_limits = none).config(0, true);
        assert_eq!(
            (config.max_discard_sectors, config.max_discard_seg, config.discard_sector_alignment),
            (0, 0, 0)
        );
        assert_eq!((config.max_secure_erase_sectors, config.max_secure_erase_seg), (0, 0));
        assert_eq!((config.max_write_zeroes_sectors, config.max_write_zeroes_seg), (1 << 22, 256));
        assert_eq!(config.write_zeroes_may_unmap, 0);
        // Finer than a logical block there is nothing to discard.
        let coarse = config_space(|options, disk| {
            disk.info.block_limits.discard_granularity = 512;
            options.logical_block_size = Some(4096);
        });
        assert_eq!(coarse.config(0, true).discard_sector_alignment, 8);
    }
}

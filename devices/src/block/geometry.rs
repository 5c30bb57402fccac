//! The geometry of a disk, for software that still asks for it: the given one, that of an MBR, or a PC's.
//!
//! A capability: `device` plugs [`rule`] into the configuration space, which knows it as a `GeometryRule`.

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::virtio::spec::blk;

/// Disk geometry for software that still asks for it (virtio 1.2 §5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads: tracks a cylinder.
    pub heads: u8,
    /// Sectors a track, of 512 bytes.
    pub sectors: u8,
}

/// The rule for a disk, which is read for its partition table unless the geometry is `given`.
pub(super) fn rule(
    given: Option<Geometry>,
    disk: &dyn Disk,
) -> impl Fn(&mut blk::Config) + Send + Sync + use<> {
    let partitioned =
        || partition_geometry(&disk.first_sector()?, disk.capacity() / blk::SECTOR_SIZE);
    let fixed = given.or_else(partitioned);
    move |config| {
        let geometry = fixed.unwrap_or_else(|| standard_geometry(config.capacity));
        config.cylinders = geometry.cylinders;
        config.heads = geometry.heads;
        config.sectors =
            whole_blocks(geometry, config.capacity * blk::SECTOR_SIZE, config.blk_size);
    }
}

const CYLINDERS_MAX: u64 = 16383;

/// The geometry by which an MBR's partitions were laid out, as QEMU guesses it: a partition ends at the end of a cylinder.
/// More than 16 heads are a BIOS's translation of some other geometry. `capacity` is in sectors.
fn partition_geometry(sector: &[u8; 512], capacity: u64) -> Option<Geometry> {
    let (entries, signature) = sector[0x1be..].as_chunks::<16>();
    if signature != [0x55, 0xaa] {
        return None;
    }
    let (cylinders, heads, sectors) = entries.iter().find_map(|entry| {
        let [_, _, _, _, _, end_head, end_sector, _, _, _, _, _, length @ ..] = entry;
        let (heads, sectors) = (u64::from(*end_head) + 1, u64::from(end_sector & 63));
        let cylinders = capacity.checked_div(heads * sectors)?;
        let used = *length != [0; 4] && heads > 1 && (1..=CYLINDERS_MAX).contains(&cylinders);
        used.then_some((cylinders, heads, sectors))
    })?;
    (heads <= 16).then_some(Geometry {
        cylinders: cylinders as u16,
        heads: heads as u8,
        sectors: sectors as u8,
    })
}

/// A PC's disk of `capacity` sectors: 16 heads, 63 sectors, and as many cylinders as fit, 2 at least.
fn standard_geometry(capacity: u64) -> Geometry {
    let cylinders = (capacity / (16 * 63)).clamp(2, CYLINDERS_MAX);
    Geometry { cylinders: cylinders as u16, heads: 16, sectors: 63 }
}

/// The sectors in a track. If the geometry does not divide the disk into logical blocks, a track has whole ones, as in QEMU. At least
/// half of a track is left: with QEMU's 0 for blocks of 32 KiB and more, drivers would divide by zero.
fn whole_blocks(geometry: Geometry, capacity: u64, block_size: u32) -> u8 {
    let Geometry { heads, sectors, .. } = geometry;
    if (capacity / u64::from(heads) / u64::from(sectors)).is_multiple_of(block_size.into()) {
        return sectors;
    }
    let mask = (block_size / blk::SECTOR_SIZE as u32).min(32) as u8 - 1;
    sectors & !mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::tests::TestDisk;

    /// Cylinders, heads and sectors that a driver sees of a disk of `capacity` bytes.
    fn shown(
        given: Option<Geometry>,
        first_sector: Option<[u8; 512]>,
        capacity: u64,
        block_size: u32,
    ) -> (u16, u8, u8) {
        let mut disk = TestDisk::new(8);
        disk.first_sector = first_sector;
        let capacity = capacity / blk::SECTOR_SIZE;
        let mut config = blk::Config { capacity, blk_size: block_size, ..blk::Config::default() };
        rule(given, &disk)(&mut config);
        (config.cylinders, config.heads, config.sectors)
    }

    #[test]
    fn geometry_is_a_pcs_in_whole_blocks() {
        for (capacity, block_size, expected) in [
            (0, 512, (2, 16, 63)),
            (3 * 1008 * 512, 512, (3, 16, 63)),
            (1 << 30, 512, (2080, 16, 63)),
            (1 << 40, 512, (16383, 16, 63)),
            (u64::MAX, 512, (16383, 16, 63)),
            (1 << 30, 4096, (2080, 16, 56)),
            // Each of the sectors of a track is as many blocks: QEMU leaves the geometry alone.
            (16 * 63 * 4096 * 100, 4096, (800, 16, 63)),
            (1 << 30, 32768, (2080, 16, 32)),
        ] {
            assert_eq!(shown(None, None, capacity, block_size), expected, "{capacity} bytes");
        }
        let given = Geometry { cylinders: 9, heads: 2, sectors: 61 };
        assert_eq!(shown(Some(given), None, 1 << 20, 4096), (9, 2, 56));
    }

    #[test]
    fn a_partition_table_gives_the_geometry() {
        let mbr = |entries: &[(usize, u8, u8, u32)]| {
            let mut sector = [0; 512];
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
            for (index, end_head, end_sector, length) in entries {
                let entry = &mut sector[0x1be + 16 * index..];
                (entry[5], entry[6]) = (*end_head, *end_sector);
                entry[12..16].copy_from_slice(&length.to_le_bytes());
            }
            sector
        };
        let geometry = |cylinders, heads, sectors| Some(Geometry { cylinders, heads, sectors });
        let capacity = 1_000_000;
        for (sector, expected) in [
            ([0; 512], None),
            (mbr(&[]), None),
            (mbr(&[(0, 3, 17, 1)]), geometry(14705, 4, 17)),
            // The two high bits of the sector belong to the cylinder.
            (mbr(&[(3, 15, 0xc0 | 32, 9)]), geometry(1953, 16, 32)),
            // Empty, without an end, with too many cylinders: the next entry counts.
            (
                mbr(&[(0, 3, 17, 0), (1, 0, 17, 1), (2, 1, 1, 1), (3, 7, 63, 1)]),
                geometry(1984, 8, 63),
            ),
            (mbr(&[(0, 3, 0, 1)]), None),
            // A BIOS's translation, as installers write it: the standard geometry.
            (mbr(&[(0, 254, 63, 1), (1, 3, 17, 1)]), None),
        ] {
            assert_eq!(partition_geometry(&sector, capacity), expected);
        }
        // 64 sectors do not make one cylinder of 68.
        assert_eq!(shown(None, Some(mbr(&[(0, 3, 17, 1)])), 64 * 512, 512), (2, 16, 63));
        assert_eq!(shown(None, Some(mbr(&[(0, 1, 2, 1)])), 64 * 512, 512), (2, 2, 2));
    }
}

//! What the host file or device prefers, from statx(2), the block ioctls and sysfs.

use std::fs::{self, File};
use std::io;
use std::str::FromStr;

use rustix::fs::{AtFlags, StatxFlags};

use super::bounce::{Alignment, Bounce};
use super::raw::{Kind, Policy};
use super::{Lifetime, Limits, SECTOR, block};

/// The limits of a raw image.
pub(super) fn of(file: &File, kind: Kind, policy: &Policy) -> io::Result<Limits> {
    match kind {
        Kind::Regular => {
            let unit = rustix::fs::fstatvfs(file)?.f_frsize.clamp(SECTOR, 4096) as u32;
            let unit = if unit.is_power_of_two() { unit } else { SECTOR as u32 };
            // Direct I/O below its alignment is read-modify-write, so the guest had better align; 512 still works.
            let physical_block_size = policy.direct.map_or(unit, |alignment| alignment.offset.max(unit));
            Ok(Limits {
                logical_block_size: SECTOR as u32,
                physical_block_size,
                alignment_offset: 0,
                min_io_size: physical_block_size,
                opt_io_size: 0,
                discard_granularity: if policy.discard { unit } else { 0 },
                secure_erase: false,
            })
        }
        Kind::BlockDevice => {
            let (min_io_size, opt_io_size, alignment_offset) = block::io_hints(file)?;
            let logical_block_size = rustix::fs::ioctl_blksszget(file)?;
            let max_discard: u64 = sysfs(file, "queue/discard_max_bytes").unwrap_or(0);
            let granularity = sysfs(file, "queue/discard_granularity").unwrap_or(0).max(logical_block_size);
            Ok(Limits {
                logical_block_size,
                physical_block_size: rustix::fs::ioctl_blkpbszget(file)?,
                alignment_offset,
                min_io_size,
                opt_io_size,
                discard_granularity: if policy.discard && max_discard > 0 { granularity } else { 0 },
                secure_erase: block::can_secure_erase(file),
            })
        }
    }
}

/// How worn the device is: eMMC tells (Documentation/driver-api/mmc/mmc-dev-attrs.rst).
pub(super) fn lifetime(file: &File, kind: Kind) -> Option<Lifetime> {
    if kind != Kind::BlockDevice {
        return None;
    }
    let hex = |word: &str| u16::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let wear: String = sysfs(file, "device/life_time")?;
    let end_of_life: Option<String> = sysfs(file, "device/pre_eol_info");
    let (slc, mlc) = wear.split_once(' ')?;
    Some(Lifetime {
        pre_eol_info: end_of_life.as_deref().and_then(hex).unwrap_or(0),
        device_lifetime_est_typ_a: hex(slc)?,
        device_lifetime_est_typ_b: hex(mlc)?,
    })
}

/// An attribute of the block device, or of the disk that it is a partition of.
fn sysfs<T: FromStr>(device: &File, attribute: &str) -> Option<T> {
    let number = rustix::fs::fstat(device).ok()?.st_rdev;
    let directory = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let text = fs::read_to_string(format!("{directory}/{attribute}"))
        .or_else(|_| fs::read_to_string(format!("{directory}/../{attribute}")))
        .ok()?;
    text.trim().parse().ok()
}

/// The file's content is in memory: tmpfs or ramfs (linux/magic.h).
pub(super) fn in_memory(file: &File) -> io::Result<bool> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    Ok([TMPFS_MAGIC, RAMFS_MAGIC].contains(&rustix::fs::fstatfs(file)?.f_type))
}

/// What direct I/O on `file`, open with O_DIRECT, asks for. `None`: it does not work there, whatever open(2) said.
pub(super) fn direct_alignment(file: &File, kind: Kind) -> io::Result<Option<Alignment>> {
    let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if status.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let alignment = Alignment { memory: status.stx_dio_mem_align, offset: status.stx_dio_offset_align };
        return Ok((alignment.offset != 0 && alignment.supported()).then_some(alignment));
    }
    // Linux before 6.1, or a file system that does not tell: the device's block for a device, otherwise by trial.
    let works = |unit: u32| Bounce::default().probe(file, unit).is_ok();
    let unit = match kind {
        Kind::BlockDevice => Some(rustix::fs::ioctl_blksszget(file)?),
        Kind::Regular => [SECTOR as u32, 4096].into_iter().find(|unit| works(*unit)),
    };
    Ok(unit.map(|unit| Alignment { memory: unit, offset: unit }))
}

//! What Linux says of a block device that is a disk's image: its sizes, whether it discards and erases, how worn it is. From
//! the ioctls of linux/fs.h, and from sysfs.
//!
//! A capability: `open` asks here for a block device, and passes the answers on as values.

#![expect(unsafe_code, reason = "ioctl(2)")]

use std::fs::{self, File};
use std::io;
use std::str::FromStr;

use rustix::ioctl::{Getter, Opcode, ioctl};

use super::host_file::HostFile;
use super::{BlockLimits, Lifetime};

const BLKIOMIN: Opcode = 0x1278;
const BLKIOOPT: Opcode = 0x1279;
const BLKALIGNOFF: Opcode = 0x127a;

/// The sizes that a disk should announce whose bytes are the device's. `discard`: the guest's discards reach the device.
pub(super) fn limits(device: &HostFile, discard: bool) -> io::Result<BlockLimits> {
    let file = &device.file;
    // SAFETY: all three store one 32-bit integer.
    let (min_io_size, opt_io_size, offset) = unsafe {
        (
            ioctl(file, Getter::<BLKIOMIN, u32>::new())?,
            ioctl(file, Getter::<BLKIOOPT, u32>::new())?,
            ioctl(file, Getter::<BLKALIGNOFF, i32>::new())?,
        )
    };
    let logical_block_size = rustix::fs::ioctl_blksszget(file)?;
    let discards = sysfs(file, "queue/discard_max_bytes").unwrap_or(0) > 0_u64;
    let granularity = sysfs(file, "queue/discard_granularity").unwrap_or(0);
    // A misaligned range is refused with EINVAL, but only after the kernel has checked that the device can erase and is
    // open for writing: this asks without erasing anything.
    let erases = device.secure_erase(1, 1);
    Ok(BlockLimits {
        logical_block_size,
        physical_block_size: rustix::fs::ioctl_blkpbszget(file)?,
        // Linux says -1 where the devices below are misaligned to each other.
        alignment_offset: u32::try_from(offset).unwrap_or(0),
        min_io_size,
        opt_io_size,
        discard_granularity: match discard && discards {
            true => granularity.max(logical_block_size),
            false => 0,
        },
        secure_erase: erases.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)),
    })
}

/// How worn the device is, which Linux tells of eMMC (Documentation/driver-api/mmc/mmc-dev-attrs.rst).
pub(super) fn lifetime(device: &HostFile) -> Option<Lifetime> {
    let hex = |word: &str| u16::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let wear: String = sysfs(&device.file, "device/life_time")?;
    let end_of_life: Option<String> = sysfs(&device.file, "device/pre_eol_info");
    let (slc, mlc) = wear.split_once(' ')?;
    Some(Lifetime {
        pre_eol_info: end_of_life.as_deref().and_then(hex).unwrap_or(0),
        device_lifetime_est_typ_a: hex(slc)?,
        device_lifetime_est_typ_b: hex(mlc)?,
    })
}

/// An attribute of a block device, or of the disk that it is a partition of.
fn sysfs<T: FromStr>(device: &File, attribute: &str) -> Option<T> {
    let number = rustix::fs::fstat(device).ok()?.st_rdev;
    let directory =
        format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let text = fs::read_to_string(format!("{directory}/{attribute}"))
        .or_else(|_| fs::read_to_string(format!("{directory}/../{attribute}")))
        .ok()?;
    text.trim().parse().ok()
}

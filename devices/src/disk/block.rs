//! The ioctls of host block devices (linux/fs.h).

#![expect(unsafe_code, reason = "ioctl(2)")]

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl};

const BLKDISCARD: Opcode = 0x1277;
const BLKIOMIN: Opcode = 0x1278;
const BLKIOOPT: Opcode = 0x1279;
const BLKALIGNOFF: Opcode = 0x127a;
const BLKSECDISCARD: Opcode = 0x127d;

/// Suggested smallest and best I/O sizes and the offset of the first physical block, in bytes; 0 where there is none.
pub(super) fn io_hints(device: impl AsFd) -> io::Result<(u32, u32, u32)> {
    // SAFETY: all three store one 32-bit integer.
    let (minimum, optimal, offset) = unsafe {
        (
            ioctl(&device, Getter::<BLKIOMIN, u32>::new())?,
            ioctl(&device, Getter::<BLKIOOPT, u32>::new())?,
            ioctl(&device, Getter::<BLKALIGNOFF, i32>::new())?,
        )
    };
    // -1: the stack below is misaligned beyond description.
    Ok((minimum, optimal, u32::try_from(offset).unwrap_or(0)))
}

/// Tells the device that the range is unused. Whole logical blocks only.
pub(super) fn discard(device: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two 64-bit integers.
    Ok(unsafe { ioctl(device, Setter::<BLKDISCARD, [u64; 2]>::new([offset, length])) }?)
}

/// Destroys the range and all copies of it. Whole logical blocks only.
pub(super) fn secure_erase(device: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: BLKSECDISCARD reads two 64-bit integers.
    Ok(unsafe { ioctl(device, Setter::<BLKSECDISCARD, [u64; 2]>::new([offset, length])) }?)
}

/// Whether `secure_erase` can work on a device open for writing. A misaligned range is refused with EINVAL, but only
/// after the device's ability was checked: so this asks without erasing anything.
pub(super) fn can_secure_erase(device: impl AsFd) -> bool {
    secure_erase(device, 1, 1).is_err_and(|error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error()))
}

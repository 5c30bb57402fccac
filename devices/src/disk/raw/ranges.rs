//! Operations on ranges of a raw image that move no data: discards, zeroes, and secure erasure.
//!
//! A capability: `blocking` calls it on a thread that may wait. To zero a range, it tries in this order: punch a hole (if the range may
//! be unmapped), zero the range in place, write zeroes. A discard is a hint: if the host supports none, it succeeds and does nothing.

#![expect(unsafe_code, reason = "ioctl(2)")]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl};

use crate::disk::BlockLimits;
use crate::disk::bounce::Bounce;
use crate::disk::error::is_refusal;
use crate::disk::host_file::{FileKind, HostFile};
use crate::disk::job::Job;
use crate::disk::observer::FileChange;

const BLKDISCARD: Opcode = 0x1277;
const BLKSECDISCARD: Opcode = 0x127d;

/// How ranges of one image are discarded and zeroed.
pub(super) struct Ranges {
    /// The guest's discards reach the file.
    discard: bool,
    limits: BlockLimits,
    /// The file system cannot zero a range that stays allocated, so zeroes are written.
    no_zero_range: AtomicBool,
}

impl Ranges {
    pub(super) fn new(discard: bool, limits: BlockLimits) -> Self {
        Self { discard, limits, no_zero_range: AtomicBool::new(false) }
    }

    pub(super) fn discard(&self, file: &HostFile, job: &Job) -> io::Result<()> {
        let result = match file.kind {
            _ if !self.discard => return Ok(()),
            FileKind::Regular => punch_hole(file, job),
            FileKind::BlockDevice => {
                // A device discards whole blocks; those that are covered in part keep their content.
                let unit = u64::from(self.limits.logical_block_size);
                let start = job.offset.next_multiple_of(unit);
                match (job.end() - job.end() % unit).checked_sub(start) {
                    Some(length @ 1..) => file.discard_blocks(start, length),
                    _ => Ok(()),
                }
            }
        };
        // A hint that the host cannot follow is no error.
        result.or_else(|error| if is_unsuitable(&error) { Ok(()) } else { Err(error) })
    }

    pub(super) fn write_zeroes(
        &self,
        file: &HostFile,
        job: &Job,
        unmap: bool,
        bounce: &mut Bounce,
    ) -> io::Result<()> {
        if unmap && self.discard {
            match punch_hole(file, job) {
                Err(error) if is_unsuitable(&error) => {}
                result => return result,
            }
        }
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match file.fallocate(FallocateFlags::ZERO_RANGE, job.offset, job.length) {
                Err(error) if is_unsuitable(&error) => {
                    self.no_zero_range.fetch_or(is_unsupported(&error), Ordering::Relaxed);
                }
                result => return result,
            }
        }
        let (offset, length) = (job.offset, job.length);
        file.observe(FileChange::Zero { offset, length }, || {
            bounce.write(file, file.unit(), offset, length, |data| data.fill(0))
        })
    }
}

fn punch_hole(file: &HostFile, job: &Job) -> io::Result<()> {
    file.fallocate(FallocateFlags::PUNCH_HOLE, job.offset, job.length)
}

impl HostFile {
    /// The description to discard and zero ranges with. Linux drops the affected pages of a block device from the page cache only for a
    /// caller that has claimed it. Others get EBUSY if one of those pages is dirty.
    fn for_ranges(&self) -> &File {
        self.lock.as_ref().filter(|_| self.kind == FileKind::BlockDevice).unwrap_or(&self.file)
    }

    /// fallocate(2) that keeps the file's size: past the end, a punched hole does nothing and a zeroed range preallocates.
    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::KEEP_SIZE;
        let call = || rustix::fs::fallocate(self.for_ranges(), mode, offset, length);
        self.observe(FileChange::Zero { offset, length }, || Ok(rustix::io::retry_on_intr(call)?))
    }

    /// Calls `make`, which makes the change, and reports its begin and end to the observer if there is one.
    pub(in crate::disk) fn observe<R>(
        &self,
        change: FileChange<'_>,
        make: impl FnOnce() -> io::Result<R>,
    ) -> io::Result<R> {
        let number = self.begin(change);
        let result = make();
        self.end(number, result.is_ok());
        result
    }

    fn discard_blocks(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: BLKDISCARD reads two 64-bit integers.
        Ok(unsafe {
            ioctl(self.for_ranges(), Setter::<BLKDISCARD, [u64; 2]>::new([offset, length]))
        }?)
    }

    /// Destroys whole logical blocks of a block device and all copies of them.
    pub(in crate::disk) fn secure_erase(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.kind == FileKind::Regular {
            return Err(Errno::OPNOTSUPP.into());
        }
        // SAFETY: BLKSECDISCARD reads two 64-bit integers.
        Ok(unsafe {
            ioctl(self.for_ranges(), Setter::<BLKSECDISCARD, [u64; 2]>::new([offset, length]))
        }?)
    }
}

pub(super) fn is_unsupported(error: &io::Error) -> bool {
    is_refusal(error) || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV))
}

/// Whether the host cannot do this to a range: not at all, or (EINVAL, block devices) not with this alignment.
fn is_unsuitable(error: &io::Error) -> bool {
    is_unsupported(error) || error.raw_os_error() == Some(libc::EINVAL)
}

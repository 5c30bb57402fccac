//! Direct I/O (`cache=none`, `cache=directsync`): the alignment that the file requires, and which writes exclude each other.
//!
//! A capability: `open` plugs a [`DirectIo`] into a raw image. Jobs that are not aligned go to the threads that wait for the host, which
//! use a [`Bounce`] buffer.

use std::fs::File;
use std::io;
use std::ops::Range;

use libc::iovec;
use rustix::fs::{AtFlags, StatxFlags};

use super::bounce::{self, Bounce, WriteRanges};
use super::host_file::{Alignment, FileKind};
use super::job::Job;
use super::raw::DirectIo;
use super::{Operation, SECTOR};

/// The requirements of direct I/O on one image. Its queues share this value.
pub(super) struct Direct {
    alignment: Alignment,
    /// The locked units. `None` if a unit is a sector, which every write covers as a whole.
    ranges: Option<WriteRanges>,
}

impl Direct {
    pub(super) fn new(alignment: Alignment) -> Self {
        let is_coarse = u64::from(alignment.offset) > SECTOR;
        Self { alignment, ranges: is_coarse.then(WriteRanges::default) }
    }

    /// Runs `act`, which changes the units that `job` touches, while they are locked.
    pub(super) fn exclusively<R>(&self, job: &mut Job, act: impl FnOnce(&mut Job) -> R) -> R {
        let units = self.units(job);
        self.ranges.iter().for_each(|ranges| ranges.lock(&units));
        let result = act(job);
        self.ranges.iter().for_each(|ranges| ranges.unlock(&units));
        result
    }

    /// The units that `job` touches, as a byte range.
    fn units(&self, job: &Job) -> Range<u64> {
        let unit = u64::from(self.alignment.offset);
        job.offset - job.offset % unit..job.end().next_multiple_of(unit)
    }

    fn ranges(&self, job: &Job) -> Option<&WriteRanges> {
        self.ranges.as_ref().filter(|_| matches!(job.operation, Operation::Write { .. }))
    }
}

impl DirectIo for Direct {
    fn is_aligned(&self, job: &Job) -> bool {
        let Alignment { memory, offset: unit } = self.alignment;
        // Before Linux 6.18 the length of each buffer has to be a multiple of the unit, not only their sum.
        let fits = |buffer: &iovec| {
            buffer.iov_base.addr().is_multiple_of(memory as usize)
                && buffer.iov_len.is_multiple_of(unit as usize)
        };
        (job.offset | job.length).is_multiple_of(unit.into()) && job.buffers.rest().iter().all(fits)
    }

    fn try_lock_units(&self, job: &Job) -> bool {
        self.ranges(job).is_none_or(|ranges| ranges.try_lock(&self.units(job)))
    }

    fn unlock_units(&self, job: &Job) {
        if let Some(ranges) = self.ranges(job) {
            ranges.unlock(&self.units(job));
        }
    }
}

/// What direct I/O on `file`, which was opened with O_DIRECT, requires. `None`: it does not work, whatever open(2) said.
pub(super) fn alignment(file: &File, kind: FileKind) -> io::Result<Option<Alignment>> {
    let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(status) = status
        && status.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let alignment =
            Alignment { memory: status.stx_dio_mem_align, offset: status.stx_dio_offset_align };
        return Ok((alignment.offset != 0 && bounce::supports(alignment)).then_some(alignment));
    }
    // Linux is older than 6.1, the file system does not report it, or a filter refuses statx(2). Then the unit is a device's logical
    // block, or the smallest with which a read of the file succeeds.
    let works = |unit: u32| Bounce::default().probe(file, unit).is_ok();
    let unit = match kind {
        FileKind::BlockDevice => Some(rustix::fs::ioctl_blksszget(file)?),
        FileKind::Regular => [SECTOR as u32, 4096].into_iter().find(|unit| works(*unit)),
    };
    Ok(unit.map(|unit| Alignment { memory: unit, offset: unit }))
}

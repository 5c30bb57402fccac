//! Direct I/O (`cache=none`, `cache=directsync`): what the file requires of transfers, and which writes have to wait for each other.
//!
//! A capability: buffered images do without it. It hooks in as a [`DirectIo`], which `open` plugs into a raw image. Transfers that do not
//! meet the requirements go to the threads that wait for the host, which use a [`Bounce`] buffer.

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

/// What direct I/O on one image requires, shared by its queues.
pub(super) struct Direct {
    alignment: Alignment,
    /// For units larger than a sector.
    ranges: Option<WriteRanges>,
}

impl Direct {
    pub(super) fn new(alignment: Alignment) -> Self {
        let is_coarse = u64::from(alignment.offset) > SECTOR;
        Self { alignment, ranges: is_coarse.then(WriteRanges::default) }
    }

    /// Runs `act`, which modifies what `job` touches, while no other write touches the same units.
    pub(super) fn exclusively<R>(&self, job: &mut Job, act: impl FnOnce(&mut Job) -> R) -> R {
        let units = self.units(job);
        self.ranges.iter().for_each(|ranges| ranges.take(&units));
        let result = act(job);
        self.ranges.iter().for_each(|ranges| ranges.release(&units));
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
    fn takes(&self, job: &Job) -> bool {
        let Alignment { memory, offset: unit } = self.alignment;
        // Before Linux 6.18 each buffer's length has to be a multiple of the unit, not just their sum.
        let fits = |buffer: &iovec| {
            buffer.iov_base.addr().is_multiple_of(memory as usize)
                && buffer.iov_len.is_multiple_of(unit as usize)
        };
        (job.offset | job.length).is_multiple_of(unit.into()) && job.buffers.rest().iter().all(fits)
    }

    fn try_take(&self, job: &Job) -> bool {
        self.ranges(job).is_none_or(|ranges| ranges.try_take(&self.units(job)))
    }

    fn release(&self, job: &Job) {
        if let Some(ranges) = self.ranges(job) {
            ranges.release(&self.units(job));
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
    // Linux before 6.1, a file system that does not tell, or a filter that refuses statx(2): a device's logical block, otherwise by trial.
    let works = |unit: u32| Bounce::default().probe(file, unit).is_ok();
    let unit = match kind {
        FileKind::BlockDevice => Some(rustix::fs::ioctl_blksszget(file)?),
        FileKind::Regular => [SECTOR as u32, 4096].into_iter().find(|unit| works(*unit)),
    };
    Ok(unit.map(|unit| Alignment { memory: unit, offset: unit }))
}

//! A raw image: a host file or block device whose bytes are the disk's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::bounce::{Alignment, Bounce, WriteRanges};
use super::image::{Image, Job};
use super::{DiskError, Lifetime, Limits, Operation, SECTOR, block, limits};

/// What the host file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    BlockDevice,
}

/// How a raw image is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Discards reach the host (`discard=unmap`).
    pub(super) discard: bool,
    /// The file bypasses the page cache, and wants this.
    pub(super) direct: Option<Alignment>,
}

/// An open raw image.
pub(super) struct RawFile {
    file: File,
    /// A block device that is claimed (O_EXCL), by which its ranges are discarded and zeroed. Linux takes their pages out of the
    /// cache on the claimant's word alone, and fails the calls of others with EBUSY where a page is dirty.
    claimed: Option<File>,
    kind: Kind,
    policy: Policy,
    limits: Limits,
    /// Bytes, a multiple of the sector size.
    capacity: AtomicU64,
    /// Written data was lost: the page cache forgot what it could not write, so no later flush can be believed.
    lost_writes: AtomicBool,
    /// The file system zeroes no ranges without deallocating them, so zeroes are written out.
    no_zero_range: AtomicBool,
    in_memory: bool,
    /// Writes under way, where they may touch the same unit of direct I/O although the guest's sectors differ.
    write_ranges: Option<WriteRanges>,
}

impl RawFile {
    /// Wraps an open file. `kind` and `policy.direct` are the file's.
    pub(super) fn new(file: File, kind: Kind, policy: Policy) -> io::Result<Self> {
        let limits = limits::of(&file, kind, &policy)?;
        let write_ranges =
            policy.direct.filter(|alignment| u64::from(alignment.offset) > SECTOR).map(|_| Default::default());
        let image = Self {
            in_memory: kind == Kind::Regular && limits::in_memory(&file)?,
            file,
            claimed: None,
            kind,
            policy,
            limits,
            capacity: AtomicU64::new(0),
            lost_writes: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            write_ranges,
        };
        image.refresh_capacity()?;
        Ok(image)
    }

    /// With another descriptor of the same device, claimed and open for writing.
    pub(super) fn claimed(self, device: Option<File>) -> Self {
        Self { claimed: device, ..self }
    }

    /// What to discard and zero ranges by.
    fn by_range(&self) -> &File {
        self.claimed.as_ref().unwrap_or(&self.file)
    }

    /// Whether `job`, a read or write, can go to the file as it is.
    fn suits(&self, job: &Job) -> bool {
        self.policy.direct.is_none_or(|alignment| {
            let unit = u64::from(alignment.offset);
            (job.offset | job.length).is_multiple_of(unit) && job.buffers.aligned(alignment)
        })
    }

    /// The page cache is bypassed.
    pub(super) fn is_direct(&self) -> bool {
        self.policy.direct.is_some()
    }

    /// The file is in memory: no call on it waits for a device.
    pub(super) fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether io_uring serves `job` well, in one piece. If so its units are taken until `release`.
    pub(super) fn admits(&self, job: &Job) -> bool {
        match job.operation {
            Operation::Read => self.suits(job),
            // Buffered writes it hands to kernel threads, one at a time for each file: durable ones at depth 32 are 20 times
            // faster on threads of our own (ext4, Linux 6.18).
            Operation::Write { .. } => {
                self.is_direct()
                    && self.suits(job)
                    && self.write_ranges.as_ref().is_none_or(|ranges| ranges.try_take(&self.units(job)))
            }
            Operation::Flush => !self.lost_writes(),
            _ => false,
        }
    }

    /// Gives back what `admits` took for `job`, which has not moved since.
    pub(super) fn release(&self, job: &Job) {
        if let (Some(ranges), Operation::Write { .. }) = (&self.write_ranges, job.operation) {
            ranges.release(&self.units(job));
        }
    }

    /// The units of direct I/O that `job` touches, as a byte range.
    fn units(&self, job: &Job) -> Range<u64> {
        let unit = self.policy.direct.map_or(SECTOR, |alignment| u64::from(alignment.offset));
        job.offset - job.offset % unit..job.end().next_multiple_of(unit)
    }

    /// No flush can be believed any more.
    fn lost_writes(&self) -> bool {
        self.lost_writes.load(Ordering::Relaxed)
    }

    /// An fdatasync failed. Without the page cache the device may still hold the data, and the next one may succeed.
    pub(super) fn flush_failed(&self) {
        if !self.is_direct() {
            self.lost_writes.store(true, Ordering::Relaxed);
        }
    }

    fn read(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 && self.suits(job) {
            match job.buffers.read_from(&self.file, job.offset, 0)? {
                // The image was cut short behind our back.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => job.advance(count),
            }
        }
        let (offset, length) = (job.offset, job.length);
        bounce.read(&self.file, self.unit(), offset, length, |data| job.fill(data))
    }

    fn write(&self, job: &mut Job, durable: bool, bounce: &mut Bounce) -> io::Result<()> {
        let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
        while job.length > 0 && self.suits(job) {
            match job.buffers.write_to(&self.file, job.offset, flags.bits() as i32)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => job.advance(count),
            }
        }
        let (offset, length) = (job.offset, job.length);
        bounce.write(&self.file, self.unit(), offset, length, flags, |data| job.take(data))
    }

    /// Makes what was written durable, now.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.lost_writes() {
            return Err(Errno::IO.into());
        }
        rustix::fs::fdatasync(&self.file).map_err(|error| {
            self.flush_failed();
            error.into()
        })
    }

    fn discard(&self, job: &Job) -> io::Result<()> {
        if !self.policy.discard {
            return Ok(());
        }
        let result = match self.kind {
            Kind::Regular => self.fallocate(FallocateFlags::PUNCH_HOLE, job),
            Kind::BlockDevice => {
                // A device takes whole blocks; what a hint covers only in part stays.
                let unit = u64::from(self.limits.logical_block_size);
                let (start, end) = (job.offset.next_multiple_of(unit), job.end() - job.end() % unit);
                if start < end { block::discard(self.by_range(), start, end - start) } else { Ok(()) }
            }
        };
        // A hint that cannot be followed is no error.
        result.or_else(|error| if unsupported(&error) { Ok(()) } else { Err(error) })
    }

    fn write_zeroes(&self, job: &Job, unmap: bool, durable: bool, bounce: &mut Bounce) -> io::Result<()> {
        let unmap = unmap && self.policy.discard;
        let unmapped =
            if unmap { self.fallocate(FallocateFlags::PUNCH_HOLE, job) } else { Err(Errno::OPNOTSUPP.into()) };
        unmapped
            .or_else(|error| match unsupported(&error) {
                true if !self.no_zero_range.load(Ordering::Relaxed) => self.fallocate(FallocateFlags::ZERO_RANGE, job),
                _ => Err(error),
            })
            .or_else(|error| {
                if !unsupported(&error) {
                    return Err(error);
                }
                if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                    self.no_zero_range.store(true, Ordering::Relaxed);
                }
                let (offset, length) = (job.offset, job.length);
                bounce.write(&self.file, self.unit(), offset, length, ReadWriteFlags::empty(), |data| data.fill(0))
            })?;
        if durable { self.flush() } else { Ok(()) }
    }

    /// The file keeps its size: past its end, a punched hole is nothing and a zeroed range is preallocation.
    fn fallocate(&self, mode: FallocateFlags, job: &Job) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(self.by_range(), mode | FallocateFlags::KEEP_SIZE, job.offset, job.length) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn unit(&self) -> u32 {
        self.policy.direct.map_or(1, |alignment| alignment.offset)
    }
}

/// The host cannot do this to this range: not at all (EOPNOTSUPP), or not at this alignment (EINVAL, block devices).
fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

impl Image for RawFile {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn lifetime(&self) -> Option<Lifetime> {
        limits::lifetime(&self.file, self.kind)
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        // The file offset is ours to move: all transfers name theirs.
        let length = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?;
        let capacity = length - length % SECTOR;
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        let unit = self.policy.direct.map_or(SECTOR, |alignment| u64::from(alignment.offset).max(SECTOR));
        if bytes == 0 || !bytes.is_multiple_of(unit) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the size must be a multiple of {unit} bytes"),
            ));
        }
        match self.kind {
            Kind::Regular => {
                self.file.set_len(bytes)?;
                self.refresh_capacity().map(drop)
            }
            Kind::BlockDevice => match self.refresh_capacity()? {
                actual if actual == bytes => Ok(()),
                actual => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("the device is {actual} bytes long; resize it on the host first"),
                )),
            },
        }
    }

    fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        let modifies = !matches!(job.operation, Operation::Read | Operation::Flush);
        let ranges = self.write_ranges.as_ref().filter(|_| modifies);
        let units = self.units(job);
        ranges.inspect(|ranges| ranges.take(&units));
        let result = match job.operation {
            Operation::Read => self.read(job, bounce),
            Operation::Write { durable } => self.write(job, durable, bounce),
            Operation::Flush => self.flush(),
            Operation::Discard => self.discard(job),
            Operation::WriteZeroes { unmap, durable } => self.write_zeroes(job, unmap, durable, bounce),
            Operation::SecureErase => match self.kind {
                Kind::BlockDevice => block::secure_erase(self.by_range(), job.offset, job.length),
                Kind::Regular => Err(Errno::OPNOTSUPP.into()),
            },
        };
        ranges.inspect(|ranges| ranges.release(&units));
        Ok(result?)
    }

    fn raw_file(&self) -> Option<&RawFile> {
        Some(self)
    }
}

impl AsFd for RawFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

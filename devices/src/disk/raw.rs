//! A raw image: a host file or block device whose bytes are the disk's.
//!
//! The pool's threads call [`RawImage::execute`], which serves every operation and may wait. For what needs no waiting
//! thread the engine goes to the file itself (see the engine's `route`); it asks here where the data is ([`Medium`]) and
//! whether direct I/O takes a transfer as it is. Where the host lacks a way to do something, the next best one is tried:
//! zeroes are punched, zeroed in place, or written; a discard, which is a hint, then does nothing.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::FallocateFlags;

use super::bounce::{Bounce, WriteRanges};
use super::error::is_refusal;
use super::host_file::{FileKind, HostFile};
use super::job::Job;
use super::{Change, DiskError, Lifetime, Limits, Operation, SECTOR};

/// Where a transfer finds its data. It decides what the transfer has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The file itself is in memory (tmpfs): no transfer waits for a device.
    Memory,
    /// Data goes through the page cache: writes are copies, reads may be.
    PageCache,
    /// Direct I/O: each transfer waits for the device, and goes through a bounce buffer unless it is aligned.
    Direct { aligned: bool },
    /// Not in a raw image: a format has to translate.
    Translated,
}

/// An open raw image. Each call may come from any thread, several at once.
pub(super) struct RawImage {
    file: HostFile,
    in_memory: bool,
    discard: bool,
    limits: Limits,
    lifetime: Option<Lifetime>,
    capacity: AtomicU64,
    /// The file system cannot zero a range that stays allocated, so zeroes are written.
    no_zero_range: AtomicBool,
    /// The host refuses pwritev2(2) or its RWF_DSYNC, so that durable writes are followed by a flush.
    no_durable_writes: AtomicBool,
    /// For direct I/O in units larger than a sector.
    write_ranges: Option<WriteRanges>,
}

impl RawImage {
    /// `limits` and `lifetime` are those of the file; `discard`: the guest's discards reach it.
    pub(super) fn new(
        file: HostFile,
        limits: Limits,
        lifetime: Option<Lifetime>,
        discard: bool,
    ) -> io::Result<Self> {
        let image = Self {
            limits,
            lifetime,
            in_memory: file.in_memory(),
            write_ranges: (u64::from(file.unit()) > SECTOR).then(WriteRanges::default),
            file,
            discard,
            capacity: AtomicU64::new(0),
            no_zero_range: AtomicBool::new(false),
            no_durable_writes: AtomicBool::new(false),
        };
        image.refresh_capacity()?;
        Ok(image)
    }

    pub(super) fn file(&self) -> &HostFile {
        &self.file
    }

    pub(super) fn medium(&self, job: &Job) -> Medium {
        match self.file.direct {
            Some(_) => Medium::Direct { aligned: self.aligned(job) },
            None if self.in_memory => Medium::Memory,
            None => Medium::PageCache,
        }
    }

    /// Whether every transfer is a copy from or to the host's memory.
    pub(super) fn is_in_memory(&self) -> bool {
        self.in_memory && self.file.direct.is_none()
    }

    /// Whether `job`, a read or write, can go to the file without a bounce buffer.
    fn aligned(&self, job: &Job) -> bool {
        self.file.direct.is_none_or(|alignment| {
            let unit = u64::from(alignment.offset);
            (job.offset | job.length).is_multiple_of(unit) && job.buffers.aligned(alignment)
        })
    }

    /// Before a transfer that no pool thread makes: takes the units that a write touches. False if another write has some
    /// of them; the transfer must then wait in the pool.
    pub(super) fn try_take_units(&self, job: &Job) -> bool {
        match (&self.write_ranges, job.operation) {
            (Some(ranges), Operation::Write { .. }) => ranges.try_take(&self.units(job)),
            _ => true,
        }
    }

    /// Gives back what `try_take_units` took; `job` has not advanced since.
    pub(super) fn release_units(&self, job: &Job) {
        if let (Some(ranges), Operation::Write { .. }) = (&self.write_ranges, job.operation) {
            ranges.release(&self.units(job));
        }
    }

    /// The units of direct I/O that `job` touches, as a byte range.
    fn units(&self, job: &Job) -> Range<u64> {
        let unit = u64::from(self.file.unit());
        job.offset - job.offset % unit..job.end().next_multiple_of(unit)
    }

    /// Does what is left of `job`. `bounce` is the calling thread's.
    pub(super) fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        let modifies = !matches!(job.operation, Operation::Read | Operation::Flush);
        let ranges = self.write_ranges.as_ref().filter(|_| modifies);
        let units = self.units(job);
        ranges.inspect(|ranges| ranges.take(&units));
        let result = match job.operation {
            Operation::Read => self.read(job, bounce),
            Operation::Write { durable: true } => self.write_durably(job, bounce),
            Operation::Write { durable: false } => self.write(job, bounce),
            Operation::Flush => self.file.flush(),
            Operation::Discard => self.discard(job),
            Operation::WriteZeroes { unmap, durable } => self
                .write_zeroes(job, unmap, bounce)
                .and_then(|()| if durable { self.file.flush() } else { Ok(()) }),
            Operation::SecureErase => self.file.secure_erase(job.offset, job.length),
        };
        ranges.inspect(|ranges| ranges.release(&units));
        Ok(result?)
    }

    fn read(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 && self.aligned(job) {
            match job.buffers.read_from(&self.file, job.offset, 0)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => job.advance(count),
            }
        }
        let (offset, length) = (job.offset, job.length);
        bounce.read(&self.file, self.file.unit(), offset, length, |data| job.fill(data))
    }

    fn write(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        self.write_aligned(job, 0)?;
        let (offset, length) = (job.offset, job.length);
        let change = self.file.begin(|| job.written(false));
        let result =
            bounce.write(&self.file, self.file.unit(), offset, length, |data| job.take(data));
        self.file.end(change, result.is_ok());
        result
    }

    /// Writes as much of `job` as needs no bounce buffer.
    fn write_aligned(&self, job: &mut Job, flags: i32) -> io::Result<()> {
        while job.length > 0 && self.aligned(job) {
            match self.write_some(job, flags)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => job.advance(count),
            }
        }
        Ok(())
    }

    /// One system call that writes the start of `job`. Returns how many bytes it wrote.
    pub(super) fn write_some(&self, job: &Job, flags: i32) -> io::Result<u64> {
        let change = || job.written(flags & libc::RWF_DSYNC != 0);
        self.file.observe(change, || job.buffers.write_to(&self.file, job.offset, flags))
    }

    fn write_durably(&self, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        if !self.no_durable_writes.load(Ordering::Relaxed) {
            match self.write_aligned(job, libc::RWF_DSYNC) {
                Err(error) if is_unsupported(&error) => {
                    self.no_durable_writes.store(true, Ordering::Relaxed);
                }
                result => result.map_err(|error| self.file.durable_write_failed(error))?,
            }
        }
        if job.length == 0 {
            return Ok(());
        }
        self.write(job, bounce)?;
        self.file.flush()
    }

    fn discard(&self, job: &Job) -> io::Result<()> {
        let result = match self.file.kind {
            _ if !self.discard => return Ok(()),
            FileKind::Regular => self.punch_hole(job),
            FileKind::BlockDevice => {
                // A device discards whole blocks; those that are covered in part keep their content.
                let unit = u64::from(self.limits.logical_block_size);
                let start = job.offset.next_multiple_of(unit);
                match (job.end() - job.end() % unit).checked_sub(start) {
                    Some(length @ 1..) => self.file.discard_blocks(start, length),
                    _ => Ok(()),
                }
            }
        };
        // A hint that the host cannot follow is no error.
        result.or_else(|error| if is_unsuitable(&error) { Ok(()) } else { Err(error) })
    }

    fn write_zeroes(&self, job: &Job, unmap: bool, bounce: &mut Bounce) -> io::Result<()> {
        if unmap && self.discard {
            match self.punch_hole(job) {
                Err(error) if is_unsuitable(&error) => {}
                result => return result,
            }
        }
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match self.file.fallocate(FallocateFlags::ZERO_RANGE, job.offset, job.length) {
                Err(error) if is_unsuitable(&error) => {
                    self.no_zero_range.fetch_or(is_unsupported(&error), Ordering::Relaxed);
                }
                result => return result,
            }
        }
        let (offset, length) = (job.offset, job.length);
        self.file.observe(
            || Change::Zero { offset, length },
            || bounce.write(&self.file, self.file.unit(), offset, length, |data| data.fill(0)),
        )
    }

    fn punch_hole(&self, job: &Job) -> io::Result<()> {
        self.file.fallocate(FallocateFlags::PUNCH_HOLE, job.offset, job.length)
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn lifetime(&self) -> Option<Lifetime> {
        self.lifetime
    }

    pub(super) fn refresh_capacity(&self) -> io::Result<u64> {
        let length = self.file.length()?;
        let capacity = length - length % SECTOR;
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }

    pub(super) fn resize(&self, bytes: u64) -> io::Result<()> {
        let unit = u64::from(self.file.unit()).max(SECTOR);
        if bytes == 0 || !bytes.is_multiple_of(unit) {
            let reason = format!("the size must be a multiple of {unit} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        if self.file.kind == FileKind::Regular {
            // First: a write that begins beyond the new end would make the file longer again. One that is on its way may.
            self.capacity.fetch_min(bytes, Ordering::Relaxed);
            let keep = |_: &io::Error| drop(self.refresh_capacity());
            let resized = self.file.file.set_len(bytes).inspect_err(keep);
            return resized.map(|()| self.capacity.store(bytes, Ordering::Relaxed));
        }
        match self.refresh_capacity()? {
            actual if actual == bytes => Ok(()),
            actual => {
                let reason =
                    format!("the device is {actual} bytes long; resize it on the host first");
                Err(io::Error::new(io::ErrorKind::Unsupported, reason))
            }
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    is_refusal(error) || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV))
}

/// Whether the host cannot do this to a range: not at all, or (EINVAL, block devices) not with this alignment.
fn is_unsuitable(error: &io::Error) -> bool {
    is_unsupported(error) || error.raw_os_error() == Some(libc::EINVAL)
}

//! Executes jobs of every kind on a raw image, on a thread that may wait for the host. The engine sends it transfers that are not aligned
//! for direct I/O, buffered transfers that may have to wait, and operations that move no data.
//!
//! A capability: the engine executes all other jobs itself. The threads of its pool call [`Blocking::execute`], through `execute`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ranges::{Ranges, is_unsupported};
use super::{DirectIo, RawImage};
use crate::disk::bounce::Bounce;
use crate::disk::direct::Direct;
use crate::disk::host_file::{FileKind, HostFile};
use crate::disk::job::Job;
use crate::disk::observer::FileChange;
use crate::disk::{BlockLimits, DiskError, Operation, SECTOR};

/// What these operations have learned about the image's host.
pub(in crate::disk) struct Blocking {
    direct: Option<Arc<Direct>>,
    ranges: Ranges,
    /// The host refuses pwritev2(2) or its RWF_DSYNC: a durable write is then a write and a flush.
    no_durable_writes: AtomicBool,
}

impl Blocking {
    /// For an image with these `limits`. `direct`: the requirements of direct I/O, if the file was opened for it. `discard`: the guest's discards reach
    /// the file.
    pub(in crate::disk) fn new(
        limits: BlockLimits,
        direct: Option<Arc<Direct>>,
        discard: bool,
    ) -> Self {
        let ranges = Ranges::new(discard, limits);
        Self { direct, ranges, no_durable_writes: AtomicBool::new(false) }
    }

    /// Executes what is left of `job`. `bounce` belongs to the calling thread.
    pub(in crate::disk) fn execute(
        &self,
        image: &RawImage,
        job: &mut Job,
        bounce: &mut Bounce,
    ) -> Result<(), DiskError> {
        let modifies = !matches!(job.operation, Operation::Read | Operation::Flush);
        let result = match self.direct.as_ref().filter(|_| modifies) {
            Some(direct) => direct.exclusively(job, |job| self.act(image, job, bounce)),
            None => self.act(image, job, bounce),
        };
        Ok(result?)
    }

    fn act(&self, image: &RawImage, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        let file = image.file();
        match job.operation {
            Operation::Read => self.read(image, job, bounce),
            Operation::Write { durable: true } => self.write_durably(image, job, bounce),
            Operation::Write { durable: false } => self.write(image, job, bounce),
            Operation::Flush => file.flush(),
            Operation::Discard => self.ranges.discard(file, job),
            Operation::WriteZeroes { unmap, durable } => {
                self.ranges.write_zeroes(file, job, unmap, bounce)?;
                if durable { file.flush() } else { Ok(()) }
            }
            Operation::SecureErase => file.secure_erase(job.offset, job.length),
        }
    }

    /// Whether the file takes `job`, a read or write, without a bounce buffer.
    fn is_aligned(&self, job: &Job) -> bool {
        self.direct.as_ref().is_none_or(|direct| direct.is_aligned(job))
    }

    fn read(&self, image: &RawImage, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        while job.length > 0 && self.is_aligned(job) {
            match job.buffers.read_from(image.file(), job.offset, 0)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => job.advance(count),
            }
        }
        let (file, offset, length) = (image.file(), job.offset, job.length);
        bounce.read(file, file.unit(), offset, length, |data| job.copy_to_guest(data))
    }

    fn write(&self, image: &RawImage, job: &mut Job, bounce: &mut Bounce) -> io::Result<()> {
        self.write_aligned(image, job, 0)?;
        let (file, offset, length) = (image.file(), job.offset, job.length);
        let change = file.begin(FileChange::Write { job, durable: false });
        let result =
            bounce.write(file, file.unit(), offset, length, |data| job.copy_from_guest(data));
        file.end(change, result.is_ok());
        result
    }

    /// Writes as much of `job` as needs no bounce buffer.
    fn write_aligned(&self, image: &RawImage, job: &mut Job, flags: i32) -> io::Result<()> {
        while job.length > 0 && self.is_aligned(job) {
            match image.write_some(job, flags)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => job.advance(count),
            }
        }
        Ok(())
    }

    fn write_durably(
        &self,
        image: &RawImage,
        job: &mut Job,
        bounce: &mut Bounce,
    ) -> io::Result<()> {
        if !self.no_durable_writes.load(Ordering::Relaxed) {
            match self.write_aligned(image, job, libc::RWF_DSYNC) {
                Err(error) if is_unsupported(&error) => {
                    self.no_durable_writes.store(true, Ordering::Relaxed);
                }
                result => result.inspect_err(|error| durable_write_failed(image.file(), error))?,
            }
        }
        if job.length == 0 {
            return Ok(());
        }
        self.write(image, job, bounce)?;
        image.file().flush()
    }
}

/// Called with the error of a durable write. An EIO may come from the flush that is part of the write, and may then concern
/// other data, too: it counts as a failed flush.
fn durable_write_failed(file: &HostFile, error: &io::Error) {
    if error.raw_os_error() == Some(libc::EIO) {
        let _ = file.check_flushed(Err(io::Error::from_raw_os_error(libc::EIO)));
    }
}

impl RawImage {
    /// Makes the image `bytes` long, as [`Disk::resize`](crate::disk::Disk::resize) says.
    pub(in crate::disk) fn resize(&self, bytes: u64) -> io::Result<()> {
        let unit = u64::from(self.file.unit()).max(SECTOR);
        if bytes == 0 || !bytes.is_multiple_of(unit) {
            let reason = format!("the size must be a multiple of {unit} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        if self.file.kind == FileKind::Regular {
            // The capacity first, so that no write begins beyond the new end, which would make the file longer again. A write that
            // has already begun may still do that.
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

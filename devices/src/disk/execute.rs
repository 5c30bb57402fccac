//! Executes jobs of any kind on an image of any format, on the calling thread, which may have to wait for the host.
//!
//! A capability: the engine sends a job here if neither the worker nor io_uring can execute it. It hooks in as methods of
//! [`OpenedDisk`], which the pool's threads call (`engine/threads.rs`), and `open` for what the VM asks of a disk.

#![expect(unsafe_code, reason = "device commands move data from and to guest memory")]

use std::os::fd::AsFd;

use vm_memory::{Bytes, GuestAddress};

use super::bounce::Bounce;
use super::job::Job;
use super::opened::{Backend, OpenedDisk};
use super::{DiskError, GuestRange, Operation};
use crate::GuestMemory;

impl OpenedDisk {
    /// Executes what is left of `job` on the calling thread, which may have to wait. `bounce` belongs to that thread.
    pub(super) fn execute(&self, job: &mut Job, bounce: &mut Bounce) -> Result<(), DiskError> {
        match (&self.backend, job.command.take()) {
            (Backend::Raw(image, blocking), None) => blocking.execute(image, job, bounce),
            (Backend::Qcow2(image), None) => image.execute(job, bounce),
            (Backend::Raw(image, _), Some(command)) if self.info.scsi => {
                let data = job.buffers.whole().ok_or(DiskError::Host(libc::EINVAL))?;
                // SAFETY: the iovecs are valid by the invariant of `IoBuffers`.
                unsafe { command.execute(image.file().as_fd(), data) }
            }
            (_, Some(_)) => Err(DiskError::Unsupported),
        }
    }

    /// The first 512 bytes, read into memory that is no guest's.
    pub(super) fn first_sector(&self) -> Option<[u8; 512]> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).ok()?;
        let mut job = Job { operation: Operation::Read, length: 512, ..Job::default() };
        let range = GuestRange { address: GuestAddress(0), length: 512 };
        // SAFETY: `memory` is dropped after `job`, which was made later.
        unsafe { job.buffers.resolve(&memory, &[range]) }.ok()?;
        self.execute(&mut job, &mut Bounce::default()).ok()?;
        let mut sector = [0; 512];
        memory.read_slice(&mut sector, range.address).ok().map(|()| sector)
    }
}

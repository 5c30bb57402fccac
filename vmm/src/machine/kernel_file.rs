//! Releases the files whose pages are mapped into guest memory (the kernel's and a saved machine's), when another process wants to write
//! to one: see [`crate::kernel_pages`].
//!
//! A capability: `signals` asks for it at SIGIO. It hooks in as a [`Task`] of the machine's standstill.

use super::{Hardware, Machine, Task};
use crate::error::Error;

struct ReleaseFiles;

#[derive(Debug, thiserror::Error)]
#[error("another program opened a file for writing whose pages the guest's memory has; try again")]
struct FileWanted;

impl Machine {
    /// Begins to replace the mapped pages by copies and to release the leases. A process that waits to write to a file then goes on.
    pub(crate) fn release_files(&mut self) {
        self.cancel_task(Error::Capability(Box::new(FileWanted)));
        self.stand_still(|standstill| standstill.tasks.push_front(Box::new(ReleaseFiles)));
    }

    /// Replaces all mapped pages of files by copies, and releases the leases.
    fn copy_files(&mut self) -> Result<(), Error> {
        let Hardware { boot_image, memory, unmap_files, .. } = &mut self.hardware;
        unmap_files.take().map_or(Ok(()), |unmap| unmap(memory))?;
        boot_image.as_mut().map_or(Ok(()), |image| image.copy_and_release_kernel_file(memory))
    }
}

impl Task for ReleaseFiles {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        machine.copy_files().map(|()| true)
    }

    /// The host's kernel soon takes the lease away, and the writer may then truncate the file, with the guest's pages. So they are copied
    /// now, although something still runs. What a vCPU or a disk writes to them meanwhile is lost, so the machine must end.
    fn deadline_passed(&mut self, machine: &mut Machine, error: Error) -> Option<Error> {
        Some(machine.copy_files().err().unwrap_or(error))
    }
}

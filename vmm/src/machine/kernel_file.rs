//! Gives up files whose pages are guest memory, the kernel's and a saved machine's, to a process that wants to write one: see
//! [`crate::kernel_pages`].
//!
//! A capability: `signals` asks for it when SIGIO comes. It hooks in as a [`Task`] of the machine's standstill.

use super::{Hardware, Machine, Task};
use crate::error::Error;

struct ReleaseKernelFile;

impl Machine {
    /// Lets another process write the kernel's file, after the guest was given copies of the pages that it shares with it.
    pub(crate) fn release_kernel_file(&mut self) {
        self.cancel_task(Error::Stopping);
        self.stand_still(|standstill| standstill.tasks.push_front(Box::new(ReleaseKernelFile)));
    }

    /// Gives the guest copies of all pages of files, and lets those who want to write the files go on.
    fn copy_files(&mut self) -> Result<(), Error> {
        let Hardware { boot_image, memory, unmap_files, .. } = &mut self.hardware;
        unmap_files.take().map_or(Ok(()), |unmap| unmap(memory))?;
        boot_image.as_ref().map_or(Ok(()), |image| image.give_up_kernel_file(memory))
    }
}

impl Task for ReleaseKernelFile {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        machine.copy_files().map(|()| true)
    }

    /// The host's kernel takes the lease away soon, and the writer may then cut off the file with the guest's pages. So they are copied
    /// now. What a vCPU or a disk writes to them during the copy is lost, so the machine cannot go on.
    fn give_up(&mut self, machine: &mut Machine, error: Error) -> Option<Error> {
        Some(machine.copy_files().err().unwrap_or(error))
    }
}

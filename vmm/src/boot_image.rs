//! Applies the plan of `arch::boot::plan` to guest memory: the kernel, the initrd, and the structures that the guest starts from.
//!
//! The builder opens the files as [`BootFile`]s, makes a [`BootImage`] of them and calls [`BootImage::load`]. A reset calls it again,
//! with the same plan. Memory must be new or cleared by [`crate::memory::clear`], because a load writes only what the plan names.
//!
//! A plan has offsets from the file's headers, so it is right only for the content that the file had. Each load compares the file's size
//! and time of modification with those at the start. A reset whose files have changed is refused before anything has changed
//! ([`BootImage::check_unchanged`]).
//!
//! [`FilePages`] decides whether pages of the kernel's file become pages of the guest.

mod describe;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use arch::boot::{self, Entry, FileRange, Kernel, Plan, ReadAt};
use arch::machine_layout::MachineLayout;
use vm_memory::{Bytes, GuestAddress};

pub(crate) use self::describe::describe;
use crate::GuestMemory;
use crate::error::Error;
use crate::memory::into_io;

/// A kernel or an initrd, open for reading for as long as the machine lives. Errors name it by the option and the path that
/// the user gave.
pub(crate) struct BootFile {
    option: &'static str,
    path: PathBuf,
    pub(crate) file: File,
    opened: Version,
}

/// Shows whether a file was changed in place. If the file is replaced by renaming another over it, its version stays the same: the
/// open descriptor still reads the old content.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    size: u64,
    modified: Option<SystemTime>,
}

impl BootFile {
    /// Opens the regular file that the user named by `option`. A fifo is refused, and open(2) does not wait for its other end.
    ///
    /// # Errors
    /// It cannot be opened, or is not a regular file.
    pub(crate) fn open(option: &'static str, path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) = match opened {
            Ok(opened) => opened,
            Err(source) => {
                return Err(Error::Argument { option, value: path.display().to_string(), source });
            }
        };
        let kind = match metadata.file_type() {
            kind if kind.is_file() => {
                let opened = Version { size: metadata.len(), modified: metadata.modified().ok() };
                return Ok(Self { option, path, file, opened });
            }
            kind if kind.is_dir() => "a directory",
            kind if kind.is_fifo() => "a fifo",
            _ => "a device or socket",
        };
        Err(Error::NotAFile { option, path, kind })
    }

    /// Checks that the file still has the content that it had when it was opened.
    fn check_unchanged(&self) -> Result<(), Error> {
        let metadata = self.file.metadata().map_err(|source| self.unreadable(source))?;
        if (Version { size: metadata.len(), modified: metadata.modified().ok() }) == self.opened {
            Ok(())
        } else {
            Err(Error::FileChanged { option: self.option, path: self.path.clone() })
        }
    }

    /// Copies `range` of the file into guest memory, except for its first `done` bytes, which are mapped already.
    fn copy(&self, memory: &GuestMemory, range: &FileRange, done: u64) -> Result<(), Error> {
        let mut file = &self.file;
        let address = GuestAddress(range.address.0 + done);
        let copied = file.seek(SeekFrom::Start(range.offset + done)).and_then(|_| {
            memory
                .read_exact_volatile_from(address, &mut file, (range.length - done) as usize)
                .map_err(into_io)
        });
        copied.or_else(|source| self.check_unchanged().and(Err(self.unreadable(source))))
    }

    fn unsuitable(&self, source: boot::Error) -> Error {
        Error::BootFile { option: self.option, path: self.path.clone(), source }
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Argument { option: self.option, value: self.path.display().to_string(), source }
    }
}

impl ReadAt for BootFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.opened.size)
    }

    fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut filled = 0;
        loop {
            match self.file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}

/// Maps pages of the kernel's file into guest memory, where that is safe and faster than a copy. The builder plugs it in.
pub(crate) trait FilePages {
    /// Maps the start of `range` of the kernel's `file`, and returns how many bytes are mapped: 0 if a copy is safer or faster.
    ///
    /// # Errors
    /// The host refuses the mapping.
    fn map_start(&self, memory: &GuestMemory, file: &File, range: &FileRange) -> io::Result<u64>;

    /// Replaces the mapped pages of `ranges` by copies, so that the file may change. From now on, nothing is mapped.
    ///
    /// # Errors
    /// The host refuses, and the guest may have lost memory.
    fn copy_and_release(&mut self, memory: &GuestMemory, ranges: &[FileRange]) -> io::Result<()>;
}

/// Everything that the guest starts from: the files, which stay open for a reset, and the plan of what goes where.
pub(crate) struct BootImage {
    pub(crate) kernel: BootFile,
    initrd: Option<BootFile>,
    pub(crate) plan: Plan,
    pub(crate) pages: Box<dyn FilePages>,
}

impl BootImage {
    /// Reads the headers of the kernel, and plans what goes where on the machine of `layout`.
    ///
    /// # Errors
    /// The kernel, the initrd or the command line is not suitable, or does not fit. The error names the option.
    pub(crate) fn new(
        layout: &MachineLayout,
        kernel: BootFile,
        initrd: Option<BootFile>,
        cmdline: &str,
        pages: Box<dyn FilePages>,
    ) -> Result<Self, Error> {
        use boot::Error::{Cmdline, EmptyInitrd, InitrdDoesNotFit, InitrdNeverFits};
        let parsed = Kernel::parse(&kernel).map_err(|error| kernel.unsuitable(error))?;
        let initrd_size = initrd.as_ref().map(|initrd| initrd.opened.size);
        let plan = boot::plan(layout, &parsed, initrd_size, cmdline).map_err(|error| {
            match (error, &initrd) {
                (Cmdline(error), _) => Error::Cmdline(error),
                (
                    error @ (EmptyInitrd | InitrdDoesNotFit { .. } | InitrdNeverFits { .. }),
                    Some(initrd),
                ) => initrd.unsuitable(error),
                (error, _) => kernel.unsuitable(error),
            }
        })?;
        Ok(Self { kernel, initrd, plan, pages })
    }

    /// Applies the plan to `memory`, all of which is zero, and returns where the boot vCPU starts.
    ///
    /// # Errors
    /// A file cannot be read or has changed, or the host refuses to map it.
    pub(crate) fn load(&self, memory: &GuestMemory) -> Result<Entry, Error> {
        for structure in &self.plan.structures {
            let written = memory.write_slice(&structure.bytes, structure.address);
            written.map_err(into_io).map_err(Error::host("write what the guest starts from"))?;
        }
        self.check_unchanged()?;
        for range in &self.plan.kernel {
            let mapped = self
                .pages
                .map_start(memory, &self.kernel.file, range)
                .map_err(Error::host("map the kernel into guest memory"))?;
            self.kernel.copy(memory, range, mapped)?;
        }
        if let (Some(initrd), Some(range)) = (&self.initrd, &self.plan.initrd) {
            initrd.copy(memory, range, 0)?;
        }
        // Without a lease, a file may have been written to while it was copied.
        self.check_unchanged()?;
        Ok(self.plan.entry)
    }

    /// Checks that the files are as they were at the first [`BootImage::load`].
    ///
    /// # Errors
    /// A file was changed in place.
    pub(crate) fn check_unchanged(&self) -> Result<(), Error> {
        self.initrd.iter().chain([&self.kernel]).try_for_each(BootFile::check_unchanged)
    }
}

#[cfg(test)]
mod tests;

//! The files that a run writes. They are opened while the machine is built, and changed only when nothing can refuse the run any more.
//!
//! A capability. The builder passes [`OutputFiles`] to the code that opens output files: consoles, `--trace`, `--dump-on-panic`. Its last
//! step, [`OutputFiles::begin`], also empties or creates the logs of writes ([`WriteLogs`]). If the value is dropped before, a file that
//! existed keeps its content, and a new one is removed.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use devices::disk::Disk;
use devices::spawn::Body;

use crate::config::DiskConfig;
use crate::error::Error;
use crate::write_logs::WriteLogs;

/// The files of a run that has not begun.
pub(crate) struct OutputFiles {
    logs: WriteLogs,
    /// The files that `begin` empties, each with the option that names it and the option's value.
    emptied: Vec<(File, &'static str, String)>,
    created: Vec<(PathBuf, Metadata)>,
    /// Threads that write once the run begins.
    waiting: Vec<Sender<()>>,
}

impl OutputFiles {
    /// Starts without a file, except for the logs of `disks`, which are added to `images`.
    ///
    /// # Errors
    /// The host refuses a log, or the file has other content than a log.
    pub(crate) fn with_logs(
        images: &mut [Arc<dyn Disk>],
        disks: &[DiskConfig],
    ) -> Result<Self, Error> {
        let logs = WriteLogs::over(images, disks)?;
        Ok(Self { logs, emptied: Vec::new(), created: Vec::new(), waiting: Vec::new() })
    }

    /// Opens a file or a pipe for `option`, for appending. `begin` empties a file.
    ///
    /// # Errors
    /// The host refuses it, or it is a block device.
    pub(crate) fn append(
        &mut self,
        option: &'static str,
        value: String,
        path: &Path,
    ) -> Result<File, Error> {
        self.try_append(option, &value, path).map_err(|source| Error::Argument {
            option,
            value,
            source,
        })
    }

    fn try_append(&mut self, option: &'static str, value: &str, path: &Path) -> io::Result<File> {
        let file = self.open(File::options().append(true), path)?;
        let kind = file.metadata()?.file_type();
        if kind.is_block_device() {
            return Err(io::Error::other(
                "it is a block device, and would be overwritten; give a file",
            ));
        }
        if kind.is_file() {
            self.emptied.push((file.try_clone()?, option, value.to_owned()));
        }
        Ok(file)
    }

    /// Opens a file, or creates one that only its owner can access. Its content stays.
    ///
    /// # Errors
    /// The host refuses it.
    pub(crate) fn open(&mut self, options: &mut OpenOptions, path: &Path) -> io::Result<File> {
        // A fifo without a reader refuses a non-blocking open instead of waiting for one; a regular file ignores the flag.
        options.mode(0o600).custom_flags(libc::O_NONBLOCK);
        match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = options.create(true).open(path)?;
                self.created.push((path.canonicalize()?, file.metadata()?));
                Ok(file)
            }
            opened => opened,
        }
    }

    /// Wraps the body of a thread that writes an output file. The body runs when the run begins, or never if the run is refused.
    pub(crate) fn once_begun(&mut self, body: Body) -> Body {
        let (begin, begun) = channel();
        self.waiting.push(begin);
        Box::new(move || {
            if begun.recv().is_ok() {
                body();
            }
        })
    }

    /// Begins the run: empties the files of earlier runs.
    ///
    /// # Errors
    /// The host refuses a change.
    pub(crate) fn begin(mut self) -> Result<(), Error> {
        self.logs.begin()?;
        for (file, option, value) in self.emptied.drain(..) {
            file.set_len(0).map_err(|source| Error::Argument { option, value, source })?;
        }
        self.created.clear();
        // A thread that has gone needs no message.
        for begin in self.waiting.drain(..) {
            let _ = begin.send(());
        }
        Ok(())
    }
}

impl Drop for OutputFiles {
    /// Removes the files that a refused run has created, unless another program has replaced a file or written to it.
    fn drop(&mut self) {
        for (path, created) in &self.created {
            let is_as_created = fs::symlink_metadata(path).is_ok_and(|now| {
                (now.dev(), now.ino(), now.len()) == (created.dev(), created.ino(), 0)
            });
            if is_as_created {
                let _ = fs::remove_file(path);
            }
        }
    }
}

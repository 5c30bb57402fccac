//! `log-writes=` of disks: puts a log of writes around an image, and opens its file.
//!
//! A capability. The builder calls [`WriteLogs::over`] with the open images, and [`WriteLogs::begin`] where files may be created;
//! `devices::disk::log_writes` does the rest.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use devices::disk::Disk;
use devices::disk::log_writes::{self, WriteLog};

use crate::config::DiskConfig;
use crate::error::Error;

/// The logs of a machine, each with the path of its disk's image.
pub(crate) struct WriteLogs(Vec<(PathBuf, Arc<WriteLog>)>);

impl WriteLogs {
    /// Puts a log around each of `images` whose disk asks for one. Nothing is created or changed yet.
    ///
    /// # Errors
    /// The host refuses a file, or it has something else in it.
    pub(crate) fn over(images: &mut [Arc<dyn Disk>], disks: &[DiskConfig]) -> Result<Self, Error> {
        let mut logs = Self(Vec::new());
        for (image, DiskConfig { image: options, .. }) in images.iter_mut().zip(disks) {
            if let Some(path) = &options.log_writes {
                let log = Arc::new(WriteLog::new(path));
                *image = log_writes::over(Arc::clone(image), Arc::clone(&log), options.cache);
                logs.0.push((options.path.clone(), log));
            }
        }
        logs.each(WriteLog::check)?;
        Ok(logs)
    }

    /// Creates or empties the files.
    ///
    /// # Errors
    /// The host refuses one.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        self.each(WriteLog::begin)
    }

    fn each(&self, call: impl Fn(&WriteLog) -> io::Result<()>) -> Result<(), Error> {
        self.0.iter().try_for_each(|(image, log)| {
            call(log).map_err(|source| {
                let value = format!("{},log-writes={}", image.display(), log.path().display());
                Error::Argument { option: "--disk", value, source }
            })
        })
    }
}

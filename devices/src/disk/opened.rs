//! An opened image of any format, with the options that say how it is served.
//!
//! Each format is a variant of [`Backend`]. `open` makes it, and `execute` calls it for jobs that may have to wait. Engines see only
//! [`OpenedDisk`]. For a raw image they also use its file directly, since no format has to translate.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use super::qcow2::Qcow2Image;
use super::raw::RawImage;
use super::raw::blocking::Blocking;
use super::{DiskInfo, OpenOptions};
use crate::log_limit::LogLimit;

/// An opened image, by its format. Any thread may make the blocking calls.
pub(super) enum Backend {
    Raw(RawImage, Blocking),
    Qcow2(Box<Qcow2Image>),
}

/// An opened image, and the options that decide how it is served.
pub(super) struct OpenedDisk {
    pub(super) backend: Backend,
    pub(super) info: DiskInfo,
    pub(super) ignore_flush: bool,
    /// The image's path, for messages.
    pub(super) path: PathBuf,
    /// Engines get an io_uring where the host allows it (`aio=io_uring`).
    pub(super) uses_ring: bool,
    /// The rate limit of messages about what the host refuses to this disk's engines.
    pub(super) shortages: LogLimit,
    /// The file that the user named, to ask for its size on the host.
    pub(super) file: Option<OwnedFd>,
}

impl OpenedDisk {
    pub(super) fn new(
        backend: Backend,
        info: DiskInfo,
        options: &OpenOptions,
        uses_ring: bool,
    ) -> Self {
        Self {
            backend,
            info,
            ignore_flush: options.cache.ignores_flush() || options.snapshot,
            path: options.path.clone(),
            uses_ring,
            shortages: LogLimit::default(),
            file: rustix::fs::open(&options.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .ok(),
        }
    }

    /// The raw image, whose file engines may use directly. `None`: another format.
    pub(super) fn raw(&self) -> Option<&RawImage> {
        waypoint!();
        match &self.backend {
            Backend::Raw(image, _) => Some(image),
            _ => None,
        }
    }

    pub(super) fn capacity(&self) -> u64 {
        match &self.backend {
            Backend::Raw(image, _) => image.capacity(),
            Backend::Qcow2(image) => image.capacity(),
        }
    }
}

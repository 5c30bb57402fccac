//! How to open an image: the host's half of `--disk`, with QEMU's words and meanings.
//!
//! `option_words` parses and prints the values. The guest's half, such as the serial number and the error policy, is in
//! `block/options.rs`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that decides how an image is opened and how its data is moved. `new` gives the defaults of `--disk`; the derived
/// `Default` is what `new` starts from, without a path and without a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenOptions {
    /// The image: a regular file, or a block device of the host such as a partition, an nbd or a device-mapper volume.
    pub path: PathBuf,
    /// `format=`. The content never decides it: a guest can write any header into a raw image, and would then have the next
    /// start open files of its choice. `None` is raw, but an image that looks like one of another format is then refused.
    pub format: Option<Format>,
    /// `readonly=on`: the guest sees a read-only disk, and the image is opened for reading.
    pub read_only: bool,
    /// `snapshot=on`: the image is only read; writes go to a temporary overlay that vanishes with the disk.
    pub snapshot: bool,
    /// `cache=`: whether the page cache is used, and when a write is complete.
    pub cache: CacheMode,
    /// `aio=`: what waits for the host's disk, io_uring or threads.
    pub aio: Aio,
    /// `discard=`: whether blocks that the guest discards go back to the host.
    pub discard: DiscardMode,
    /// `detect-zeroes=`: whether a write of zeroes becomes a write-zeroes operation.
    pub detect_zeroes: DetectZeroes,
    /// `locking=`: lock the image, so that no other QEMU or minivmm writes it meanwhile.
    pub locking: bool,
    /// `backing=on`: open the backing files that a qcow2 image names. Off by default: the image would choose files of the host.
    pub backing: bool,
    /// `scsi=on`: the guest may send SCSI commands to the image, which must be a whole SCSI disk of the host.
    pub scsi: bool,
    /// `log-writes=`: the file for a log of what the guest writes. A saved machine does not choose it.
    #[serde(skip)]
    pub log_writes: Option<PathBuf>,
    /// `fault=`: what goes wrong on purpose, each as `injected_faults` reads it. A saved machine does not have it.
    #[serde(skip)]
    pub faults: Vec<String>,
}

impl OpenOptions {
    /// A raw, writable, locked image with the defaults that each option's type names.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), locking: true, ..Self::default() }
    }
}

/// What the image's bytes mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes are the disk's, and the image is as long as the disk.
    #[default]
    Raw,
    /// A QEMU copy-on-write image, version 2 or 3, which is only as large as what was written to it.
    Qcow2,
}

/// Where written data may be when the guest's write completes: QEMU's cache modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// In the host's page cache, shared with the host's other programs. A flush makes it durable.
    #[default]
    Writeback,
    /// In the device's cache: the page cache is bypassed (O_DIRECT). A flush makes it durable.
    None,
    /// On the medium: each write is durable before it completes. The page cache serves reads.
    Writethrough,
    /// On the medium, and the page cache is bypassed: `none` and `writethrough` together.
    DirectSync,
    /// In the page cache, and a flush does nothing. Fast, and lost if the host loses power: for throw-away disks.
    Unsafe,
}

impl CacheMode {
    /// Whether the page cache is bypassed: the file is opened with O_DIRECT.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Whether writes may complete before they are durable, so that the guest sees a write cache that it must flush.
    pub fn writeback(self) -> bool {
        !matches!(self, Self::Writethrough | Self::DirectSync)
    }

    /// Whether the guest's flushes do nothing, so that nothing is durable before the host decides to write it.
    pub fn ignores_flush(self) -> bool {
        self == Self::Unsafe
    }
}

/// What waits for the host's disk while the queue's worker goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// The kernel, through an io_uring for each worker; threads where the host does not allow io_uring.
    #[default]
    IoUring,
    /// Up to 16 threads, shared out to the disk's workers, at least 4 to each. Slower, but a hung transfer shows as a thread.
    Threads,
}

/// What becomes of the guest's discards. The default differs from QEMU's, because most images are sparse files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscardMode {
    /// The discarded blocks are deallocated, so that the host has their space.
    #[default]
    Unmap,
    /// The guest is not offered discards, and blocks stay allocated.
    Ignore,
}

/// What becomes of a write that has nothing but zeroes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// Written as it is: writes are not searched for zeroes.
    #[default]
    Off,
    /// A write-zeroes operation that keeps its blocks allocated, which moves no data.
    On,
    /// A write-zeroes operation that deallocates its blocks. QEMU demands `discard=unmap` with it.
    Unmap,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_modes_are_qemus() {
        // QEMU's table (cache.writeback, cache.direct, cache.no-flush).
        let table = CacheMode::ALL
            .iter()
            .map(|mode| (mode.writeback(), mode.direct(), mode.ignores_flush()));
        let expected = [
            (true, false, false),
            (true, true, false),
            (false, false, false),
            (false, true, false),
            (true, false, true),
        ];
        assert!(table.eq(expected));
    }
}

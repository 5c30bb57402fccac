//! The options of a virtio-blk device that `--disk` accepts beside those of the image (`disk/options.rs`). Names and limits are
//! QEMU's, where QEMU has the option. `option_checks` refuses values and combinations that cannot work.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error_policy::ErrorPolicy;
use super::geometry::Geometry;
use super::throttle::{Throttling, ThrottlingError};

/// A virtio-blk device as configured; what is `None` comes from the disk. The option names are QEMU's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockOptions {
    /// What threads, logs and events call the disk, such as `vda`.
    pub name: String,
    /// `serial`: the answer to GET_ID, at most 20 ASCII bytes.
    pub serial: Option<String>,
    /// `num-queues`: 1 to 1024. Worker threads: one a queue, at most one a host CPU.
    pub num_queues: u16,
    /// `queue-size`: descriptors a queue, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// The write cache as the driver finds it after reset: `false` for the cache modes writethrough and directsync.
    pub write_cache: bool,
    /// `logical-block-size`: bytes, the unit of addressing.
    pub logical_block_size: Option<u32>,
    /// `physical-block-size`: bytes.
    pub physical_block_size: Option<u32>,
    /// `min-io-size`: bytes, 0 for no suggestion.
    pub min_io_size: Option<u32>,
    /// `opt-io-size`: bytes, 0 for no suggestion.
    pub opt_io_size: Option<u32>,
    /// `cyls`, `heads`, `secs`: guessed from the size when absent.
    pub geometry: Option<Geometry>,
    /// `throttling.*`: how fast the disk may be.
    pub throttling: Throttling,
    /// `rerror`: after a failed read.
    pub read_errors: ErrorPolicy,
    /// `werror`: after a failed write, flush, discard, write-zeroes or secure erase.
    pub write_errors: ErrorPolicy,
    /// The longest busy-polling window: how long a worker polls for the driver's next request. Zero where polling would keep a CPU from
    /// the guest.
    pub poll: Duration,
}

impl BlockOptions {
    /// The defaults for a disk called `name`: one queue of 256 descriptors, write-back, everything else from the disk.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            serial: None,
            num_queues: 1,
            queue_size: 256,
            write_cache: true,
            logical_block_size: None,
            physical_block_size: None,
            min_io_size: None,
            opt_io_size: None,
            geometry: None,
            throttling: Throttling::default(),
            read_errors: ErrorPolicy::Report,
            write_errors: ErrorPolicy::Enospc,
            poll: Duration::from_micros(200),
        }
    }
}

/// Block and I/O sizes after the options met the disk's limits. Bytes, but for `alignment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockSizes {
    pub(super) logical: u32,
    pub(super) physical: u32,
    /// Suggested smallest I/O, 0 for none.
    pub(super) min_io: u32,
    /// Suggested best I/O, 0 for none.
    pub(super) opt_io: u32,
    /// The first logical block that begins a physical one.
    pub(super) alignment: u8,
}

/// Why a block device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// An option that does not work.
    #[error("{option}={value}: {reason}")]
    Option {
        /// The option's name on the command line.
        option: &'static str,
        /// Its value.
        value: String,
        /// What would work.
        reason: &'static str,
    },
    /// Limits that contradict each other.
    #[error(transparent)]
    Throttling(#[from] ThrottlingError),
    /// A worker thread could not be started.
    #[error("cannot start the disk's worker thread {thread}")]
    Thread {
        /// The thread's name.
        thread: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

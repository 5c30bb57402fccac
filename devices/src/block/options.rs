//! The options of a virtio-blk device that `--disk` accepts beside those of the image, and which values and
//! combinations are refused. Names and limits are QEMU's, where QEMU has the option.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::throttle::{Throttling, ThrottlingError};
use crate::disk::Limits;
use crate::virtio::spec::blk;

/// Largest queue, in descriptors. A chain then always fits one vectored transfer (IOV_MAX is 1024).
pub(super) const QUEUE_SIZE_MAX: u16 = 1024;
/// Smallest queue: a header, two data segments and a status byte.
pub(super) const QUEUE_SIZE_MIN: u16 = 4;
const QUEUES_MAX: u16 = 1024;
/// Largest logical block in bytes.
const LOGICAL_BLOCK_MAX: u32 = 32768;

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
    /// The longest busy-polling window: how long a worker polls for the driver's next request. Zero where polling would keep
    /// a CPU from the guest. Polling pays as long as it takes no longer than a kick, going to sleep and waking up.
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

    /// Checks the options against each other and against the disk's own `limits`.
    ///
    /// # Errors
    /// `BlockError::Option` for the first option that does not work.
    pub(super) fn check(&self, limits: &Limits) -> Result<BlockSizes, BlockError> {
        let sizes = self.check_sizes(limits)?;
        let in_range = (1..=QUEUES_MAX).contains(&self.num_queues);
        require(in_range, "num-queues", self.num_queues, "must be from 1 to 1024")?;
        let size = self.queue_size;
        let fits = size.is_power_of_two() && (QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&size);
        require(fits, "queue-size", size, "must be a power of two from 4 to 1024")?;
        if let Some(serial) = &self.serial {
            let printable = serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
            let fits = printable && serial.len() <= blk::ID_SIZE;
            require(fits, "serial", serial, "must be at most 20 printable ASCII characters")?;
        }
        if let Some(Geometry { cylinders, heads, sectors }) = self.geometry {
            let all = cylinders > 0 && heads > 0 && sectors > 0;
            let given = format!("{cylinders}, {heads}, {sectors}");
            require(all, "cyls, heads, secs", given, "must all be at least 1")?;
        }
        Ok(sizes)
    }

    /// The block sizes and the suggested I/O sizes, from the options or else from the disk.
    fn check_sizes(&self, limits: &Limits) -> Result<BlockSizes, BlockError> {
        let logical = self.logical_block_size.unwrap_or(limits.logical_block_size);
        let fits = logical.is_power_of_two()
            && (blk::SECTOR_SIZE as u32..=LOGICAL_BLOCK_MAX).contains(&logical);
        let why = "must be a power of two from 512 to 32768";
        require(fits, "logical-block-size", logical, why)?;
        let why = "must not be below what the host device can address";
        require(logical >= limits.logical_block_size, "logical-block-size", logical, why)?;
        let physical = self.physical_block_size.unwrap_or(limits.physical_block_size.max(logical));
        let fits = physical.is_power_of_two() && physical >= logical;
        let why = "must be a power of two and not below the logical block size";
        require(fits, "physical-block-size", physical, why)?;
        let min_io = self.min_io_size.unwrap_or(limits.min_io_size / logical * logical);
        let fits = min_io.is_multiple_of(logical) && min_io / logical <= u32::from(u16::MAX);
        let why = "must be a multiple of the logical block size, at most 65535 of them";
        require(fits, "min-io-size", min_io, why)?;
        let opt_io = self.opt_io_size.unwrap_or(limits.opt_io_size / logical * logical);
        let why = "must be a multiple of the logical block size";
        require(opt_io.is_multiple_of(logical), "opt-io-size", opt_io, why)?;
        // The first logical block of an aligned physical one; the host tells it in bytes.
        let alignment = u8::try_from(limits.alignment_offset / logical).unwrap_or(0);
        Ok(BlockSizes { logical, physical, min_io, opt_io, alignment })
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

/// Disk geometry for software that still asks for it (virtio 1.2 §5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads: tracks a cylinder.
    pub heads: u8,
    /// Sectors a track, of 512 bytes.
    pub sectors: u8,
}

/// What to do after the host failed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorPolicy {
    /// Tell the guest: IOERR.
    Report,
    /// Tell the guest that all is well.
    Ignore,
    /// Keep the request and stop the VM; the request is retried when the VM goes on.
    Stop,
    /// As `Stop` when the host is out of space, else as `Report`.
    Enospc,
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

fn require(
    condition: bool,
    option: &'static str,
    value: impl ToString,
    reason: &'static str,
) -> Result<(), BlockError> {
    if condition {
        Ok(())
    } else {
        Err(BlockError::Option { option, value: value.to_string(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::TestDisk;
    use super::*;

    type Change = fn(&mut BlockOptions);

    fn check(change: Change) -> Result<BlockSizes, BlockError> {
        let mut options = BlockOptions::new("vda");
        change(&mut options);
        options.check(&TestDisk::LIMITS)
    }

    #[test]
    fn what_does_not_work_is_named() {
        let table: [(&str, Change); _] = [
            ("logical-block-size=0", |o| o.logical_block_size = Some(0)),
            ("logical-block-size=256", |o| o.logical_block_size = Some(256)),
            ("logical-block-size=1536", |o| o.logical_block_size = Some(1536)),
            ("logical-block-size=65536", |o| o.logical_block_size = Some(65536)),
            ("physical-block-size=0", |o| o.physical_block_size = Some(0)),
            ("physical-block-size=6144", |o| o.physical_block_size = Some(6144)),
            ("physical-block-size=512", |o| {
                (o.logical_block_size, o.physical_block_size) = (Some(4096), Some(512));
            }),
            ("min-io-size=100", |o| o.min_io_size = Some(100)),
            ("min-io-size=33554432", |o| o.min_io_size = Some(32 << 20)),
            ("opt-io-size=513", |o| o.opt_io_size = Some(513)),
            ("num-queues=0", |o| o.num_queues = 0),
            ("num-queues=1025", |o| o.num_queues = 1025),
            ("queue-size=0", |o| o.queue_size = 0),
            ("queue-size=2", |o| o.queue_size = 2),
            ("queue-size=100", |o| o.queue_size = 100),
            ("queue-size=2048", |o| o.queue_size = 2048),
            ("serial=123456789012345678901", |o| {
                o.serial = Some("123456789012345678901".to_owned())
            }),
            ("serial=a\nb", |o| o.serial = Some("a\nb".to_owned())),
            ("serial=\u{fc}", |o| o.serial = Some("\u{fc}".to_owned())),
            ("cyls, heads, secs=0, 1, 1", |o| {
                o.geometry = Some(Geometry { cylinders: 0, heads: 1, sectors: 1 });
            }),
        ];
        for (expected, change) in table {
            let message = check(change).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{expected}: must")), "{expected}: {message}");
        }
    }

    #[test]
    fn a_logical_block_is_not_finer_than_the_host_can_address() {
        let limits = Limits { logical_block_size: 4096, ..TestDisk::LIMITS };
        let mut options = BlockOptions::new("vda");
        assert_eq!(options.check(&limits).unwrap().logical, 4096);
        options.logical_block_size = Some(512);
        assert!(options.check(&limits).is_err());
    }

    #[test]
    fn the_disk_fills_in_what_is_not_given() {
        let expected =
            BlockSizes { logical: 512, physical: 4096, min_io: 4096, opt_io: 65536, alignment: 0 };
        assert_eq!(check(|_| {}).unwrap(), expected);
        // The disk's suggestions never stand in the way of an option.
        let coarse = check(|o| o.logical_block_size = Some(32768)).unwrap();
        assert_eq!(
            coarse,
            BlockSizes { logical: 32768, physical: 32768, min_io: 0, opt_io: 65536, alignment: 0 }
        );
    }
}

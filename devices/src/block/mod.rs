//! The virtio block device (virtio 1.2 §5.2).
//!
//! One walk leads through this module, from the driver's kick to its interrupt:
//!
//! 1. `thread` owns a worker's thread: it sleeps until a queue's eventfd says that the driver kicked.
//! 2. `worker` takes one pass over the available ring, through `ring`.
//! 3. `chain` walks a descriptor chain, `request` turns it into a checked request that must be answered.
//! 4. `batch` merges neighbours and submits them to the disk's [engine](crate::disk::Engine).
//! 5. `worker` reaps what the engine finished, writes status bytes and used ring, and interrupts the driver.
//!
//! Beside the path: `device` is the transport's view, `config` the configuration space, `slots` the requests in
//! flight, `policy` what happens after a host I/O error, `throttle` how fast the disk may be and `delayed` what waits
//! for that, `scsi` the requests that are no transfers, `stats` the accounts.

mod batch;
mod chain;
mod config;
mod delayed;
mod device;
mod events;
mod histogram;
mod memory;
mod moderation;
mod options;
mod policy;
mod poll;
mod request;
mod ring;
mod scsi;
mod slots;
mod stats;
mod thread;
mod throttle;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{BlockDevice, BlockHandle};
pub use events::{BlockEvent, ErrorAction, EventSink};
pub use histogram::Histogram;
pub use options::{BlockError, BlockOptions, ErrorPolicy, Geometry};
pub use policy::KeptRequest;
pub use stats::{BlockStats, IoStatus, Kind, KindStats};
pub use throttle::{Limit, Rate, Throttling};

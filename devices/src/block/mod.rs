//! The virtio block device (virtio 1.2 §5.2).
//!
//! A request passes these files on its way from the driver's kick to its interrupt:
//!
//! 1. `worker_thread` sleeps until a queue's eventfd says that the driver kicked.
//! 2. `worker` takes each request through its six verbs: fetch, parse, admit, submit, complete, notify.
//! 3. `queue` is one queue of a worker, with the requests that an error has stopped; the ring itself is a
//!    [`SplitQueue`](crate::virtio::queue).
//! 4. `request` turns a chain into a checked `Request`, or into the status that refuses it.
//! 5. `admission` is the trait that lets the request start now or later.
//! 6. `dispatch` hands it to the disk's [engine](crate::disk::Engine): `batch` merges neighbors, and `in_flight` holds what
//!    the engine has.
//!
//! Only `worker` acts on requests: the other modules decide, count or hold. Each worker is called by one thread only. Beside
//! the path:
//!
//! - `device` is what the transport and the VM call;
//! - `shared` is what all threads of a disk share;
//! - `config_space` is what the driver reads before its first request;
//! - `busy_poll` decides whether a worker polls;
//! - `events` and `stats` are what the VM learns of a disk.
//!
//! Capabilities, which `device` plugs in. The path knows them only as the traits in `admission` and `request`, and as function types in
//! `config_space` and `worker`:
//!
//! | file | what it does |
//! |---|---|
//! | `throttle_queue`, `throttle_group`, `throttle` | the requests that wait for a limit; limits of one or several disks; leaky buckets |
//! | `error_policy` | decides what becomes of a request that the host failed |
//! | `worker/reset` | gives queues back to the driver |
//! | `request/segments`, `request/identity`, `scsi` | requests that are no read, write or flush |
//! | `geometry` | the disk's cylinders, heads and sectors |
//!
//! The other capabilities add methods to types of the path: `worker/state` saves and restores queues, `operator` (with `histogram`)
//! has statistics and limits for QMP, and `option_checks` refuses options.

mod admission;
mod batch;
mod busy_poll;
mod config_space;
mod device;
mod dispatch;
mod error_policy;
mod events;
mod geometry;
mod histogram;
mod in_flight;
mod operator;
mod option_checks;
mod options;
mod queue;
mod request;
mod scsi;
mod shared;
mod stats;
mod throttle;
mod throttle_group;
mod throttle_queue;
mod worker;
mod worker_thread;

#[cfg(test)]
mod tests;

pub use device::{BlockDevice, BlockHandle};
pub use error_policy::ErrorPolicy;
pub use events::{BlockEvent, ErrorAction, EventSink};
pub use geometry::Geometry;
pub use histogram::Histogram;
pub use operator::{BlockStats, KindStats, share_limits};
pub use options::{BlockError, BlockOptions};
pub use stats::{IoStatus, Kind};
pub use throttle::{Limit, Rate, Throttling, ThrottlingError};
pub use worker::state::QueueSnapshot;

//! Why `minivmm replay` cannot do what it is asked for.

use std::io;

use devices::disk::OpenError;

use crate::trace_view::lines::LineError;

#[derive(Debug, thiserror::Error)]
pub(super) enum ReplayError {
    #[error("{0}")]
    Lines(#[from] LineError),
    #[error("it has no request of a disk; record 'virtio_blk_*'")]
    NoRequest,
    #[error("it has no request of that disk, but some of {0}; write --traced-disk {0}")]
    OtherDisk(String),
    #[error("it has requests of {} and {}; choose one by --traced-disk {}", .0[0], .0[1], .0[0])]
    SeveralDisks([String; 2]),
    #[error("--disk: {0} does not work without a guest; leave it out")]
    Key(&'static str),
    #[error("--disk: it is the trace itself; name another file")]
    TraceIsDisk,
    #[error(
        "the load writes, which would destroy what the disk has; write snapshot=on, or --overwrite if nothing on the disk is needed"
    )]
    Overwrites,
    #[error("the load writes, but the disk is read-only; leave out readonly=on")]
    ReadOnly,
    #[error(
        "the load reaches byte {needed} of the disk, which has {capacity}; name a disk that is as large as the traced one"
    )]
    TooSmall { needed: u64, capacity: u64 },
    #[error(
        "a request of {length} bytes at byte {offset} does not fit the disk's blocks of {block} bytes; name a disk with smaller ones"
    )]
    Blocks { offset: u64, length: u64, block: u32 },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the host allows no I/O engine for the disk")]
    Host(#[source] io::Error),
}

impl ReplayError {
    pub(super) fn is_usage(&self) -> bool {
        !matches!(self, Self::Host(_))
    }
}

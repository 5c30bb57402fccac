//! `fault=`: a disk that fails when its user says so.
//!
//! A capability. It hooks in as a [`Disk`] around the one that [`open`](super::open) made: [`over`] is called by the builder, and
//! its engine decides about each [`Transfer`](super::Transfer) before the engine inside sees it. It goes around a log of writes
//! ([`log_writes`](super::log_writes)), so that the log has what reached the disk, and not what the guest was told.
//!
//! `rule` says which requests a fault hits, and `faulty_engine` does what the fault is. What goes wrong on the host's side, in
//! contrast, is what the error policies are tested with elsewhere.

mod faulty_engine;
mod rule;

use std::io;
use std::sync::Arc;

use self::faulty_engine::FaultyEngine;
use self::rule::Faults;
pub use self::rule::{BadFault, FaultRule};
use super::{Corruption, Disk, DiskError, Engine, EngineSetup, Lifetime, Limits};

/// A disk with faults.
struct FaultyDisk {
    disk: Arc<dyn Disk>,
    faults: Arc<Faults>,
}

/// `disk` with faults. The first of `rules` that hits a request counts.
pub fn over(disk: Arc<dyn Disk>, rules: Vec<FaultRule>) -> Arc<dyn Disk> {
    Arc::new(FaultyDisk { disk, faults: Arc::new(Faults::new(rules)) })
}

impl Disk for FaultyDisk {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn lifetime(&self) -> Option<Lifetime> {
        self.disk.lifetime()
    }

    fn first_sector(&self) -> Option<[u8; 512]> {
        self.disk.first_sector()
    }

    fn scsi(&self) -> bool {
        self.disk.scsi()
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        self.disk.refresh_capacity()
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.disk.resize(bytes)
    }

    fn allocated(&self) -> u64 {
        self.disk.allocated()
    }

    fn backing_files(&self) -> u32 {
        self.disk.backing_files()
    }

    fn take_corruption(&self) -> Option<Corruption> {
        self.disk.take_corruption()
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush()
    }

    fn engine(self: Arc<Self>, setup: EngineSetup) -> io::Result<Box<dyn Engine>> {
        let (memory, depth) = (setup.memory.clone(), setup.depth);
        let engine = Arc::clone(&self.disk).engine(setup)?;
        Ok(Box::new(FaultyEngine::new(engine, memory, depth, Arc::clone(&self.faults))))
    }
}

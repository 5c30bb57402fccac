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
use super::layer::{Layer, LayeredDisk};
use super::{Disk, Engine};
use crate::GuestMemory;

/// Makes a disk fail.
struct FaultLayer(Arc<Faults>);

/// `disk` with faults. The first of `rules` that hits a request counts.
pub fn over(disk: Arc<dyn Disk>, rules: Vec<FaultRule>) -> Arc<dyn Disk> {
    Arc::new(LayeredDisk { disk, layer: FaultLayer(Arc::new(Faults::new(rules))) })
}

impl Layer for FaultLayer {
    type Engine = FaultyEngine;

    fn engine(&self, _: &dyn Engine, memory: GuestMemory, depth: u32) -> io::Result<FaultyEngine> {
        Ok(FaultyEngine::new(memory, depth, Arc::clone(&self.0)))
    }
}

//! `fault=`: injects faults into the requests of a disk, for tests of guests.
//!
//! A capability. The builder calls [`over`], which puts a [`Disk`] around the one that [`open`](super::open()) made. Its engine decides
//! about each [`Transfer`](super::Transfer) before the inner engine gets it. It is outside of a log of writes
//! ([`log_writes`](super::log_writes)), so the log has what reached the disk, and not what the guest was told.
//!
//! | file | what it does |
//! |---|---|
//! | `rule` | parses a fault as the user writes it, and decides which requests it concerns |
//! | `faults` | has the rules of a disk with their counts. A control client may change them while the guest runs |
//! | `faulty_engine` | applies faults to the requests of a worker |
//! | `alarm` | wakes a worker for requests that are held back |
//!
//! No thread waits for a delay: the request is executed at once, and its completion is held back. A standstill of the machine ends all
//! delays ([`Faults::hurry`]). A disk with `hang` is like one whose host does not answer, with the same deadlines.

mod alarm;
mod faults;
mod faulty_engine;
mod rule;

use std::any::Any;
use std::io;
use std::sync::Arc;

pub use self::faults::{CountedRule, Faults, RULES_MAX};
use self::faulty_engine::FaultyEngine;
pub use self::rule::{BadFault, FaultRule};
use super::layer::{Layer, LayeredDisk};
use super::{Disk, Engine};
use crate::GuestMemory;

/// The layer that injects faults.
struct FaultLayer {
    disk: Arc<dyn Disk>,
    faults: Arc<Faults>,
}

/// Adds fault injection to `disk`. The first of `rules` that hits a request decides about it.
pub fn over(disk: Arc<dyn Disk>, rules: Vec<FaultRule>) -> Arc<dyn Disk> {
    let layer = FaultLayer { disk: Arc::clone(&disk), faults: Arc::new(Faults::new(rules)) };
    Arc::new(LayeredDisk { disk, layer })
}

/// The rules of a disk that [`over`] made. `None`: the disk has no fault injection.
pub fn of(disk: &dyn Disk) -> Option<&Faults> {
    let disk: &dyn Any = disk;
    disk.downcast_ref::<LayeredDisk<FaultLayer>>().map(|disk| &*disk.layer.faults)
}

impl Layer for FaultLayer {
    type Engine = FaultyEngine;

    fn engine(
        &self,
        engine: &dyn Engine,
        memory: GuestMemory,
        depth: u32,
    ) -> io::Result<FaultyEngine> {
        let (disk, faults) = (Arc::clone(&self.disk), Arc::clone(&self.faults));
        FaultyEngine::new(engine, memory, depth, disk, faults)
    }
}

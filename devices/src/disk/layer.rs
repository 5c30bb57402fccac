//! A disk around another one, whose engines see each transfer before the engines inside and each completion after them.
//!
//! A capability. `log_writes` and `injected_faults` each implement a [`Layer`] and its [`EngineLayer`]. What they have in common is here:
//! all other calls go to the disk inside.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::{
    Completion, Corruption, DeviceCommand, Disk, DiskError, DiskInfo, Engine, EngineSetup,
    GuestRange, Transfer,
};
use crate::GuestMemory;

/// The part of a layer that all workers of a disk share.
pub(super) trait Layer: Send + Sync + 'static {
    /// Its part for one worker.
    type Engine: EngineLayer + 'static;

    /// Makes what belongs to `engine`, which has `depth` transfers in flight at most.
    ///
    /// # Errors
    /// When the host has no descriptors for it.
    fn engine(
        &self,
        engine: &dyn Engine,
        memory: GuestMemory,
        depth: u32,
    ) -> io::Result<Self::Engine>;

    /// The disk inside has another size now.
    fn resized(&self, _bytes: u64) {}
}

/// What a layer does with the transfers of one worker. It belongs to that worker's thread, as the engine inside does.
pub(super) trait EngineLayer: Send {
    /// Hands `transfer` to `engine`, as it is or changed, or finishes it itself.
    fn submit(&mut self, engine: &mut dyn Engine, transfer: Transfer<'_>);

    /// Sees the completions that the engine inside has just appended to `done`: those from `first` on. It may add and remove some.
    fn complete(&mut self, done: &mut Vec<Completion>, first: usize);

    /// Whether requests may be merged before they come here, as in [`Engine::merges`].
    fn merges(&self) -> bool {
        true
    }

    /// How many transfers `complete` would add that the engine inside did not see.
    fn finished(&self) -> usize {
        0
    }

    /// The descriptor for [`Engine::completion_fd`]. `inside`: that of the engine inside.
    fn completion_fd(&self, inside: Option<RawFd>) -> Option<RawFd> {
        inside
    }

    /// Appends what it holds back: the engine inside has nothing in flight.
    fn wait_for_all(&mut self, _done: &mut Vec<Completion>) {}
}

/// `disk` with a layer around it.
pub(super) struct LayeredDisk<L> {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) layer: L,
}

impl<L: Layer> Disk for LayeredDisk<L> {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn info(&self) -> &DiskInfo {
        self.disk.info()
    }

    fn first_sector(&self) -> Option<[u8; 512]> {
        self.disk.first_sector()
    }

    fn refresh_capacity(&self) -> io::Result<u64> {
        self.disk.refresh_capacity()
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.disk.resize(bytes)?;
        self.layer.resized(bytes);
        Ok(())
    }

    fn allocated(&self) -> u64 {
        self.disk.allocated()
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
        let layer = self.layer.engine(&*engine, memory, depth)?;
        Ok(Box::new(LayeredEngine { engine, layer }))
    }
}

struct LayeredEngine<L> {
    engine: Box<dyn Engine>,
    layer: L,
}

impl<L: EngineLayer> Engine for LayeredEngine<L> {
    fn submit(&mut self, transfer: Transfer<'_>) {
        self.layer.submit(&mut *self.engine, transfer);
    }

    fn submit_scsi(&mut self, tag: u32, command: Arc<dyn DeviceCommand>, data: &[GuestRange]) {
        self.engine.submit_scsi(tag, command, data);
    }

    fn commit(&mut self) {
        self.engine.commit();
    }

    fn merges(&self) -> bool {
        self.layer.merges() && self.engine.merges()
    }

    fn finished(&self) -> usize {
        self.layer.finished() + self.engine.finished()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.engine.reap(done);
        self.layer.complete(done, first);
    }

    fn completion_fd(&self) -> Option<RawFd> {
        self.layer.completion_fd(self.engine.completion_fd())
    }

    fn wait_for_all(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.engine.wait_for_all(done);
        self.layer.complete(done, first);
        self.layer.wait_for_all(done);
    }
}

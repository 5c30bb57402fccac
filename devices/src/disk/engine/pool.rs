//! The trait of the threads that wait for the host, as the engine sees them: a [`Pool`] takes jobs that cannot be done at once,
//! and gives them back when they are done. `open` plugs in the implementation (`threads`).

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::disk::DiskError;
use crate::disk::job::Job;
use crate::disk::opened::OpenedDisk;
use crate::spawn::Spawn;

/// Makes the pool of one engine. Arguments: the disk; the most jobs at a time; the most threads; the eventfd that the pool writes
/// to when jobs finish after the last `reap`; what starts the threads.
pub(in crate::disk) type MakePool =
    fn(Arc<OpenedDisk>, usize, usize, EventFd, &Spawn) -> Box<dyn Pool>;

/// Executes jobs of every kind, on threads that may wait for the host. Dropping it waits for the jobs that it has.
pub(in crate::disk) trait Pool: Send {
    /// Takes a job.
    fn submit(&mut self, job: Box<Job>);

    /// Appends jobs that are done to `done`, without waiting.
    fn reap(&mut self, done: &mut VecDeque<(Box<Job>, Result<(), DiskError>)>);

    /// Waits until `reap` has something, if anything is in flight.
    fn wait(&self);
}

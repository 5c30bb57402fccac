//! What an engine knows of the threads that wait for the host: a [`Pool`] takes jobs that cannot be done at once, and gives them
//! back when they are done. `open` plugs it in (`threads`).

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::disk::DiskError;
use crate::disk::job::Job;
use crate::disk::opened::OpenedDisk;
use crate::spawn::Spawn;

/// Makes the pool of one engine: of a disk, with at most so many jobs at once and so many threads. The pool writes to the eventfd
/// when jobs are done after the last `reap`.
pub(in crate::disk) type MakePool =
    fn(Arc<OpenedDisk>, usize, usize, EventFd, &Spawn) -> Box<dyn Pool>;

/// Serves every job, and waits for the host on threads of its own. Dropping it waits for what it has.
pub(in crate::disk) trait Pool: Send {
    /// Takes a job.
    fn submit(&mut self, job: Box<Job>);

    /// Appends jobs that are done to `done`, without waiting.
    fn reap(&mut self, done: &mut VecDeque<(Box<Job>, Result<(), DiskError>)>);

    /// Waits until `reap` has something, if anything is in flight.
    fn wait(&self);
}

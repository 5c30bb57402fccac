//! The trait of what executes jobs while the worker does something else: io_uring (`uring`), and threads that wait for the host
//! (`threads`). `open` plugs both into an engine.

use std::collections::VecDeque;
use std::io;

use crate::disk::DiskError;
use crate::disk::job::Job;

/// What became of a job: how many bytes were moved, or the file's error. `None`: the route could not execute the job, which says
/// nothing about the file.
pub(in crate::disk) type Outcome = Option<Result<u64, DiskError>>;

/// Takes jobs, and gives them back when they are done. From the first `commit` on one thread uses it, the worker's. If a job is done
/// after the last `reap`, the executor writes to the engine's eventfd, which wakes that thread. Dropping the executor waits for its
/// jobs.
pub(in crate::disk) trait Executor: Send {
    /// Takes a job.
    ///
    /// # Errors
    /// It cannot execute the job, and gives it back.
    fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>>;

    /// Begins what was submitted, if it has not begun yet.
    fn commit(&mut self);

    /// Appends jobs that are done to `done`, without waiting.
    fn reap(&mut self, done: &mut VecDeque<(Box<Job>, Outcome)>);

    /// Waits until `reap` has something, if anything is in flight.
    ///
    /// # Errors
    /// When called by another thread than the one that committed.
    fn wait(&mut self) -> io::Result<()>;

    /// How many jobs were submitted that `reap` has not returned.
    fn in_flight(&self) -> usize;
}

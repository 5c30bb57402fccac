//! The asynchronous way to an image's file, as the engine knows it: a [`Ring`] takes jobs and gives them back when the kernel is
//! done with them. `open` plugs one in (io_uring), or none.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::disk::job::Job;
use crate::disk::raw::RawImage;
use crate::log_limit::LogLimit;

/// Makes the ring of one engine: for the image, with at most so many jobs at once. The ring writes to the eventfd
/// when a job is done after the last `reap`; the limit is for messages about what the kernel refuses.
pub(in crate::disk) type MakeRing =
    fn(&RawImage, usize, &EventFd, &Arc<LogLimit>) -> io::Result<Box<dyn Ring>>;

/// What became of a job: the bytes that were moved, or the file's error. `None`: the ring could not carry the job, which
/// says nothing about the file.
pub(in crate::disk) type Carried = Option<io::Result<u64>>;

/// Used by one thread from the first `commit` on.
pub(in crate::disk) trait Ring: Send {
    /// Queues a job for `commit`: a read, write or flush. Gives it back when the ring cannot take it.
    fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>>;

    /// Hands everything that was queued to the kernel.
    fn commit(&mut self);

    /// Appends completed jobs to `completed`, without waiting. From then on, until the next call, the eventfd tells about
    /// more.
    fn reap(&mut self, completed: &mut VecDeque<(Box<Job>, Carried)>);

    /// Waits until `reap` has something, if anything is in flight.
    ///
    /// # Errors
    /// When called by another thread than the one that committed.
    fn wait(&mut self) -> io::Result<()>;

    fn in_flight(&self) -> usize;
}

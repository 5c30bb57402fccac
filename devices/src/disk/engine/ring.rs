//! The trait of io_uring, as the engine sees it: a [`Ring`] takes jobs, and gives them back when the kernel has finished them.
//! `open` plugs in the implementation (`uring`), or none.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::disk::job::Job;
use crate::disk::raw::RawImage;
use crate::log_limit::LogLimit;

/// Makes the ring of one engine. Arguments: the image; the most jobs at a time; the eventfd that the ring writes to when a job
/// finishes after the last `reap`; the rate limit of messages about what the kernel refuses.
pub(in crate::disk) type MakeRing =
    fn(&RawImage, usize, &EventFd, &Arc<LogLimit>) -> io::Result<Box<dyn Ring>>;

/// The result of a job in the ring: how many bytes were moved, or the file's error. `None`: the ring could not execute the job,
/// which says nothing about the file.
pub(in crate::disk) type RingResult = Option<io::Result<u64>>;

/// Used by one thread from the first `commit` on.
pub(in crate::disk) trait Ring: Send {
    /// Queues a job for `commit`: a read, write or flush.
    ///
    /// # Errors
    /// The ring cannot take the job, and gives it back.
    fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>>;

    /// Hands everything that was queued to the kernel.
    fn commit(&mut self);

    /// Appends completed jobs to `completed`, without waiting. From then on the ring writes to the eventfd when more complete,
    /// until the next call.
    fn reap(&mut self, completed: &mut VecDeque<(Box<Job>, RingResult)>);

    /// Waits until `reap` has something, if anything is in flight.
    ///
    /// # Errors
    /// When called by another thread than the one that committed.
    fn wait(&mut self) -> io::Result<()>;

    fn in_flight(&self) -> usize;
}

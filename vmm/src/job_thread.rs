//! A thread for work that waits for the host's disk, such as a flush or a resize. The main thread hands work over, and asks for the
//! result after each event. The thread is started with the machine: a confined process could not start it later.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use devices::spawn::{Body, Spawn};

use crate::error::Error;
use crate::events::EventSender;

/// A thread that carries out one piece of work after the other. It ends when this value is dropped.
pub(crate) struct JobThread(Sender<Body>);

/// The result of a piece of work, which comes later. If the work panics, the channel closes without a result.
pub(crate) struct PendingResult(Receiver<Result<(), Error>>);

impl JobThread {
    /// Starts the thread `name`, which wakes `main_loop` after each piece of work.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn spawn(
        spawn: &Spawn,
        name: impl Into<String>,
        main_loop: Arc<EventSender>,
    ) -> Result<Self, Error> {
        let (sender, work) = channel::<Body>();
        let body = move || {
            for piece in work {
                // Work that panics drops the sender of its result.
                let _ = catch_unwind(AssertUnwindSafe(piece));
                main_loop.wake();
            }
        };
        spawn(name.into(), Box::new(body)).map_err(Error::host("start a thread"))?;
        Ok(Self(sender))
    }

    pub(crate) fn run(
        &self,
        work: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> PendingResult {
        let (sender, result) = channel();
        // Cannot fail: the thread ends only when this sender is dropped.
        let _ = self.0.send(Box::new(move || drop(sender.send(work()))));
        PendingResult(result)
    }
}

impl PendingResult {
    /// The result, if the work is done.
    pub(crate) fn poll(&self) -> Option<Result<(), Error>> {
        match self.0.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::ThreadPanicked)),
        }
    }
}

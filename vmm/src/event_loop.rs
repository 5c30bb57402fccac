//! The loop of the main thread: a table of sources, each of which acts on the machine.
//!
//! One round has three steps. A ready descriptor's source handles it ([`Source::process`]). The machine takes its next step
//! ([`Machine::advance`]). Every source gets the events that this caused ([`Source::on_events`]). If a source acts on the machine there,
//! the last two steps are repeated, so the loop sleeps only when no event is pending.
//!
//! The loop knows neither what a source is for nor what the machine does. `builder` chooses the sources and their order.

use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};

use crate::error::Error;
use crate::machine::{Machine, Outcome};
use crate::sources::{Poller, Source};

/// The machine, and everything that the main thread listens to. `cli` gets it from [`crate::build`]; [`EventLoop::run`]
/// consumes it and returns when the VM has ended.
pub struct EventLoop {
    pub(crate) machine: Machine,
    sources: Vec<Box<dyn Source>>,
    /// The guest waits for a control client to start it.
    paused: bool,
    /// Why `init` could not watch the descriptors. `run` ends the machine with it.
    watch_error: Option<event_manager::Error>,
}

impl EventLoop {
    /// A loop that is about to run. At the end the sources are finished in this order.
    pub(crate) fn new(machine: Machine, sources: Vec<Box<dyn Source>>, paused: bool) -> Self {
        Self { machine, sources, paused, watch_error: None }
    }

    /// Runs until the machine has ended: disks are drained and flushed, and the console has the guest's last output.
    ///
    /// # Errors
    /// The failure that ended the machine, or a disk that hangs or could not be flushed.
    pub fn run(self) -> Result<Outcome, Error> {
        let mut manager = EventManager::new()?;
        let paused = self.paused;
        // Calls `init`, so that the sources watch their descriptors before the guest runs. One of them confines this thread.
        let id = manager.add_subscriber(self);
        if !paused {
            manager.subscriber_mut(id)?.machine.resume()?;
        }
        let mut failed = manager.subscriber_mut(id)?.watch_error.take().map_or(Ok(()), Err);
        while failed.is_ok() && !manager.subscriber_mut(id)?.machine.is_over() {
            failed = manager.run().map(drop);
        }
        let Self { mut machine, sources, .. } = manager.remove_subscriber(id)?;
        if let Err(error) = failed {
            machine.end(Err(error.into()));
        }
        // Only if the loop has failed: the end still flushes the disks.
        while !machine.is_over() {
            machine.advance();
            std::thread::sleep(Duration::from_millis(1));
        }
        let outcome = machine.finish();
        sources.into_iter().for_each(|source| source.finish());
        outcome
    }

    fn advance(&mut self, ops: &mut EventOps<'_>) {
        loop {
            self.machine.advance();
            let events = std::mem::take(&mut self.machine.pending_events);
            let mut acted = false;
            for (row, source) in self.sources.iter_mut().enumerate() {
                acted |= source.on_events(&events, &mut Poller::new(ops, row), &mut self.machine);
            }
            if !acted && self.machine.pending_events.is_empty() {
                return;
            }
        }
    }
}

impl MutEventSubscriber for EventLoop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The timer of the deadline has the row after the last, which has no source: `advance` then looks at the clock.
        let mut watched = Poller::new(ops, self.sources.len()).add_edges(&self.machine.deadline, 0);
        for (row, source) in self.sources.iter_mut().enumerate() {
            watched = watched.and_then(|()| source.watch(&mut Poller::new(ops, row)));
        }
        self.watch_error = watched.err();
        self.advance(ops);
    }

    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        let (row, number) = Poller::decode(&event);
        if let Some(source) = self.sources.get_mut(row) {
            source.process(number, &mut Poller::new(ops, row), &mut self.machine);
        }
        self.advance(ops);
    }
}

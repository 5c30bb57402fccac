//! What the main loop waits for: the trait of a row in its table. Each row lives with what it is for, such as the console.

mod changes;

use std::os::fd::{AsRawFd, RawFd};

use event_manager::{EventOps, EventSet, Events};

use crate::machine::{Machine, MachineEvent};

/// A row of the main loop's table: descriptors, and what to do when one is ready. A source must not block, because meanwhile no other is
/// served, not even the one that reads SIGTERM.
pub(crate) trait Source {
    /// Adds the source's descriptors, each with a number of its own choice.
    ///
    /// # Errors
    /// When the host refuses to poll one.
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()>;

    fn process(&mut self, number: u8, poller: &mut Poller<'_, '_>, machine: &mut Machine);

    /// Tells the source what has happened to the machine since the last call. The main loop calls it after every event of any source.
    /// Returns `true` if the source has acted on the machine: then all sources are called again.
    fn on_events(
        &mut self,
        _events: &[MachineEvent],
        _poller: &mut Poller<'_, '_>,
        _machine: &mut Machine,
    ) -> bool {
        false
    }

    /// Called when the machine has ended. `on_events` has got the last events before.
    fn finish(self: Box<Self>) {}
}

/// A row's descriptors in the main loop's epoll set. The user data of each has the source's own number in the low 8 bits, so at most 256
/// descriptors, and the row above.
pub(crate) struct Poller<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    row: u32,
}

impl<'a, 'b> Poller<'a, 'b> {
    pub(crate) fn new(ops: &'a mut EventOps<'b>, row: usize) -> Self {
        Self { ops, row: row as u32 }
    }

    /// The row and the source's number of an event.
    pub(crate) fn decode(event: &Events) -> (usize, u8) {
        ((event.data() >> 8) as usize, event.data() as u8)
    }

    pub(crate) fn add(&mut self, fd: RawFd, number: u8) -> event_manager::Result<()> {
        self.ops.add(self.events(fd, number, EventSet::IN))
    }

    /// Polls a descriptor edge-triggered. Each expiry of a timer is an edge, so it need not be read. Each new client of a listener is
    /// one, so a client that cannot be accepted does not wake the loop again and again.
    pub(crate) fn add_edges(&mut self, fd: &dyn AsRawFd, number: u8) -> event_manager::Result<()> {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.ops.add(self.events(fd.as_raw_fd(), number, edges))
    }

    fn events(&self, fd: RawFd, number: u8, set: EventSet) -> Events {
        Events::with_data_raw(fd, self.row << 8 | u32::from(number), set)
    }
}

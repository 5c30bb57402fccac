//! Sources whose descriptors come and go, or are not always polled: those of consoles, control clients and debuggers.
//!
//! A capability of these sources: all others add their descriptors once.

use std::os::fd::RawFd;

use event_manager::{EventSet, Events};

use super::Poller;

impl Poller<'_, '_> {
    /// Changes what a descriptor is polled for. With an empty set it is polled for a hang-up only.
    pub(crate) fn modify(&self, fd: RawFd, number: u8, set: EventSet) -> event_manager::Result<()> {
        self.ops.modify(self.events(fd, number, set))
    }

    /// Polls a descriptor for `set`. With an empty set it is not polled, not even for a hang-up.
    pub(crate) fn poll_for(
        &mut self,
        fd: RawFd,
        number: u8,
        set: EventSet,
    ) -> event_manager::Result<()> {
        if set.is_empty() {
            self.stop_polling(fd);
            return Ok(());
        }
        self.modify(fd, number, set).or_else(|_| self.ops.add(self.events(fd, number, set)))
    }

    /// Stops polling a descriptor, if it is polled. Call this before the descriptor is closed: the loop would refuse a new one with the
    /// same number.
    pub(crate) fn stop_polling(&mut self, fd: RawFd) {
        let _ = self.ops.remove(Events::empty_raw(fd));
    }
}

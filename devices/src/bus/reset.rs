//! The reset of every device on a bus, for a reset of the machine, and the wait for it with a deadline.
//!
//! A capability: a machine that is never reset does without it. It hooks in as a child of the bus's module, and adds [`Bus::reset`] and
//! [`Unfinished::wait_until`].

use std::time::Instant;

use super::{Bus, Entry, Unfinished};

impl Bus {
    /// Begins to reset every device, and returns the resets that wait for their device's threads.
    pub fn reset(&self) -> Vec<Unfinished> {
        let reset = |Entry { device, .. }: &Entry| {
            // A poisoned device: as in `with_device`.
            device.lock().ok()?.reset();
            Unfinished::of(device)
        };
        self.entries.values().filter_map(reset).collect()
    }
}

impl Unfinished {
    /// Waits until the write has taken effect (`None`), or it is `deadline`.
    pub fn wait_until(self, deadline: Instant) -> Option<Self> {
        self.wait(|drain| drain.wait(deadline.saturating_duration_since(Instant::now())))
    }
}

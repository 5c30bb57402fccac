//! The reset of every device on a bus, for a reset of the machine, and how the machine learns that it is done.
//!
//! A capability: a machine that is never reset does without it. It hooks in as a child of the bus's module, and adds [`Bus::reset`],
//! [`Unfinished::on_done`] and [`Unfinished::poll`].

use super::{Bus, Entry, Unfinished};
use crate::virtio::drain::Drain;

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
    /// Calls `callback` when the device's threads have finished. It must not block: it is meant to wake a thread.
    pub fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        self.drain.on_done(callback);
    }

    /// Returns itself if the device's threads have not finished. `None`: the reset has taken effect.
    pub fn poll(self) -> Option<Self> {
        self.wait(Drain::is_done)
    }
}

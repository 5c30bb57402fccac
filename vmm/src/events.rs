//! Events from the machine's other threads to the main loop: a channel, and an eventfd that wakes the loop. `machine::reports` acts on
//! them.
//!
//! vCPU threads and disk workers send them, and must never wait for the main loop. So the channel is bounded, and if it is full, an event
//! is dropped. Nothing is lost by that: an earlier event already ends the machine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use devices::legacy::GuestEvent;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;

/// An event that only the main loop may act on. The thread that sends it does not wait: a vCPU that has powered the machine off runs
/// on until it is stopped.
#[derive(Debug)]
pub(crate) enum VmEvent {
    /// The guest used one of its power, panic or exit registers.
    Guest(GuestEvent),
    /// A vCPU shut down without being asked: a triple fault (SDM 3A 6.15, APM 2 8.2.9).
    TripleFault,
    /// A vCPU met a breakpoint, or an instruction that KVM cannot emulate, or finished a step. It stays outside the guest until the machine has stopped.
    Debug,
    Failed(Error),
}

/// The size of a bounded channel. A guest can write to its power registers in a loop until its vCPUs are stopped, and a failing disk
/// can fail any number of requests.
pub(crate) const CAPACITY: usize = 64;

/// The sending end, for any number of threads. No method blocks, so each may be called while a device is locked.
#[derive(Debug)]
pub(crate) struct EventSender {
    events: SyncSender<VmEvent>,
    /// Readable when there may be new events.
    pub(crate) wake_fd: EventFd,
    /// Whether the main loop has been woken and has not taken the events yet.
    pub(crate) awake: AtomicBool,
}

/// Makes the two ends.
///
/// # Errors
/// When the host has no eventfd left.
pub(crate) fn event_channel() -> io::Result<(Arc<EventSender>, Receiver<VmEvent>)> {
    let (events, receiver) = sync_channel(CAPACITY);
    let (wake_fd, awake) = (EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?, AtomicBool::new(false));
    Ok((Arc::new(EventSender { events, wake_fd, awake }), receiver))
}

impl EventSender {
    /// An event that finds the channel full is dropped.
    pub(crate) fn send(&self, event: VmEvent) {
        let _ = self.events.try_send(event);
        self.wake();
    }

    pub(crate) fn wake(&self) {
        self.awake.store(true, Ordering::Release);
        // Fails only when the counter is full: then the main thread is awake anyway.
        let _ = self.wake_fd.write(1);
    }
}

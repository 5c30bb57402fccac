//! Events from the machine's other threads to the main loop: three channels, and an eventfd that wakes the loop.
//!
//! Senders are vCPU threads and disk workers, which must never wait for the main loop: two of the channels are bounded, and an
//! event that finds its channel full is dropped. What would be lost for good that way is kept elsewhere: disks know their I/O
//! status, and the events that were sent before already end the machine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use devices::block::BlockEvent;
use devices::legacy::GuestEvent;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;

/// What a vCPU or a disk's worker reports because only the main loop may act on it. The thread that sends it does not
/// wait for the reaction: a vCPU that switched the machine off runs on until it is stopped.
#[derive(Debug)]
pub(crate) enum VmEvent {
    /// The guest used one of its power, panic or exit registers.
    Guest(GuestEvent),
    /// A vCPU shut down without being asked: a triple fault (SDM 3A 6.15, APM 2 8.2.9).
    TripleFault,
    /// A vCPU met what a debugger waits for. It stays outside the guest until the machine has stopped.
    Debug,
    Failed(Error),
}

/// Events that may wait in a bounded channel. A guest can write to its power registers in a loop until its vCPUs are stopped,
/// and a failing disk can fail any number of requests.
const CAPACITY: usize = 64;

/// The sending end, for any number of threads. No method blocks, so each may be called while a device is locked, and at
/// any point of a vCPU's exit.
#[derive(Debug)]
pub(crate) struct EventSender {
    ends: SyncSender<VmEvent>,
    disks: SyncSender<BlockEvent>,
    /// Unbounded: each event answers a command, and its client waits for it.
    thresholds: Sender<BlockEvent>,
    wake: EventFd,
    awake: Arc<AtomicBool>,
}

#[derive(Debug)]
pub(crate) struct EventReceiver {
    ends: Receiver<VmEvent>,
    disks: Receiver<BlockEvent>,
    thresholds: Receiver<BlockEvent>,
    wake: EventFd,
    awake: Arc<AtomicBool>,
}

/// Makes the two ends.
///
/// # Errors
/// When the host has no eventfd left.
pub(crate) fn event_channel() -> io::Result<(EventSender, EventReceiver)> {
    let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let ((ends, ended), (disks, reports)) = (sync_channel(CAPACITY), sync_channel(CAPACITY));
    let (thresholds, exceeded) = channel();
    let awake = Arc::<AtomicBool>::default();
    let receiver = EventReceiver {
        ends: ended,
        disks: reports,
        thresholds: exceeded,
        wake: wake.try_clone()?,
        awake: Arc::clone(&awake),
    };
    Ok((EventSender { ends, disks, thresholds, wake, awake }, receiver))
}

impl EventSender {
    /// Never blocks. An event that finds the channel full is dropped.
    pub(crate) fn send(&self, event: VmEvent) {
        let _ = self.ends.try_send(event);
        self.wake();
    }

    /// Whether the main loop has been woken and has not taken the events yet.
    pub(crate) fn is_awake(&self) -> bool {
        self.awake.load(Ordering::Acquire)
    }

    pub(crate) fn report(&self, event: BlockEvent) {
        match event {
            BlockEvent::WorkerFailed { device, message } => {
                self.send(VmEvent::Failed(Error::DiskThread { device, message }));
            }
            event @ BlockEvent::IoError { .. } => {
                let _ = self.disks.try_send(event);
                self.wake();
            }
            event @ BlockEvent::WriteThreshold { .. } => {
                let _ = self.thresholds.send(event);
                self.wake();
            }
        }
    }

    pub(crate) fn wake(&self) {
        self.awake.store(true, Ordering::Release);
        // Fails only when the counter is full: then the main thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

impl EventReceiver {
    /// Readable when there may be something new; `clear` makes it unreadable.
    pub(crate) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// To be called before `next` and `disk_events`: an event sent after this wakes the loop again.
    pub(crate) fn clear(&self) {
        let _ = self.wake.read();
        self.awake.store(false, Ordering::Release);
    }

    pub(crate) fn next(&self) -> Option<VmEvent> {
        self.ends.try_recv().ok()
    }

    /// What disks reported since the last call. Of I/O errors no more than the channel holds, so that a failing disk cannot keep
    /// the main loop busy.
    pub(crate) fn disk_events(&self) -> Vec<BlockEvent> {
        self.disks.try_iter().take(CAPACITY).chain(self.thresholds.try_iter()).collect()
    }
}

//! Events from the machine's other threads to the main loop: three channels, and an eventfd that wakes the loop.
//!
//! Senders are vCPU threads and disk workers, which must never wait for the main loop. Two of the channels are bounded, and an event
//! is dropped if its channel is full. Nothing important is lost: an I/O error also sets the status of its disk, which the main loop
//! reads, and if the channel of vCPU events is full, an earlier event already ends the machine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use devices::block::BlockEvent;
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
const CAPACITY: usize = 64;

/// The sending end, for any number of threads. No method blocks, so each may be called while a device is locked.
#[derive(Debug)]
pub(crate) struct EventSender {
    ends: SyncSender<VmEvent>,
    disks: SyncSender<BlockEvent>,
    /// Unbounded, because a client waits for each event. There is at most one for each `block-set-write-threshold` command.
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
    /// Readable when there may be new events. `clear` makes it unreadable.
    pub(crate) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Call this before `next` and `disk_events`: an event that is sent after this wakes the loop again.
    pub(crate) fn clear(&self) {
        let _ = self.wake.read();
        self.awake.store(false, Ordering::Release);
    }

    pub(crate) fn next(&self) -> Option<VmEvent> {
        self.ends.try_recv().ok()
    }

    /// The events of disks since the last call, but at most [`CAPACITY`] I/O errors, so that a failing disk cannot keep the main loop
    /// in this call.
    pub(crate) fn disk_events(&self) -> Vec<BlockEvent> {
        self.disks.try_iter().take(CAPACITY).chain(self.thresholds.try_iter()).collect()
    }
}

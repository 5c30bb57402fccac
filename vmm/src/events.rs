//! What other threads tell the main thread: three channels, and an eventfd that wakes its loop.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use devices::block::BlockEvent;
use devices::legacy::GuestEvent;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Something that the main thread has to decide about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VmEvent {
    /// The guest used one of its power, panic or exit registers.
    Guest(GuestEvent),
    /// A vCPU shut down without being asked: a triple fault (SDM 3A 6.15, APM 2 8.2.9).
    TripleFault,
    /// A thread of ours cannot go on; the text says why.
    Failed(String),
}

/// Events of each sort that may wait. A guest can write to its power registers in a loop until its vCPUs are stopped, and
/// a failing disk can fail any number of requests.
const CAPACITY: usize = 64;

/// The sending end, for any number of threads.
#[derive(Debug)]
pub(crate) struct EventSender {
    ends: SyncSender<VmEvent>,
    disks: SyncSender<BlockEvent>,
    /// Without a bound, since each answers to a command, and no client waits in vain.
    thresholds: Sender<BlockEvent>,
    wake: EventFd,
}

/// The receiving end, for the main thread.
#[derive(Debug)]
pub(crate) struct EventReceiver {
    ends: Receiver<VmEvent>,
    disks: Receiver<BlockEvent>,
    thresholds: Receiver<BlockEvent>,
    wake: EventFd,
}

/// Makes the two ends.
///
/// # Errors
/// When the host has no eventfd left.
pub(crate) fn event_channel() -> io::Result<(EventSender, EventReceiver)> {
    let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let ((ends, ended), (disks, reports)) = (sync_channel(CAPACITY), sync_channel(CAPACITY));
    let (thresholds, exceeded) = channel();
    let sender = EventSender { ends, disks, thresholds, wake: wake.try_clone()? };
    Ok((sender, EventReceiver { ends: ended, disks: reports, thresholds: exceeded, wake }))
}

impl EventSender {
    /// Never blocks. An event that finds the channel full is dropped: others before it end the VM, too.
    pub(crate) fn send(&self, event: VmEvent) {
        let _ = self.ends.try_send(event);
        self.wake();
    }

    /// What a disk's thread reports. Never blocks: an error that finds the channel full is lost, but the main thread will
    /// look at the disks' states, which are never lost.
    pub(crate) fn report(&self, event: BlockEvent) {
        match event {
            BlockEvent::WorkerFailed { device, message } => {
                self.send(VmEvent::Failed(format!("disk {device}: {message}")));
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

    fn wake(&self) {
        // Fails only when the counter is full: then the main thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

impl EventReceiver {
    /// Readable when there may be something new; `clear` makes it unreadable.
    pub(crate) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// To be called before looking: an event sent after this wakes the loop again.
    pub(crate) fn clear(&self) {
        let _ = self.wake.read();
    }

    /// The next event, without waiting.
    pub(crate) fn next(&self) -> Option<VmEvent> {
        self.ends.try_recv().ok()
    }

    /// What disks reported; of errors no more than the channel can hold: a failing disk must not keep the main thread busy.
    pub(crate) fn reports(&self) -> Vec<BlockEvent> {
        self.disks.try_iter().take(CAPACITY).chain(self.thresholds.try_iter()).collect()
    }
}

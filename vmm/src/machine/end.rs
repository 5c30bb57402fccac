//! The end of the machine. [`Machine::end`] stops the vCPUs and pauses the disks. From then on [`Machine::advance`] flushes each disk as
//! soon as it has drained. So if one disk hangs, the data of the others still reaches the medium. At the deadline the machine ends
//! without what hangs.

use std::sync::Arc;
use std::time::Instant;

use super::{DiskState, End, Machine, MachineDisk, MachineEvent, Outcome};
use crate::error::Error;
use crate::job_thread::PendingResult;
use crate::vcpu::VcpuThread;

impl Machine {
    /// Begins to end the machine: vCPUs stop, and each disk is flushed as soon as it has drained. If the end has begun already, the
    /// first outcome counts.
    pub(crate) fn end(&mut self, outcome: Result<Outcome, Error>) {
        if self.end.is_some() {
            return;
        }
        self.emit(MachineEvent::Shutdown(outcome.as_ref().ok().cloned()));
        self.cancel_task(Error::Ending);
        if let Some(standstill) = self.standstill.take() {
            self.emit(MachineEvent::Done(standstill.job, Err(Error::Ending)));
        }
        let began = self.begin_to_pause();
        self.end = Some(End { outcome, began, limit: self.stop_timeout, over: false });
    }

    /// Takes the next step of the end: flushes disks that have drained. At the deadline the end is over, with an error that names what
    /// hangs.
    pub(super) fn advance_end(&mut self) {
        let Some(mut end) = self.end.take() else { return };
        for disk in &mut self.hardware.disks {
            if disk.is_paused() {
                disk.state = disk.begin_flush().map_or(DiskState::Flushed, DiskState::Flushing);
            }
            if let DiskState::Flushing(flush) = &disk.state
                && let Some(result) = flush.poll()
            {
                disk.state = DiskState::Flushed;
                end.outcome = end.outcome.and_then(|outcome| result.map(|()| outcome));
            }
        }
        let hung = self.hung(end.began, MachineDisk::is_flushed);
        if hung.is_none() || end.began.elapsed() >= end.limit {
            end.over = true;
            end.outcome = hung.map_or(end.outcome, Err);
        }
        self.end = Some(end);
    }

    /// Whether the end is over, so that `finish` can be called.
    pub(crate) fn is_over(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.over)
    }

    /// Ends the threads and frees everything. If something hangs, nothing is freed, because a thread or the host may still use guest
    /// memory: the exit of the process frees it.
    ///
    /// # Errors
    /// What ended the machine, or what hangs, or a disk that could not be flushed.
    pub(crate) fn finish(mut self) -> Result<Outcome, Error> {
        let hangs = self.hung(Instant::now(), MachineDisk::is_flushed).is_some();
        let outcome = self.end.take().map_or(Err(Error::Ending), |end| end.outcome);
        if hangs {
            std::mem::forget(self);
        } else {
            self.hardware.vcpus.into_iter().for_each(VcpuThread::finish);
        }
        outcome.map_err(|error| Error::Stopped(Box::new(error)))
    }
}

impl MachineDisk {
    /// Begins to flush the image on the disk's own job thread, so that a disk that hangs does not delay the others. `None`: the disk is
    /// read-only.
    pub(super) fn begin_flush(&self) -> Option<PendingResult> {
        let (image, device) = (Arc::clone(&self.image), self.config.id.clone());
        let flush = move || image.flush().map_err(|source| Error::Flush { device, source });
        (!self.image.info().read_only).then(|| self.job_thread.run(flush))
    }
}

//! The end of the machine. [`Machine::end`] stops the vCPUs and pauses the disks. From then on [`Machine::advance`] takes each disk
//! from draining to flushing as soon as that disk is ready. So if one disk hangs, the data of the others still reaches the medium.
//! At the deadline the machine ends without what hangs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DiskEnd, End, Machine, MachineDisk, MachineEvent, Outcome, is_paused};
use crate::error::Error;
use crate::vcpu::VcpuThread;

/// How long the end may take, from its beginning, if a further signal or `Ctrl-A x` comes meanwhile. It is not zero, because
/// timeout(1) sends its signal twice: to the process and to its group. If all disks answer, the end takes a fraction of this time.
const HURRIED_END: Duration = Duration::from_secs(1);

impl Machine {
    /// Begins to end the machine: vCPUs stop, and each disk is flushed as soon as it has drained. If the end has begun already, the
    /// first outcome counts. A further signal other than SIGHUP, or `Ctrl-A x`, then limits the end to [`HURRIED_END`].
    pub(crate) fn end(&mut self, outcome: Result<Outcome, Error>) {
        // Not SIGHUP: when a terminal closes, the shell and the kernel each send one.
        let is_users = matches!(&outcome, Ok(Outcome::Signal(signal)) if *signal != libc::SIGHUP)
            || matches!(outcome, Ok(Outcome::Quit));
        if let Some(end) = &mut self.end {
            if is_users && end.limit > HURRIED_END {
                end.limit = HURRIED_END;
                let left = HURRIED_END.saturating_sub(end.began.elapsed());
                self.start_deadline(left);
            }
            return;
        }
        self.emit(MachineEvent::Shutdown(outcome.as_ref().ok().cloned()));
        self.cancel_task(Error::Stopping);
        if let Some(standstill) = self.standstill.take() {
            self.emit(MachineEvent::Done(standstill.job, Err(Error::Stopping)));
        }
        let began = self.begin_to_pause();
        let disks = self.hardware.disks.iter().map(|_| DiskEnd::Draining).collect();
        self.end = Some(End { outcome, began, limit: self.stop_timeout, disks, over: false });
    }

    /// Takes the next step of the end: flushes disks that have drained, and looks for the deadline.
    pub(super) fn advance_end(&mut self) {
        let Some(mut end) = self.end.take() else { return };
        for (disk, state) in self.hardware.disks.iter().zip(&mut end.disks) {
            if matches!(state, DiskEnd::Draining) && is_paused(disk) {
                *state = begin_flush(disk);
            }
            if let DiskEnd::Flushing(answer) = state
                && let Some(result) = answer.poll()
            {
                *state = DiskEnd::Done;
                end.outcome = end.outcome.and_then(|outcome| result.map(|()| outcome));
            }
        }
        let stands_still = end.disks.iter().all(|disk| matches!(disk, DiskEnd::Done))
            && self.hardware.vcpus.iter().all(VcpuThread::has_left);
        let is_late = end.began.elapsed() >= end.limit;
        end.over |= stands_still;
        self.end = Some(end);
        if is_late && !stands_still {
            self.abandon_end();
        }
    }

    /// The deadline has passed: the end is over, with an error that names what hangs.
    fn abandon_end(&mut self) {
        let Some(began) = self.end.as_ref().map(|end| end.began) else { return };
        let hung = self.hung(began);
        if let Some(end) = &mut self.end {
            end.over = true;
            if let Some(error) = hung {
                end.outcome = Err(error);
            }
        }
    }

    /// Whether the end is over, so that `finish` can be called.
    pub(crate) fn is_over(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.over)
    }

    /// Ends the threads and frees everything. If something hangs, nothing is freed, because a thread or the host may still use guest
    /// memory. The exit of the process frees it.
    ///
    /// # Errors
    /// The failure that ended the machine, or what hangs, or a disk that could not be flushed.
    pub(crate) fn finish(mut self) -> Result<Outcome, Error> {
        let hangs = self.hung(Instant::now()).is_some();
        let outcome = self.end.take().map_or(Err(Error::Stopping), |end| end.outcome);
        if hangs {
            std::mem::forget(self);
        } else {
            self.hardware.vcpus.into_iter().for_each(VcpuThread::finish);
        }
        outcome.map_err(|error| Error::Stopped(Box::new(error)))
    }
}

/// Begins to flush a disk on its own background thread, so that a disk that hangs does not delay the others.
fn begin_flush(disk: &MachineDisk) -> DiskEnd {
    if disk.image.read_only() {
        return DiskEnd::Done;
    }
    let (image, device) = (Arc::clone(&disk.image), disk.config.id.clone());
    let flush = move || image.flush().map_err(|source| Error::Flush { device, source });
    DiskEnd::Flushing(disk.background.run(flush))
}

//! The task of a save. When everything stands still it begins to save. Afterwards the machine is in the state `postmigrate`. After a
//! save that failed, a background save, and `dump-guest-memory`, it is in the state from before, and a guest that ran goes on.
//!
//! | state of the machine | event | next state |
//! |---|---|---|
//! | any but `Shutdown` | everything stands still, and no event of a vCPU waits | `FinishMigrate` |
//! | `FinishMigrate` | the save is done | `PostMigrate` |
//! | `FinishMigrate` | `dump-guest-memory` is done, or the child of a background save has the memory | the one before |
//! | `FinishMigrate` | the save failed, or was canceled | the one before |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::kvm_clock_data;

use super::{Machine, MachineEvent, RunState, Standstill, Task};
use crate::error::Error;
use crate::job_thread::PendingResult;

/// The second part of a save: flushes the disks and writes the file, on the thread `machine-job`.
pub(crate) type Work = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// The first part of a save, which reads the state of the machine on the main thread.
pub(crate) type BeginSave = Box<dyn FnOnce(&Machine) -> Result<Work, Error>>;

struct SaveTask {
    /// The number of its `Done` event.
    job: u64,
    /// `None`: it has been called.
    begin: Option<BeginSave>,
    /// Makes the work end early.
    cancel: Arc<AtomicBool>,
    /// The result of the work, when it has begun.
    work: Option<PendingResult>,
    /// The state of the machine before the save.
    before: RunState,
    /// After the save the machine is in the state from before, and not in `postmigrate`.
    goes_on: bool,
}

impl Machine {
    /// Saves the machine at a standstill. Afterwards it `goes_on`, or stays stopped. Returns the number of the `Done` event.
    ///
    /// # Errors
    /// The machine is about to end, is being saved, or is being reset.
    pub(crate) fn save(
        &mut self,
        begin: BeginSave,
        cancel: Arc<AtomicBool>,
        goes_on: bool,
    ) -> Result<u64, Error> {
        // A reset that has begun has changed the state that would be saved.
        let is_busy = |standstill: &Standstill| {
            standstill.tasks.iter().any(|task| task.is_cancelable() || task.is_irrevocable())
        };
        let busy = self.standstill.as_ref().is_some_and(is_busy);
        if busy || self.end.is_some() {
            return Err(Error::Stopping);
        }
        let (job, before) = (self.next_job(), self.state);
        let task = SaveTask { job, begin: Some(begin), cancel, work: None, before, goes_on };
        self.stand_still(|standstill| standstill.tasks.push_front(Box::new(task)));
        Ok(job)
    }

    /// The state and clock of the stopped machine, to be saved.
    pub(crate) fn state_and_clock(&self) -> (RunState, Option<kvm_clock_data>) {
        (self.state, self.clock)
    }

    /// Gives a machine that has not run yet the state and clock of a saved one.
    pub(crate) fn restore(&mut self, state: RunState, clock: kvm_clock_data) {
        (self.state, self.clock) = (state, Some(clock));
    }
}

impl Task for SaveTask {
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        // Wait until the main loop has taken all events: an event may end the machine, and is not part of the saved state.
        let awake = machine.wake_main_loop.awake.load(Ordering::Acquire);
        if let Some(begin) = self.begin.take_if(|_| !awake) {
            self.before = machine.state;
            let work = begin(machine).unwrap_or_else(|error| Box::new(|| Err(error)));
            if machine.state == RunState::Running {
                machine.emit(MachineEvent::Stop);
            }
            machine.state = RunState::FinishMigrate;
            self.work = Some(machine.job_thread.run(work));
        }
        let Some(result) = self.work.as_ref().and_then(PendingResult::poll) else {
            return Ok(false);
        };
        self.conclude(machine, result);
        Ok(true)
    }

    fn is_cancelable(&self) -> bool {
        true
    }

    fn cancel(&mut self, machine: &mut Machine, error: Error) {
        self.cancel.store(true, Ordering::Relaxed);
        self.conclude(machine, Err(error));
    }
}

impl SaveTask {
    fn conclude(&mut self, machine: &mut Machine, result: Result<(), Error>) {
        if machine.state == RunState::FinishMigrate {
            let stays = result.is_ok() && !self.goes_on;
            machine.state = if stays { RunState::PostMigrate } else { self.before };
            if machine.state == RunState::Running {
                machine.emit(MachineEvent::Resume);
            }
        }
        machine.emit(MachineEvent::Done(self.job, result));
    }
}

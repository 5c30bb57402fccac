//! The task of a save. When everything stands still it begins to save. Afterwards the machine is in the state `postmigrate`. After a
//! save that failed, a background save, and `dump-guest-memory`, it is in the state from before, and a guest that ran goes on.
//!
//! | state of the machine | event | next state |
//! |---|---|---|
//! | any but `Shutdown` | everything stands still, no event of a vCPU waits, and the machine has been read | `FinishMigrate` |
//! | `FinishMigrate` | the save is done | `PostMigrate` |
//! | `FinishMigrate` | `dump-guest-memory` is done, or the child of a background save has the memory | the one before |
//! | `FinishMigrate` | the save failed, or was canceled | the one before |
//!
//! The guest waits meanwhile. So a flush that the host does not finish fails the save at its own deadline, `--stop-timeout`. How long it
//! takes to write the file depends on its size, so a client decides about that, by `migrate_cancel`.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;

use super::{Machine, MachineDisk, MachineEvent, RunState, Standstill, Task};
use crate::error::Error;
use crate::job_thread::PendingResult;

/// What is left of a save when the machine has been read.
pub(crate) struct Work {
    /// Whether the disks are flushed before the file is written.
    pub flush_disks: bool,
    /// Writes the file, on the thread `machine-job`.
    pub write: Box<dyn FnOnce() -> Result<(), Error> + Send>,
}

/// The first step of a save, which reads the state of the machine on the main thread.
pub(crate) type BeginSave = Box<dyn FnOnce(&Machine) -> Result<Work, Error>>;

/// How long a canceled save waits until the file is given up. A write that the host does not complete takes longer: its file gets no
/// name.
const CANCEL_LIMIT: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
#[error("the save was canceled")]
struct Canceled;

fn canceled() -> Error {
    Error::Capability(Box::new(Canceled))
}

struct SaveTask {
    /// The number of its `Done` event.
    job: u64,
    step: Step,
    /// Set by a client, or when the machine ends. Makes the writing end early.
    cancel: Arc<AtomicBool>,
    /// The state of the machine before the save.
    before: RunState,
    /// After the save the machine is in the state from before, and not in `postmigrate`.
    goes_on: bool,
}

enum Step {
    Read(BeginSave),
    /// The flushes that are not over, each with its disk's name, and when they began.
    Flush(Instant, Vec<(String, PendingResult)>, Work),
    Write(PendingResult),
    /// A client has canceled the save at this time.
    Cancel(Instant, PendingResult),
    Over,
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
        if self.end.is_some() {
            return Err(Error::Ending);
        }
        if self.standstill.as_ref().is_some_and(is_busy) {
            return Err(Error::Busy);
        }
        let (job, before) = (self.next_job(), self.state);
        let task = SaveTask { job, step: Step::Read(begin), cancel, before, goes_on };
        self.stand_still(|standstill| standstill.tasks.push_front(Box::new(task)));
        Ok(job)
    }

    /// Begins to flush the disks, and starts the timer of their deadline. Returns the time when this began.
    fn begin_flushes(&mut self, wanted: bool) -> (Instant, Vec<(String, PendingResult)>) {
        // Read before the timer starts, so that the whole time has passed when the timer expires.
        let began = Instant::now();
        if !wanted {
            return (began, Vec::new());
        }
        self.start_deadline(self.stop_timeout);
        let flush = |disk: &MachineDisk| Some((disk.config.id.clone(), disk.begin_flush()?));
        (began, self.hardware.disks.iter().filter_map(flush).collect())
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
        let step = mem::replace(&mut self.step, Step::Over);
        let result = match self.next_step(machine, step) {
            Ok(Step::Over) => Ok(()),
            Ok(step) => {
                self.step = step;
                return Ok(false);
            }
            Err(error) => Err(error),
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
    /// The step after `step`, or `step` itself if it has to wait.
    fn next_step(&mut self, machine: &mut Machine, step: Step) -> Result<Step, Error> {
        let is_canceled = self.cancel.load(Ordering::Relaxed);
        match step {
            // Wait until the main loop has taken all events: an event may end the machine, and is not part of the saved state.
            Step::Read(begin) if machine.wake_main_loop.awake.load(Ordering::Acquire) => {
                Ok(Step::Read(begin))
            }
            Step::Read(begin) => {
                let work = begin(machine)?;
                self.before = machine.state;
                if machine.state == RunState::Running {
                    machine.emit(MachineEvent::Stop);
                }
                machine.state = RunState::FinishMigrate;
                let (began, flushes) = machine.begin_flushes(work.flush_disks);
                self.next_step(machine, Step::Flush(began, flushes, work))
            }
            Step::Flush(..) if is_canceled => Err(canceled()),
            Step::Flush(began, flushes, work) => {
                let mut pending = Vec::new();
                for (disk, flush) in flushes {
                    match flush.poll() {
                        Some(result) => result?,
                        None => pending.push((disk, flush)),
                    }
                }
                if pending.is_empty() {
                    return Ok(Step::Write(machine.job_thread.run(work.write)));
                }
                let after = began.elapsed();
                if after < machine.stop_timeout {
                    return Ok(Step::Flush(began, pending, work));
                }
                let names: Vec<_> = pending.into_iter().map(|(disk, _)| disk).collect();
                Err(Error::DiskHung { disks: names.join(", "), after })
            }
            Step::Write(result) => match result.poll() {
                Some(result) => result.map(|()| Step::Over),
                None if is_canceled => {
                    machine.start_deadline(CANCEL_LIMIT);
                    Ok(Step::Cancel(Instant::now(), result))
                }
                None => Ok(Step::Write(result)),
            },
            Step::Cancel(began, result) => match result.poll() {
                Some(result) => result.map(|()| Step::Over),
                None if began.elapsed() >= CANCEL_LIMIT => Err(canceled()),
                None => Ok(Step::Cancel(began, result)),
            },
            Step::Over => Ok(Step::Over),
        }
    }

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

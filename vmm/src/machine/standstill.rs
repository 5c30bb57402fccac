//! The standstill of the machine: how it begins, what is done when everything stands still, and what happens at its deadline.
//!
//! A stop begins a standstill, or joins the one under way. So does each [`Task`](super::Task): a reset, a save, the release of mapped
//! files, the check for a halted guest. Nothing here waits: the main loop calls [`Machine::advance`] after every event.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::kvm_clock_data;

use super::{DiskState, Hardware, Machine, MachineDisk, MachineEvent, RunState, Standstill};
use crate::error::{Error, VcpuError};
use crate::vcpu::VcpuThread;

impl Machine {
    /// Begins to stop the guest. Afterwards no vCPU is in the guest, no request is with the host, and memory and disks do not change.
    /// Returns the number of the `Done` event to come. `None`: the machine does not run.
    pub(crate) fn stop(&mut self, state: RunState) -> Option<u64> {
        (self.state() == RunState::Running)
            .then(|| self.stand_still(|standstill| standstill.stop = Some(state)))
    }

    /// Begins a standstill, or joins the one under way, and calls `add` on it. Returns its job number. During the end of the machine
    /// it does nothing and returns 0.
    pub(super) fn stand_still(&mut self, add: impl FnOnce(&mut Standstill)) -> u64 {
        if self.standstill.is_none() && self.end.is_none() {
            let (job, began) = (self.next_job(), self.begin_to_pause());
            self.standstill = Some(Standstill {
                job,
                began,
                stop: None,
                tasks: VecDeque::new(),
                done: Vec::new(),
            });
        }
        let Some(standstill) = &mut self.standstill else { return 0 };
        add(standstill);
        standstill.job
    }

    /// Cancels the task that is cancelable, if there is one. Also cancels a background save: it reads pages of files, which other
    /// programs may change when the machine has released its lease.
    pub(crate) fn cancel_task(&mut self, error: Error) {
        if let Some(cancel) = self.background_save.take() {
            cancel.store(true, Ordering::Relaxed);
        }
        let Some(standstill) = &mut self.standstill else { return };
        let cancelable = standstill.tasks.iter().position(|task| task.is_cancelable());
        if let Some(mut task) = cancelable.and_then(|at| standstill.tasks.remove(at)) {
            task.cancel(self, error);
        }
    }

    /// Tells all vCPUs and disks to pause, and starts the timer of the deadline. Returns the time when this began.
    pub(super) fn begin_to_pause(&mut self) -> Instant {
        // Read before the timer starts, so that the whole time has passed when the timer expires.
        let began = Instant::now();
        self.start_deadline(self.stop_timeout);
        self.hardware.vcpus.iter().for_each(VcpuThread::pause);
        for disk in &mut self.hardware.disks {
            let (drain, main_loop) = (disk.handle.pause(), Arc::clone(&self.wake_main_loop));
            drain.on_done(move || main_loop.wake());
            disk.state = DiskState::Pausing(drain);
        }
        began
    }

    /// Sets the timer, so that the main loop calls [`advance`](Self::advance) after `limit`.
    pub(super) fn start_deadline(&mut self, limit: Duration) {
        // A timer set to zero never expires.
        if let Err(error) = self.deadline.reset(limit.max(Duration::from_nanos(1)), None) {
            tracing::warn!("--stop-timeout cannot be kept: cannot set the timer: {error}");
        }
    }

    /// Takes the next step of the end or the standstill. The main loop calls this after every event.
    pub(crate) fn advance(&mut self) {
        if self.end.is_some() {
            return self.advance_end();
        }
        let Some(standstill) = &self.standstill else { return };
        let began = standstill.began;
        if self.hardware.vcpus.iter().all(VcpuThread::has_left) {
            // Read as soon as the vCPUs have stopped: no time passes for the guest while the disks still drain.
            if self.state == RunState::Running && self.clock.is_none() {
                self.clock = self.read_clock();
            }
            if self.hardware.disks.iter().all(MachineDisk::is_paused) {
                return self.act_at_standstill();
            }
        }
        if began.elapsed() >= self.stop_timeout {
            self.give_up_standstill();
        }
    }

    /// The guest's clock now. `realtime` is set to the wall clock in nanoseconds, because KVM sets it only on some hosts.
    fn read_clock(&self) -> Option<kvm_clock_data> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let realtime = wall.as_nanos() as u64;
        self.hardware.vm.get_clock().ok().map(|clock| kvm_clock_data { realtime, ..clock })
    }

    /// Everything stands still: advances the tasks one after the other, and finishes the standstill when all are over.
    fn act_at_standstill(&mut self) {
        let next = |machine: &mut Self| machine.standstill.as_mut()?.tasks.pop_front();
        while let Some(mut task) = next(self) {
            let over = match task.advance(self) {
                Ok(over) => over,
                Err(error) => return self.end(Err(error)),
            };
            let Some(standstill) = &mut self.standstill else { return };
            if !over {
                return standstill.tasks.push_front(task);
            }
            standstill.done.push(task);
        }
        self.finish_standstill();
    }

    /// All tasks are over: stops the machine, or lets it go on.
    fn finish_standstill(&mut self) {
        let Some(standstill) = self.standstill.take() else { return };
        let was_running = self.state == RunState::Running;
        if let Some(state) = standstill.stop
            && was_running
        {
            self.state = state;
            self.emit(MachineEvent::Stop);
        }
        for mut task in standstill.done {
            if let Err(error) = task.finish(self) {
                self.end(Err(error));
                return self.emit(MachineEvent::Done(standstill.job, Err(Error::Ending)));
            }
        }
        if was_running && standstill.stop.is_none() {
            self.let_guest_run();
        }
        self.emit(MachineEvent::Done(standstill.job, Ok(())));
    }

    /// The deadline has passed: cancels the tasks, and lets the machine go on, or ends it if a task requires that.
    fn give_up_standstill(&mut self) {
        let Some(standstill) = self.standstill.take() else { return };
        let error = |machine: &Self| {
            machine.hung(standstill.began, MachineDisk::is_paused).unwrap_or(Error::Busy)
        };
        for mut task in standstill.tasks {
            let hung = error(self);
            if let Some(fatal) = task.deadline_passed(self, hung) {
                return self.end(Err(fatal));
            }
        }
        self.clock = None;
        let hung = error(self);
        if self.state == RunState::Running {
            self.let_guest_run();
        }
        self.emit(MachineEvent::Done(standstill.job, Err(hung)));
    }

    /// The error that names the disks that are not `done`, or a vCPU that has not left the guest. `None`: there are none.
    pub(super) fn hung(&self, began: Instant, done: fn(&MachineDisk) -> bool) -> Option<Error> {
        let Hardware { vcpus, disks, .. } = &self.hardware;
        let hung = disks.iter().filter(|disk| !done(disk));
        let names: Vec<_> = hung.map(|disk| disk.config.id.as_str()).collect();
        let after = began.elapsed();
        if !names.is_empty() {
            return Some(Error::DiskHung { disks: names.join(", "), after });
        }
        let stuck = vcpus.iter().find(|vcpu| !vcpu.has_left())?;
        Some(stuck.failed(VcpuError::Stuck(after)))
    }
}

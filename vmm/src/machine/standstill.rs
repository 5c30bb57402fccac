//! The one standstill of the machine: how it begins, what is done when everything stands still, and what happens at its deadline.
//!
//! `stop`, `reset`, `release_kernel_file` and a save (`save_task`) begin a standstill or join the one under way. Nothing here waits:
//! the main loop calls [`Machine::advance`] after every event.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;

use super::{DiskEnd, Hardware, Machine, MachineEvent, RunState, Standstill, is_paused};
use crate::background::Answer;
use crate::error::{Error, VcpuError};
use crate::memory;
use crate::vcpu::VcpuThread;

impl Machine {
    /// Stops the guest: no vCPU is in the guest then, no request is with the host, and the machine's state stands still, in
    /// memory and on the disks. Returns the number of the `Done` event to come, or `None` if the machine stands still already.
    pub(crate) fn stop(&mut self, state: RunState) -> Option<u64> {
        (self.state() == RunState::Running)
            .then(|| self.stand_still(|standstill| standstill.stop = Some(state)))
    }

    /// Starts the guest over, as the reset button does: devices, interrupt controllers and vCPUs as at power-on, RAM empty except
    /// for what the boot image puts there. A machine that was stopped stays stopped. Returns the number of the `Done` event.
    ///
    /// # Errors
    /// A file of the boot image was changed since it was loaded, and the machine goes on as it was; or the machine ends.
    pub(crate) fn reset(&mut self) -> Result<u64, Error> {
        if self.end.is_some() {
            return Err(Error::Stopping);
        }
        self.hardware.boot_image.as_ref().ok_or(Error::NoBootImage)?.check_unchanged()?;
        Ok(self.stand_still(|standstill| standstill.reset = true))
    }

    /// Lets another process write the kernel's file, after the guest was given copies of the pages that it shares with it.
    pub(crate) fn release_kernel_file(&mut self) {
        self.cancel_task(Error::Stopping);
        self.stand_still(|standstill| standstill.release_kernel_file = true);
    }

    /// Joins the standstill under way, or begins one: not during the end, which has a deadline of its own.
    pub(super) fn stand_still(&mut self, add: impl FnOnce(&mut Standstill)) -> u64 {
        if self.standstill.is_none() && self.end.is_none() {
            let (job, began) = (self.next_job(), self.begin_to_pause());
            self.standstill = Some(Standstill {
                job,
                began,
                stop: None,
                reset: false,
                release_kernel_file: false,
                look_for_halt: false,
                task: None,
                resetting: None,
            });
        }
        let Some(standstill) = &mut self.standstill else { return 0 };
        add(standstill);
        standstill.job
    }

    pub(super) fn begin_to_pause(&mut self) -> Instant {
        // Before the timer starts: when it expires, this long has passed.
        let began = Instant::now();
        self.start_deadline(self.stop_timeout);
        self.hardware.vcpus.iter().for_each(VcpuThread::pause);
        for disk in &mut self.hardware.disks {
            let (drain, main_loop) = (disk.handle.pause(), Arc::clone(&self.wake_main_loop));
            drain.on_done(move || main_loop.wake());
            disk.pausing = Some(drain);
        }
        began
    }

    /// Has the main loop call [`advance`](Self::advance) after `limit`, too.
    pub(super) fn start_deadline(&mut self, limit: Duration) {
        // A timer set to zero never expires.
        if let Err(error) = self.deadline.reset(limit.max(Duration::from_nanos(1)), None) {
            tracing::warn!(%error, "--stop-timeout cannot be kept: the timer cannot be set");
        }
    }

    /// Carries out what has become possible. To be called after every event of the main loop.
    pub(crate) fn advance(&mut self) {
        self.finish_resizes();
        if self.end.is_some() {
            return self.advance_end();
        }
        let Some(standstill) = &self.standstill else { return };
        let (began, resetting) = (standstill.began, standstill.resetting.as_ref());
        if let Some(answer) = resetting {
            if let Some(result) = answer.poll() {
                self.finish_standstill(result);
            }
            return;
        }
        if self.hardware.vcpus.iter().all(VcpuThread::has_left) {
            // Read when the guest stops, not when the last disk does: the guest's time stands still meanwhile.
            if self.state == RunState::Running && self.clock.is_none() {
                self.clock = self.read_clock();
            }
            if self.hardware.disks.iter().all(is_paused) {
                return self.act_at_standstill();
            }
        }
        if began.elapsed() >= self.stop_timeout {
            self.give_up_standstill();
        }
    }

    fn act_at_standstill(&mut self) {
        if let Some(mut task) = self.standstill.as_mut().and_then(|still| still.task.take())
            && !task.advance(self)
        {
            if let Some(standstill) = &mut self.standstill {
                standstill.task = Some(task);
            }
            return;
        }
        let Some(mut standstill) = self.standstill.take() else { return };
        if standstill.release_kernel_file
            && let Err(error) = self.copy_files()
        {
            return self.end(Err(error));
        }
        if standstill.look_for_halt {
            self.report_halt();
        }
        if standstill.reset {
            standstill.resetting = Some(self.reset_devices(standstill.began));
            self.standstill = Some(standstill);
        } else {
            self.standstill = Some(standstill);
            self.finish_standstill(Ok(()));
        }
    }

    /// Gives the guest copies of all pages of files, and lets those who want to write the files go on.
    fn copy_files(&mut self) -> Result<(), Error> {
        let Hardware { boot_image, memory, unmap_files, .. } = &mut self.hardware;
        unmap_files.take().map_or(Ok(()), |unmap| unmap(memory))?;
        boot_image.as_ref().map_or(Ok(()), |image| image.give_up_kernel_file(memory))
    }

    /// Begins to reset the devices. The machine's background thread waits for what their threads still have to do.
    fn reset_devices(&self, began: Instant) -> Answer {
        let deadline = began + self.stop_timeout;
        let unfinished: Vec<_> = self.hardware.buses.iter().flat_map(|bus| bus.reset()).collect();
        let wait = move || {
            let hung =
                unfinished.into_iter().filter_map(|reset| reset.wait_until(deadline)).count();
            if hung == 0 { Ok(()) } else { Err(Error::ResetHung) }
        };
        self.background.run(wait)
    }

    /// Everything stands still, and the devices are reset if that was asked for.
    fn finish_standstill(&mut self, reset: Result<(), Error>) {
        let Some(standstill) = self.standstill.take() else { return };
        let was_running = self.state == RunState::Running;
        if let Some(state) = standstill.stop
            && was_running
        {
            self.state = state;
            self.emit(MachineEvent::Stop);
        }
        if standstill.reset {
            if let Err(error) = reset.and_then(|()| self.restart()) {
                // A machine that failed at this cannot go on.
                self.end(Err(error));
                return self.emit(MachineEvent::Done(standstill.job, Err(Error::Stopping)));
            }
            self.emit(MachineEvent::Reset { by_guest: false });
        }
        if was_running && standstill.stop.is_none() {
            self.run();
        }
        self.emit(MachineEvent::Done(standstill.job, Ok(())));
    }

    /// The devices are reset, no vCPU runs and no disk uses guest memory: interrupt controllers, memory and vCPUs follow.
    fn restart(&mut self) -> Result<(), Error> {
        let Hardware { vcpus, memory, vm, irq_chips, boot_image, .. } = &self.hardware;
        irq_chips.write(vm)?;
        memory::clear(memory)?;
        let entry = boot_image.as_ref().ok_or(Error::NoBootImage)?.load(memory)?;
        for vcpu in vcpus {
            vcpu.with_paused(|vcpu| vcpu.reset(&entry))?;
        }
        self.clock = Some(kvm_clock_data::default());
        self.state = RunState::Prelaunch;
        self.halt_reported = false;
        Ok(())
    }

    fn give_up_standstill(&mut self) {
        let began = self.standstill.as_ref().map_or_else(Instant::now, |still| still.began);
        self.cancel_task(self.hung(began).unwrap_or(Error::Stopping));
        let Some(standstill) = self.standstill.take() else { return };
        let error = self.hung(began).unwrap_or(Error::Stopping);
        if standstill.release_kernel_file {
            // The kernel takes the lease away soon, and the guest's pages with it. What is written to them now is lost, and so is
            // the guest.
            let error = self.copy_files().err().unwrap_or(error);
            return self.end(Err(error));
        }
        self.clock = None;
        if self.state == RunState::Running {
            self.run();
        }
        self.emit(MachineEvent::Done(standstill.job, Err(error)));
    }

    /// The error that names what did not come to a standstill.
    pub(super) fn hung(&self, began: Instant) -> Option<Error> {
        let Hardware { vcpus, disks, .. } = &self.hardware;
        let devices: Vec<_> = match &self.end {
            None => disks.iter().filter(|disk| !is_paused(disk)).collect(),
            Some(end) => {
                let unfinished = |(_, end): &(_, &DiskEnd)| !matches!(end, DiskEnd::Done);
                disks.iter().zip(&end.disks).filter(unfinished).map(|(disk, _)| disk).collect()
            }
        };
        let after = began.elapsed();
        if !devices.is_empty() {
            let names: Vec<_> = devices.iter().map(|disk| disk.config.id.as_str()).collect();
            return Some(Error::DiskHung { disks: names.join(", "), after });
        }
        let stuck = vcpus.iter().find(|vcpu| !vcpu.has_left())?;
        Some(stuck.failed(VcpuError::Stuck(after)))
    }
}

//! What the machine does when a thread reports something: the guest powers off, resets the machine or panics, a vCPU or a worker cannot
//! go on, or a disk has an error.
//!
//! A capability: the builder makes a [`Reports`], gives the disks its sink, and adds it to the main loop as a source. A boot or a request
//! reports nothing. `--dump-on-panic` (`snapshot::panic_dump`) has a panic held, and ends the machine after the dump.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel, sync_channel};

use arch::layout;
use devices::block::{BlockEvent, EventSink, IoStatus};
use devices::legacy::GuestEvent;
use vm_memory::Bytes;

use super::{Hardware, Machine, MachineDisk, MachineEvent, Outcome, RunState};
use crate::GuestMemory;
use crate::error::{Error, VcpuError};
use crate::events::{CAPACITY, EventSender, VmEvent};
use crate::sources::{Poller, Source};

#[derive(Debug, thiserror::Error)]
#[error("disk {device}: {message}")]
struct WorkerFailed {
    device: String,
    message: String,
}

/// Where a processor starts after an INIT, and at power-on (Intel SDM 3A 10.1.4). A PC has its firmware there, which restarts the
/// machine. Here is no memory, and KVM reports an instruction that it cannot execute.
const FIRMWARE: u64 = 0xffff_fff0;

/// The source of the main loop that takes all reports.
pub(crate) struct Reports {
    main_loop: Arc<EventSender>,
    events: Receiver<VmEvent>,
    io_errors: Receiver<BlockEvent>,
    /// Unbounded, because a client waits for each event. There is at most one for each `block-set-write-threshold` command.
    thresholds: Receiver<BlockEvent>,
    /// A panic of the guest sends [`MachineEvent::PanicHeld`], and does not end the machine.
    hold_panic: bool,
    /// The guest has panicked, and the machine has not ended yet. What the guest does meanwhile is ignored.
    panicked: bool,
}

impl Reports {
    /// The source, and the sink for the events of all disks, which never blocks. An I/O error that finds its channel full is dropped: the
    /// status of its disk, which is read here, has it, too.
    pub(crate) fn new(
        main_loop: &Arc<EventSender>,
        events: Receiver<VmEvent>,
        hold_panic: bool,
    ) -> (Self, EventSink) {
        let (errors, io_errors) = sync_channel(CAPACITY);
        let (exceeded, thresholds) = channel();
        let woken = Arc::clone(main_loop);
        let sink = move |event| {
            match event {
                BlockEvent::WorkerFailed { device, message } => {
                    let failed = WorkerFailed { device, message };
                    woken.send(VmEvent::Failed(Error::Capability(failed.into())));
                }
                BlockEvent::IoError { .. } => drop(errors.try_send(event)),
                BlockEvent::WriteThreshold { .. } => drop(exceeded.send(event)),
            }
            woken.wake();
        };
        let (main_loop, panicked) = (Arc::clone(main_loop), false);
        let reports = Self { main_loop, events, io_errors, thresholds, hold_panic, panicked };
        (reports, Arc::new(sink))
    }

    fn act(&mut self, event: VmEvent, machine: &mut Machine) {
        let outcome = match event {
            VmEvent::Guest(GuestEvent::PowerOff) => Outcome::PowerOff,
            VmEvent::Guest(GuestEvent::Reset) => machine.outcome_of_reset(Outcome::Reset),
            VmEvent::TripleFault => machine.outcome_of_reset(Outcome::Panicked("triple fault")),
            VmEvent::Guest(GuestEvent::Panicked) => {
                Outcome::Panicked("it said so at the pvpanic port")
            }
            // The machine goes on: the crash kernel will power it off or reset it.
            VmEvent::Guest(GuestEvent::CrashLoaded) => {
                tracing::warn!("the guest panicked and boots its crash kernel");
                return machine.emit(MachineEvent::GuestCrashloaded);
            }
            VmEvent::Guest(GuestEvent::DebugExit(status)) => Outcome::DebugExit(status),
            VmEvent::Debug => {
                machine.stop(RunState::Debug);
                return;
            }
            VmEvent::Failed(Error::Vcpu {
                source: VcpuError::Emulation { rip: FIRMWARE }, ..
            }) => machine.outcome_of_reset(Outcome::Reset),
            VmEvent::Failed(error) => return machine.end(Err(error)),
        };
        match outcome {
            _ if self.panicked => {}
            Outcome::Panicked(how) if self.hold_panic => {
                self.panicked = true;
                machine.emit(MachineEvent::PanicHeld(how));
            }
            Outcome::Panicked(how) => machine.end_by_panic(how, false),
            outcome => {
                if outcome == Outcome::Reset && machine.end.is_none() {
                    machine.emit(MachineEvent::Reset { by_guest: true });
                }
                machine.end(Ok(outcome));
            }
        }
    }
}

impl Source for Reports {
    fn watch(&mut self, poller: &mut Poller<'_, '_>) -> event_manager::Result<()> {
        poller.add(self.main_loop.wake_fd.as_raw_fd(), 0)
    }

    fn process(&mut self, _: u8, _: &mut Poller<'_, '_>, machine: &mut Machine) {
        // Before the events are taken: one that is sent after this wakes the loop again.
        let _ = self.main_loop.wake_fd.read();
        self.main_loop.awake.store(false, Ordering::Release);
        // Before the events of disks: those that a resize has caused are then in one batch with its answer, and clients get them first.
        machine.finish_resizes();
        // A disk that fails again and again does not keep the main loop here.
        let io_errors = self.io_errors.try_iter().take(CAPACITY);
        machine.disk_events(io_errors.chain(self.thresholds.try_iter()));
        while let Ok(event) = self.events.try_recv() {
            self.act(event, machine);
        }
    }
}

impl Machine {
    /// Passes on the events of disks, and stops the machine if a disk's error policy says so. Events may have been dropped, so the
    /// disks' own status decides.
    fn disk_events(&mut self, events: impl Iterator<Item = BlockEvent>) {
        let Hardware { disks, .. } = &self.hardware;
        for MachineDisk { image, config, .. } in disks {
            let corrupted = |damage| MachineEvent::ImageCorrupted(config.id.clone(), damage);
            self.pending_events.extend(image.take_corruption().map(corrupted));
        }
        for mut event in events {
            if let BlockEvent::IoError { device, .. } | BlockEvent::WriteThreshold { device, .. } =
                &mut event
                && let Some(disk) = disks.iter().find(|disk| disk.handle.name() == device)
            {
                device.clone_from(&disk.config.id);
            }
            self.pending_events.push(MachineEvent::Disk(event));
        }
        let failed = |disk: &MachineDisk| disk.handle.io_status() != IoStatus::Ok;
        if self.standstill.is_none() && disks.iter().any(failed) {
            self.stop(RunState::IoError);
        }
    }

    /// The outcome of a reset or a triple fault: a panic or a reboot, as the warm-reset flag says. `unexpected`: the guest's kernel had
    /// not begun to restart. (With `reboot=t` Linux restarts by a triple fault.)
    fn outcome_of_reset(&self, unexpected: Outcome) -> Outcome {
        match warm_reset_flag(&self.hardware.memory) {
            WarmReset::AfterPanic => Outcome::Panicked("it reset itself after a kernel panic"),
            WarmReset::NotBegun => unexpected,
            WarmReset::Reboot => Outcome::Reset,
        }
    }

    /// Ends the machine after a panic of its guest. `is_dumped`: the machine has stopped for a dump.
    pub(crate) fn end_by_panic(&mut self, how: &'static str, is_dumped: bool) {
        if self.end.is_none() {
            self.warn_of_missing_drivers();
            self.emit(MachineEvent::GuestPanicked);
            // As in QEMU. For the dump, the event was sent when the machine stopped.
            if !is_dumped {
                self.emit(MachineEvent::Stop);
            }
        }
        self.end(Ok(Outcome::Panicked(how)));
    }

    /// The usual reason for a panic at boot: the kernel has no driver for its root file system's disk.
    fn warn_of_missing_drivers(&self) {
        let disks = self.hardware.disks.iter().filter(|disk| !disk.handle.has_driver());
        let names: Vec<_> = disks.map(|disk| disk.handle.name()).collect();
        if !names.is_empty() {
            tracing::warn!(
                "no driver in the guest has started {}: the kernel needs virtio_mmio and virtio_blk built in, or an \
                 initrd that loads them",
                names.join(", ")
            );
        }
    }
}

/// What the warm-reset flag says about a guest that has reset the machine or triple faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WarmReset {
    /// Its kernel had not begun to restart.
    NotBegun,
    Reboot,
    AfterPanic,
}

/// Reads the warm-reset flag, which Linux writes just before it resets the machine by any method: `arch::cmdline` explains its
/// values. A guest that is not Linux leaves it alone.
fn warm_reset_flag(memory: &GuestMemory) -> WarmReset {
    match memory.read_obj(layout::WARM_RESET_FLAG) {
        Ok(layout::WARM_RESET_MAGIC) => WarmReset::AfterPanic,
        Ok(layout::WARM_RESET_UNTOUCHED) | Err(_) => WarmReset::NotBegun,
        Ok(_) => WarmReset::Reboot,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_warm_reset_flag_tells_a_panic_from_a_restart() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        for (flag, expected) in [
            (layout::WARM_RESET_UNTOUCHED, WarmReset::NotBegun),
            (0, WarmReset::Reboot),
            (0x1234, WarmReset::AfterPanic),
        ] {
            memory.write_obj(flag, layout::WARM_RESET_FLAG).unwrap();
            assert_eq!(warm_reset_flag(&memory), expected);
        }
    }
}

//! The machine: its vCPUs, disks and clock, and its [`RunState`].
//!
//! The main thread owns it. `builder` makes it paused. Sources of the main loop (signals, the console, the control socket) call its
//! methods, and get [`MachineEvent`]s from it. It knows neither JSON nor sockets.
//!
//! Nothing here waits for a vCPU or for the host's disk. A stop, a reset, a save, and the release of mapped files need the machine to
//! stand still. The first of them begins a [`Standstill`], and the others join it. The main loop calls [`Machine::advance`] after every
//! event. When every vCPU has left the guest and no disk has a request with the host, `advance` carries out what they asked for. If that has
//! not happened by the deadline (`--stop-timeout`), the standstill is given up, and the machine goes on, or ends if a task requires it
//! (`kernel_file`).
//!
//! The end of the machine (`end`) cancels a standstill. At its own deadline it leaves out the disks that hang.

mod end;
mod halt_report;
mod hurry;
mod kernel_file;
mod reports;
mod reset;
mod resize;
pub(crate) mod save_task;
mod standstill;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arch::layout::MmioDevice;
use arch::machine_layout::MachineLayout;
use devices::block::{BlockEvent, BlockHandle};
use devices::bus::Bus;
use devices::disk::{Corruption, Disk};
use devices::legacy::SerialDevice;
use devices::virtio::drain::Drain;
use devices::virtio::mmio::MmioTransport;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

pub(crate) use self::reports::Reports;
pub(crate) use self::reset::PowerOn;
use crate::GuestMemory;
use crate::boot_image::BootImage;
use crate::config::DiskConfig;
use crate::error::Error;
use crate::events::EventSender;
use crate::job_thread::{JobThread, PendingResult};
use crate::vcpu::VcpuThread;

/// Whether the machine runs, and if not, why: the `status` in QMP's `query-status`.
///
/// `Prelaunch` follows building, and the reset of a stopped machine. `Paused` follows a client's `stop`, `Debug` a debugger's, and
/// `IoError` a disk's error policy. In `FinishMigrate` a save is under way, and `PostMigrate` follows it. `Shutdown` is never stored:
/// [`Machine::state`] computes it during the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RunState {
    Prelaunch,
    Running,
    Paused,
    Debug,
    IoError,
    FinishMigrate,
    PostMigrate,
    Shutdown,
}

/// Why the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest panicked; the text names the evidence.
    Panicked(&'static str),
    /// The guest wrote this byte to the debug-exit port.
    DebugExit(u8),
    /// The user typed `Ctrl-A x`.
    Quit,
    /// This signal came.
    Signal(i32),
    /// `--timeout` passed.
    Timeout,
    /// A control client ended the VM.
    ControlQuit,
}

/// Something that happened to the machine, for the sources of the main loop. The control socket turns most into QMP events, and
/// [`MachineEvent::Done`] completes a command.
#[derive(Debug)]
pub(crate) enum MachineEvent {
    Stop,
    Resume,
    Powerdown,
    /// The machine ends. `None`: the host failed.
    Shutdown(Option<Outcome>),
    /// The machine was reset. `by_guest`: the guest asked for a reset, which ends the machine.
    Reset {
        by_guest: bool,
    },
    GuestPanicked,
    /// The guest panicked. The text is that of [`Outcome::Panicked`]. The receiver ends the machine.
    PanicHeld(&'static str),
    /// The guest's kernel panicked, and its crash kernel takes over.
    GuestCrashloaded,
    /// A disk reports something. Its device name is the disk's `id=` here.
    Disk(BlockEvent),
    /// The image of the disk with this `id=` was found to be damaged.
    ImageCorrupted(String, Corruption),
    /// The job with this number, which a method of [`Machine`] returned, is done.
    Done(u64, Result<(), Error>),
}

/// A disk of the machine. `handle` controls the block device (pause, limits, statistics). `transport` has the registers of the same
/// device. `image` is the disk on the host, which the end of the machine flushes.
pub(crate) struct MachineDisk {
    pub config: DiskConfig,
    pub handle: BlockHandle,
    pub image: Arc<dyn Disk>,
    /// The address of its registers, and its interrupt line.
    pub window: MmioDevice,
    pub transport: Arc<Mutex<MmioTransport>>,
    pub state: DiskState,
    /// The thread `disk-NAME-job`, which flushes and resizes the image.
    pub job_thread: JobThread,
    /// The resizes under way, each with the number of its `Done` event.
    pub resizes: Vec<(u64, PendingResult)>,
}

/// How far a disk is on the way to a standstill or to the end of the machine.
pub(crate) enum DiskState {
    Running,
    /// The drain ends when nothing of the disk is with the host. It takes no more requests, until the machine runs again.
    Pausing(Drain),
    /// At the end of the machine, when the disk has paused.
    Flushing(PendingResult),
    Flushed,
}

impl MachineDisk {
    fn is_paused(&self) -> bool {
        matches!(&self.state, DiskState::Pausing(drain) if drain.is_done())
    }

    fn is_flushed(&self) -> bool {
        matches!(self.state, DiskState::Flushed)
    }
}

/// Everything that the builder has created for the guest. [`Machine`] adds what changes while the VM runs: its state,
/// its clock, and the jobs under way.
pub(crate) struct Hardware {
    /// The address of everything, computed once by the builder.
    pub layout: MachineLayout,
    pub vcpus: Vec<VcpuThread>,
    /// In order: `/dev/vda` first.
    pub disks: Vec<MachineDisk>,
    /// Port I/O and MMIO, with all devices, disks included.
    pub buses: [Arc<Bus>; 2],
    pub memory: GuestMemory,
    pub vm: Arc<VmFd>,
    /// Puts KVM's devices and vCPUs back to their state at power-on.
    pub power_on: PowerOnState,
    /// What a reset boots. `None`: the machine was restored, and its kernel was not given or cannot be opened.
    pub boot_image: Option<BootImage>,
    /// Replaces pages of a saved machine's file that are mapped into guest memory by copies.
    pub unmap_files: Option<UnmapFiles>,
    pub serial: Vec<Arc<Mutex<SerialDevice>>>,
}

pub(crate) type PowerOnState = Box<dyn Fn(&Hardware) -> Result<(), Error>>;
pub(crate) type UnmapFiles = Box<dyn FnOnce(&GuestMemory) -> Result<(), Error>>;

/// A standstill under way: what is to be done when the machine stands still.
///
/// At most one exists. A request that comes meanwhile joins it: a stop sets `stop`, any other adds a task. The caller gets the number of
/// the standstill's job. So a client's `stop` during a reset is answered when both are done. Only a save has a job number of its own.
struct Standstill {
    /// The number of its `Done` event.
    job: u64,
    /// When the first request came. Requests that join do not move the deadline.
    began: Instant,
    /// The state in which the machine stays stopped afterwards. `None`: it goes on.
    stop: Option<RunState>,
    /// What is to be done, in this order.
    tasks: VecDeque<Box<dyn Task>>,
    /// The tasks that are over.
    done: Vec<Box<dyn Task>>,
}

/// What a capability does while the machine stands still, such as a save or a reset.
pub(crate) trait Task: Any {
    /// Called when everything stands still, and again after every event until the task is over. Returns whether it is over.
    ///
    /// # Errors
    /// The machine cannot go on.
    fn advance(&mut self, machine: &mut Machine) -> Result<bool, Error>;

    /// Called when all tasks are over, just before the machine goes on.
    ///
    /// # Errors
    /// The machine cannot go on.
    fn finish(&mut self, _machine: &mut Machine) -> Result<(), Error> {
        Ok(())
    }

    /// Whether the task may be canceled for something more urgent.
    fn is_cancelable(&self) -> bool {
        false
    }

    /// Whether the task has begun to change the machine, so that a save would not find the state from before.
    fn is_irrevocable(&self) -> bool {
        false
    }

    /// The task will not be carried out or completed, because of `error`. Must not block.
    fn cancel(&mut self, _machine: &mut Machine, _error: Error) {}

    /// The machine did not stand still by the deadline, as `error` says. Returns an error if the machine cannot go on and must end.
    fn deadline_passed(&mut self, machine: &mut Machine, error: Error) -> Option<Error> {
        self.cancel(machine, error);
        None
    }
}

/// The end of the machine while it is under way.
struct End {
    outcome: Result<Outcome, Error>,
    began: Instant,
    /// How long it may take, from `began`.
    limit: Duration,
    over: bool,
}

/// Owns every thread and resource of the VM, except for those of the main loop's sources.
///
/// Only the main thread uses it, so it needs no lock. A method that begins long work returns the number of a job at once.
/// [`MachineEvent::Done`] with that number follows when the work is done.
pub(crate) struct Machine {
    pub hardware: Hardware,
    state: RunState,
    /// The guest's clock while the machine is stopped.
    clock: Option<kvm_clock_data>,
    standstill: Option<Standstill>,
    end: Option<End>,
    wake_main_loop: Arc<EventSender>,
    /// The thread `machine-job`, which writes saves.
    job_thread: JobThread,
    last_job: u64,
    /// What has happened since the main loop last called its sources, oldest first.
    pub pending_events: Vec<MachineEvent>,
    stop_timeout: Duration,
    halt_reported: bool,
    /// Cancels the background save that may be under way (`snapshot::background_save`).
    pub background_save: Option<Arc<AtomicBool>>,
    /// Wakes the main loop at the deadline of the standstill or of the end.
    pub deadline: TimerFd,
}

impl Machine {
    /// A machine that has not run yet.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub(crate) fn new(
        hardware: Hardware,
        wake_main_loop: Arc<EventSender>,
        job_thread: JobThread,
        stop_timeout: Duration,
    ) -> Result<Self, Error> {
        Ok(Self {
            hardware,
            state: RunState::Prelaunch,
            clock: None,
            standstill: None,
            end: None,
            wake_main_loop,
            job_thread,
            last_job: 0,
            pending_events: Vec::new(),
            stop_timeout,
            halt_reported: false,
            background_save: None,
            deadline: TimerFd::new().map_err(|error| Error::host("make a timer")(error.into()))?,
        })
    }

    pub(crate) fn state(&self) -> RunState {
        if self.end.is_some() { RunState::Shutdown } else { self.state }
    }

    pub(crate) fn emit(&mut self, event: MachineEvent) {
        self.pending_events.push(event);
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// A standstill is under way, whose outcome is not known yet.
    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        if self.standstill.is_some() || self.end.is_some() {
            return Err(if self.end.is_some() { Error::Ending } else { Error::Busy });
        }
        if self.state != RunState::Running {
            self.let_guest_run();
            self.emit(MachineEvent::Resume);
        }
        Ok(())
    }

    /// Lets clock, disks and vCPUs go on. The clock comes first, because no vCPU may read it before. The disks come before the vCPUs, so
    /// that each worker begins its stopped requests before new ones. Nothing here waits for a worker.
    fn let_guest_run(&mut self) {
        if let Some(clock) = self.clock.take() {
            // The flags of KVM_GET_CLOCK are not accepted back (`api.rst` 4.30 KVM_SET_CLOCK).
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            if let Err(error) = self.hardware.vm.set_clock(&clock) {
                tracing::warn!("the guest's clock could not be set back: {error}");
            }
        }
        for disk in &mut self.hardware.disks {
            disk.state = DiskState::Running;
            disk.handle.resume();
        }
        self.hardware.vcpus.iter().for_each(VcpuThread::resume);
        self.state = RunState::Running;
    }

    fn next_job(&mut self) -> u64 {
        self.last_job += 1;
        self.last_job
    }
}

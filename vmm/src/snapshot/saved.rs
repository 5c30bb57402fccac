//! The state of a machine as a value, except for its RAM.
//!
//! [`SavedMachine::read`] reads it from a machine, and [`SavedMachine::write`] writes it into a new machine of the same configuration.
//! Both run on the main thread, while the machine stands still.
//!
//! The parts are read in this order, so that each interrupt is in the state of the part that has it:
//!
//! 1. transports and queues of the disks;
//! 2. the vCPUs;
//! 3. the interrupt controllers.
//!
//! They are written in this order:
//!
//! 1. KVM's clock, because MSRs of the vCPUs refer to it;
//! 2. the vCPUs with their local APICs;
//! 3. the interrupt controllers, which deliver pending interrupts at once;
//! 4. the devices, which may interrupt.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use arch::layout::PAGE_SIZE;
use devices::block::QueueSnapshot;
use devices::legacy::SerialState;
use devices::virtio::mmio::TransportState;
use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::vcpu::{SavedVcpu, TscShift};
use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;
use crate::irq_chips::IrqChips;
use crate::lock;
use crate::machine::{Machine, MachineDisk, RunState};

/// The major version of the format. Files with another one cannot be read.
pub(super) const MAJOR: u32 = 1;
const MINOR: u32 = 0;

/// The word in `needs` of an increment.
pub(super) const NEEDS_BASE: &str = "base";

/// The version of a file's description. It can be read alone, so that the error for a file of a later minivmm names its version.
#[derive(Serialize, Deserialize)]
pub(super) struct Format {
    pub(super) major: u32,
    pub(super) minor: u32,
    /// Names of features that a reader has to know, in addition to the major version.
    pub(super) needs: Vec<String>,
}

/// Why a machine is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be restored. The machine stays stopped.
    Save,
    /// As `Save`, but the file has only the pages that changed since the machine was restored from another file.
    Increment,
    /// For debuggers. The machine goes on as before.
    Dump,
    /// For debuggers, because the guest has panicked. The machine stays stopped.
    LastDump,
}

impl Purpose {
    /// Whether a machine is to go on from the file.
    pub(super) fn is_save(self) -> bool {
        matches!(self, Self::Save | Self::Increment)
    }
}

/// The most requests of one queue: the limit of `queue-size=`.
const MAX_STOPPED: usize = 1024;

#[derive(Deserialize)]
pub(super) struct Versioned {
    pub(super) format: Format,
}

/// The part of the configuration that the guest can see or a reset needs.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct SavedConfig {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    pub(super) cmdline: String,
    pub(super) memory: u64,
    pub(super) hugepages: bool,
    pub(super) cpus: u32,
    pub(crate) acpi: bool,
    pub(super) nested: bool,
    pub(super) serial: [bool; 2],
    pub(super) debug_exit: bool,
    /// `--exec` was given: this process prints the command's output and status, so another process cannot take over.
    #[serde(skip)]
    pub(crate) runs_command: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedDisk {
    pub(super) config: DiskConfig,
    pub(super) image: ImageVersion,
    /// Only in a dump: why no machine can be restored with this disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost: Option<String>,
    transport: TransportState,
    queues: Vec<QueueSnapshot>,
}

/// The file that an increment is based on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedBase {
    pub(super) path: PathBuf,
    /// As [`CoreFile::identity`](super::core_file::CoreFile).
    pub(super) identity: (u64, u64),
}

/// Shows whether an image was changed after the save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageVersion {
    capacity: u64,
    /// Size in bytes, and time of modification in seconds and nanoseconds. `None`: a block device.
    file: Option<(u64, i64, i64)>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SavedMachine {
    pub(super) format: Format,
    /// The version of minivmm that saved it, for people.
    pub(super) minivmm: String,
    /// Only of an increment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base: Option<SavedBase>,
    pub(super) config: SavedConfig,
    pub(super) state: RunState,
    /// The guest's clock. `realtime` is the wall clock at the stop, in nanoseconds.
    pub(super) clock: kvm_clock_data,
    pub(super) vcpus: Vec<SavedVcpu>,
    pub(super) irq_chips: IrqChips,
    pub(super) disks: Vec<SavedDisk>,
    pub(super) serial: Vec<SerialState>,
}

impl SavedConfig {
    pub(crate) fn of(config: &VmConfig) -> Self {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            kernel: absolute(&config.kernel),
            initrd: config.initrd.as_ref().map(absolute),
            cmdline: config.cmdline.clone(),
            memory: config.memory,
            hugepages: config.hugepages,
            cpus: config.cpus,
            acpi: config.acpi,
            nested: config.nested,
            serial: config.serial,
            debug_exit: config.debug_exit,
            runs_command: config.exec.is_some(),
        }
    }

    /// Puts the saved configuration into `config`. The kernel of `config` stays. If there is none, `trust_paths` allows that of the file.
    pub(super) fn apply(&self, config: &mut VmConfig, trust_paths: bool) {
        if config.kernel.as_os_str().is_empty() && trust_paths {
            config.kernel.clone_from(&self.kernel);
            config.initrd.clone_from(&self.initrd);
        }
        config.cmdline.clone_from(&self.cmdline);
        config.memory = self.memory;
        config.hugepages = self.hugepages;
        config.cpus = self.cpus;
        config.acpi = self.acpi;
        config.nested = self.nested;
        config.serial = self.serial;
        config.debug_exit = self.debug_exit;
    }
}

impl ImageVersion {
    fn of(path: &Path, capacity: u64) -> std::io::Result<Self> {
        let regular = |file: &Metadata| !file.file_type().is_block_device();
        let metadata = path.metadata()?;
        let file =
            regular(&metadata).then(|| (metadata.len(), metadata.mtime(), metadata.mtime_nsec()));
        Ok(Self { capacity, file })
    }

    /// How the image differs from its version at the save. `None`: it does not.
    fn difference(&self, now: &Self) -> Option<String> {
        if self.capacity != now.capacity {
            return Some(format!("it has {} bytes and had {}", now.capacity, self.capacity));
        }
        (self.file.is_some() && self.file != now.file)
            .then(|| "its size or time of modification is another".to_owned())
    }
}

impl SavedMachine {
    /// Reads a machine that stands still.
    pub(super) fn read(
        machine: &Machine,
        config: SavedConfig,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let hardware = &machine.hardware;
        let (state, clock) = machine.state_and_clock();
        let clock = match clock {
            Some(clock) => clock,
            None => hardware.vm.get_clock().map_err(Error::kvm("read the guest's clock"))?,
        };
        let failed = |disk: &MachineDisk| disk.handle.io_status() != Default::default();
        let state = if hardware.disks.iter().any(failed) { RunState::IoError } else { state };
        let disks = hardware.disks.iter().map(|disk| SavedDisk::read(disk, purpose));
        let disks = disks.collect::<Result<_, _>>()?;
        let serial = hardware.serial.iter().map(|serial| lock(serial).save()).collect();
        let vcpus = hardware
            .vcpus
            .iter()
            .map(|vcpu| vcpu.with_paused(SavedVcpu::read))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            format: Format { major: MAJOR, minor: MINOR, needs: Vec::new() },
            minivmm: env!("CARGO_PKG_VERSION").to_owned(),
            base: None,
            config,
            state,
            clock,
            vcpus,
            irq_chips: IrqChips::read(&hardware.vm)?,
            disks,
            serial,
        })
    }

    /// Makes this machine an increment on `base`.
    pub(super) fn set_base(&mut self, base: SavedBase) {
        self.format.needs.push(NEEDS_BASE.to_owned());
        self.base = Some(base);
    }

    /// The text that `minivmm show` prints. `pages`: how many pages an increment has.
    pub(super) fn describe(&self, pages: u64) -> String {
        let Self { minivmm, format, config, clock, .. } = self;
        let state = if self.state == RunState::Running { "running" } else { "stopped" };
        let when = UNIX_EPOCH + Duration::from_nanos(clock.realtime);
        let when = humantime::format_rfc3339_seconds(when);
        let mut text = format!(
            "saved by minivmm {minivmm} in format {}.{} at {when}, while {state}\n\
             {} vCPUs, {} MiB of memory, kernel {}\n",
            format.major,
            format.minor,
            config.cpus,
            config.memory >> 20,
            printable(config.kernel.display()),
        );
        if let Some(base) = &self.base {
            let (path, bytes) = (printable(base.path.display()), pages * PAGE_SIZE);
            text += &format!("increment of {bytes} bytes of memory on {path}\n");
        }
        for SavedDisk { config, image, queues, .. } in &self.disks {
            let stopped: usize = queues.iter().map(|queue| queue.stopped.len()).sum();
            let path = printable(config.image.path.display());
            let (id, bytes) = (&config.id, image.capacity);
            text += &format!("disk {id}: {path}, {bytes} bytes, {stopped} stopped requests\n");
        }
        text
    }

    /// Writes the state into a new machine, whose RAM is filled already. For the guest, `passed` nanoseconds have passed since the save.
    /// Returns whether the guest was stopped at the save, and so must stay stopped.
    pub(super) fn write(&self, machine: &mut Machine, passed: u64) -> Result<bool, Error> {
        let clock = kvm_clock_data {
            clock: self.clock.clock.wrapping_add(passed),
            realtime: self.clock.realtime.wrapping_add(passed),
            ..Default::default()
        };
        let hardware = &machine.hardware;
        let set = kvm_clock_data { clock: clock.clock, ..Default::default() };
        hardware.vm.set_clock(&set).map_err(Error::kvm("set the guest's clock"))?;
        let mut shift = TscShift::default();
        for (index, (vcpu, saved)) in hardware.vcpus.iter().zip(&self.vcpus).enumerate() {
            vcpu.with_paused(|vcpu| {
                if index == 0 {
                    let khz = vcpu.fd.get_tsc_khz().unwrap_or(0);
                    super::fit::check_tsc(saved.tsc_khz, khz).map_err(Error::incoming)?;
                    shift = saved.shift(vcpu, passed)?;
                }
                saved.write(vcpu, shift)
            })?;
        }
        self.irq_chips.write(&hardware.vm)?;
        for (disk, saved) in hardware.disks.iter().zip(&self.disks) {
            saved.write(disk).map_err(Error::incoming)?;
        }
        for (serial, saved) in hardware.serial.iter().zip(&self.serial) {
            lock(serial).restore(saved).map_err(Error::host("restore a serial port"))?;
        }
        let (state, stays) = match self.state {
            stopped @ (RunState::Paused | RunState::IoError | RunState::Prelaunch) => {
                (stopped, true)
            }
            _ => (RunState::Paused, false),
        };
        machine.restore(state, clock);
        Ok(stays)
    }
}

impl SavedDisk {
    fn read(disk: &MachineDisk, purpose: Purpose) -> Result<Self, Error> {
        let mut config = disk.config.clone();
        config.device.throttling = disk.handle.throttling();
        let path = &config.image.path;
        let lost = match () {
            () if config.image.snapshot => {
                Some("snapshot=on writes to a file that ends with the machine")
            }
            // An image that minivmm made from a directory, or a descriptor that the parent process opened.
            () if path.starts_with("/proc/self/fd") => Some(
                "its image (a directory, or an inherited descriptor) has no path that another process finds",
            ),
            () => None,
        };
        if let Some(why) = lost.filter(|_| purpose.is_save()) {
            return Err(unsaveable(&config.id, why));
        }
        let image = ImageVersion::of(path, disk.image.capacity()).map_err(|source| {
            let (disk, path) = (config.id.clone(), path.clone());
            Error::save(SnapshotError::Image { disk, path, source })
        })?;
        if let Ok(path) = std::path::absolute(path) {
            config.image.path = path;
        }
        let transport = lock(&disk.transport)
            .save()
            .ok_or_else(|| unsaveable(&config.id, "its driver is resetting it; try again"))?;
        let lost = lost.map(str::to_owned);
        Ok(Self { config, image, lost, transport, queues: disk.handle.queues() })
    }

    /// Checks that a machine can be restored with this disk.
    ///
    /// # Errors
    /// The file is a dump, and does not have what this disk needs.
    pub(super) fn check_kept(&self) -> Result<(), SnapshotError> {
        let refused = |why: &String| SnapshotError::Dump {
            disk: self.config.id.clone(),
            why: printable(why),
        };
        self.lost.as_ref().map_or(Ok(()), |why| Err(refused(why)))
    }

    /// The `--disk` option for the image as it was saved.
    pub(super) fn option(&self) -> String {
        let DiskConfig { id, image, .. } = &self.config;
        let path = printable(image.path.display()).replace(',', ",,");
        let format = image.format.map_or_else(String::new, |format| format!(",format={format}"));
        format!("--disk {path}{format},id={id}")
    }

    /// Reads the image's version again after a flush, which may have written metadata.
    pub(super) fn look_again(&mut self) {
        if let Ok(version) = ImageVersion::of(&self.config.image.path, self.image.capacity) {
            self.image = version;
        }
    }

    /// Checks that the image was not changed since the save.
    pub(super) fn check_image(&self, disk: &MachineDisk) -> Result<(), SnapshotError> {
        let path = &disk.config.image.path;
        let now = ImageVersion::of(path, disk.image.capacity())?;
        match self.image.difference(&now) {
            None => Ok(()),
            Some(what) => {
                let (id, path) = (disk.config.id.clone(), path.clone());
                Err(SnapshotError::DiskChanged { id, path, what })
            }
        }
    }

    /// Restores the registers and queues of a new device, which stays paused: its queues wait for `resume`.
    fn write(&self, disk: &MachineDisk) -> Result<(), SnapshotError> {
        let id = || disk.config.id.clone();
        disk.handle.pause();
        let restored = lock(&disk.transport).restore(&self.transport);
        restored.map_err(|error| SnapshotError::Transport(id(), error))?;
        for queue in &self.queues {
            let twice = |at: usize| queue.stopped[..at].contains(&queue.stopped[at]);
            let sound = queue.stopped.len() <= MAX_STOPPED && !(0..queue.stopped.len()).any(twice);
            if !sound || !disk.handle.restore_queue(queue.clone()) {
                return Err(SnapshotError::Queue(id()));
            }
        }
        Ok(())
    }
}

/// A text of the file without characters that a terminal acts on.
pub(super) fn printable(text: impl std::fmt::Display) -> String {
    text.to_string().replace(char::is_control, "\u{fffd}")
}

pub(super) fn unsaveable(disk: &str, why: &'static str) -> Error {
    Error::save(SnapshotError::Unsaveable { disk: disk.to_owned(), why })
}

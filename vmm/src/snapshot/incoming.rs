//! A restore, step by step: the builder's second way to start.
//!
//! 1. [`Incoming::open`] checks all of the file except RAM, before anything is made, and completes the configuration from it.
//! 2. The builder builds the machine as always. In place of loading a kernel it calls [`Incoming::load`], which fills RAM.
//! 3. The vCPUs get their saved CPUID leaves: KVM accepts no others when a vCPU has run.
//! 4. [`Incoming::restore`] writes the rest of the state, when all parts of the machine exist.
//!
//! If the host gives a lease on the file, RAM is *mapped* from it: the host reads a page when the guest touches it, and all machines from
//! the same file share pages. A program that opens the file for writing waits until each machine has copied its pages. RAM is *copied*,
//! and compared with its checksums, in these cases:
//!
//! - there is no lease, or the host would take it away before `--stop-timeout`;
//! - a chain of files has too many parts to map;
//! - guest memory is huge pages;
//! - the host is a guest itself, and its CPU has hardware virtualization: then each page costs an exit through two hypervisors.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use arch::Structure;

use super::SnapshotError;
use super::core_file::CoreFile;
use super::description::{check, parse};
use super::early_parts::EarlyParts;
use super::increments::Chain;
use super::page_set::PageSet;
use super::save::RESTORED_FROM;
use super::saved::{SavedDisk, SavedMachine};
use super::{fit, generation_id};
use crate::GuestMemory;
use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;
use crate::host_cpu;
use crate::kernel_pages;
use crate::kvm::EmptyVm;
use crate::machine::{Machine, UnmapFiles};
use crate::vcpu::VcpuStart;

/// Whether RAM is mapped from the file or copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapMode {
    /// It is mapped if that is safe and fast, and otherwise copied.
    #[default]
    Auto,
    /// It is mapped. If that is not possible, the start fails.
    On,
    /// It is copied.
    Off,
}

/// The guest's time when it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockMode {
    /// The time of the save: for the guest no time has passed, as in QEMU.
    #[default]
    Stopped,
    /// The time of the save, and the time that has passed on the host since.
    Host,
}

/// `--incoming`: a file to start from, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingConfig {
    /// The file.
    pub path: PathBuf,
    /// `map=`.
    pub map: MapMode,
    /// `clock=`.
    pub clock: ClockMode,
    /// `disks=checked`: refuse an image that was changed after the save.
    pub check_disks: bool,
    /// `paths=saved`: open the images, the kernel and the initrd that the file names, if the user names none. Also look for an increment's
    /// base at its old path.
    pub trust_paths: bool,
}

impl IncomingConfig {
    /// The file at `path`, with the defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let (map, clock) = (MapMode::default(), ClockMode::default());
        Self { path: path.into(), map, clock, check_disks: true, trust_paths: false }
    }
}

/// A saved machine that the builder restores.
pub struct Incoming {
    /// Made while the process waited for the file.
    pub(crate) early: EarlyParts,
    options: IncomingConfig,
    chain: Chain,
    saved: SavedMachine,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Opens and checks the file. Puts the saved parts of the configuration that the guest can see into `config`. A disk of `config`
    /// replaces the saved disk of the same name.
    ///
    /// Anyone may have written the file, and a process that is not confined yet opens files with all the user's rights. So paths come
    /// from the user: without `trust_paths` every disk has to be in `config`, and a reset uses the kernel of `config` or is refused. The
    /// user also decides about nested virtualization.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or does not fit `config`.
    pub fn open(mut options: IncomingConfig, config: &mut VmConfig) -> Result<Self, Error> {
        if options.map == MapMode::Auto && !kernel_pages::lease_outlasts(config.stop_timeout) {
            options.map = MapMode::Off;
        }
        let failed = |error: SnapshotError| Error::incoming(error).of_file(&options.path);
        let (core, saved) = Self::read(&options.path).map_err(failed)?;
        let chain =
            Chain::open(&options.path, core, &saved, options.trust_paths).map_err(failed)?;
        saved.disks.iter().try_for_each(SavedDisk::check_kept).map_err(failed)?;
        if saved.config.nested && !config.nested {
            return Err(failed(SnapshotError::Nested));
        }
        saved.config.apply(config, options.trust_paths);
        let given = std::mem::take(&mut config.disks);
        let disks = merge_disks(&saved, given, options.trust_paths, config.qmp.is_some());
        config.disks = disks.map_err(failed)?;
        Ok(Self { early: EarlyParts::default(), options, chain, saved })
    }

    pub(crate) fn take_early_parts(&mut self) -> EarlyParts {
        std::mem::take(&mut self.early)
    }

    /// Describes the file at `path` in lines of text. With `compare_memory`, all of RAM is compared with its checksums, also that of the files
    /// that it is based on.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn describe(path: &Path, compare_memory: bool) -> Result<String, Error> {
        let failed = |error: SnapshotError| Error::incoming(error).of_file(path);
        let (core, saved) = Self::read(path).map_err(failed)?;
        let text = saved.describe(core.pages.as_ref().map_or(0, PageSet::count));
        if compare_memory {
            let chain = Chain::open(path, core, &saved, true);
            chain.and_then(|chain| chain.copy(None)).map_err(failed)?;
        }
        Ok(text)
    }

    fn read(path: &Path) -> Result<(CoreFile, SavedMachine), SnapshotError> {
        // O_NONBLOCK, so that a fifo is refused and open(2) does not wait for its other end.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let core = CoreFile::read(file)?;
        let saved = parse(&core.machine)?;
        check(&saved, &core)?;
        Ok((core, saved))
    }

    /// Fills RAM, all of which is zero, from the file, and writes `generation_id`. Returns how the vCPUs begin and, if RAM was mapped,
    /// what replaces the mapped pages by copies.
    ///
    /// # Errors
    /// The CPU does not suit this host, or the file cannot be read.
    pub(crate) fn load(
        &self,
        empty_vm: &EmptyVm,
        memory: &GuestMemory,
        generation_id: Option<&Structure>,
    ) -> Result<(VcpuStart, Option<UnmapFiles>), Error> {
        fit::check(empty_vm, &self.saved.vcpus, self.saved.config.nested)
            .map_err(|error| self.named(error))?;
        let mapped = self.map(memory).map_err(|error| self.named(error))?;
        if mapped.is_none() {
            let copied = self.chain.copy(Some(memory));
            copied.map_err(|error| self.named(Error::incoming(error)))?;
        }
        generation_id::replace(memory, generation_id)?;
        let cpuid = self.saved.vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        Ok((VcpuStart::Restore(cpuid), mapped))
    }

    /// Warns that the kernel or initrd cannot be used: the saved guest runs without them, but a reset is refused.
    pub(crate) fn warn_of_reset(error: &Error) {
        let error = crate::error::WithCauses(error);
        tracing::warn!("the guest goes on, but cannot be reset: {error}");
    }

    fn map(&self, memory: &GuestMemory) -> Result<Option<UnmapFiles>, Error> {
        let unreadable = |error: std::io::Error| Error::incoming(SnapshotError::Host(error));
        let mode = self.options.map;
        let wanted = match mode {
            MapMode::Auto => !self.saved.config.hugepages && !host_cpu::is_nested(),
            MapMode::On => true,
            MapMode::Off => false,
        };
        if !wanted {
            return Ok(None);
        }
        match self.chain.map(memory).map_err(unreadable)? {
            Some(files) => Ok(Some(Box::new(move |memory| files.copy(memory)))),
            None if mode == MapMode::On => Err(Error::incoming(SnapshotError::NoLease)),
            None => crate::memory::clear(memory).map(|()| None),
        }
    }

    /// Writes the saved state into the machine, which was built for it. Returns whether the guest was stopped when it was saved.
    ///
    /// # Errors
    /// An image was changed after the save, or a state does not fit this host.
    pub(crate) fn restore(self, machine: &mut Machine) -> Result<bool, Error> {
        if self.options.check_disks {
            for (disk, saved) in machine.hardware.disks.iter().zip(&self.saved.disks) {
                let checked = saved.check_image(disk).map_err(Error::incoming);
                checked.map_err(|error| self.named(error))?;
            }
        }
        let passed = match self.options.clock {
            ClockMode::Stopped => 0,
            ClockMode::Host => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                (now.as_nanos() as u64).saturating_sub(self.saved.clock.realtime)
            }
        };
        let stays = self.saved.write(machine, passed).map_err(|error| self.named(error))?;
        if self.saved.config.acpi {
            generation_id::notify(&machine.hardware.vm)?;
        }
        let _ = RESTORED_FROM.set(self.chain.ids().to_vec());
        Ok(stays)
    }

    /// Names the file in an error about it.
    fn named(&self, error: Error) -> Error {
        error.of_file(&self.options.path)
    }
}

impl Error {
    fn of_file(self, path: &Path) -> Self {
        match self {
            Self::Incoming { source, .. } => Self::Incoming { path: path.to_owned(), source },
            other => other,
        }
    }
}

/// The saved disks, with the images of those that were given again.
fn merge_disks(
    saved: &SavedMachine,
    given: Vec<DiskConfig>,
    trust_paths: bool,
    control: bool,
) -> Result<Vec<DiskConfig>, SnapshotError> {
    let is_missing = |disk: &&SavedDisk| given.iter().all(|given| given.id != disk.config.id);
    let missing: Vec<_> = saved.disks.iter().filter(is_missing).map(SavedDisk::option).collect();
    if !trust_paths && !missing.is_empty() {
        return Err(SnapshotError::DisksNotGiven(missing.join(" ")));
    }
    let mut disks: Vec<_> = saved.disks.iter().map(|disk| disk.config.clone()).collect();
    let names =
        || saved.disks.iter().map(|disk| disk.config.id.clone()).collect::<Vec<_>>().join(", ");
    for moved in given {
        let disk = disks.iter_mut().find(|disk| disk.id == moved.id);
        let disk = disk.ok_or_else(|| SnapshotError::NoSuchDisk(moved.id.clone(), names()))?;
        // What the guest sees of the disk stays.
        let read_only = disk.image.read_only;
        disk.image = devices::disk::OpenOptions { read_only, ..moved.image };
    }
    for disk in disks.iter_mut().filter(|_| !control) {
        // No client could resume the machine.
        use devices::block::ErrorPolicy::{Enospc, Report, Stop};
        for policy in [&mut disk.device.read_errors, &mut disk.device.write_errors] {
            if matches!(policy, Stop | Enospc) {
                *policy = Report;
            }
        }
    }
    Ok(disks)
}

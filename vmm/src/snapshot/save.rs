//! A save, step by step.
//!
//! `control::migration` calls [`begin`], which opens the target while the guest still runs. [`Machine::save`] then adds a task
//! (`machine::save_task`) to the machine's standstill. When everything stands still, that task does this, in this order:
//!
//! 1. On the main thread, [`read_machine`] reads the state of the machine: see [`super::saved`].
//! 2. It flushes each disk on the disk's own thread: the saved memory says that earlier writes are on the disk. A flush that the host
//!    does not finish fails the save at `--stop-timeout`.
//! 3. On the thread `machine-job`, it writes RAM, then headers and notes, and syncs the file ([`UnwrittenSave::run`]). A background save
//!    (`background_save`) does this and the next step on the thread `save`, while the machine goes on.
//! 4. Only then it gives the file its name ([`NewFile`]). If a client has passed a descriptor, naming the file is the client's task.
//!
//! The main loop goes on meanwhile, and answers how far the save is.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::SnapshotError;
use super::core_file::CoreLayout;
use super::increments::Base;
use super::new_file::NewFile;
use super::page_map::{FileMapping, PageMap};
use super::page_set::PageSet;
use super::pages::{RamProgress, RamSave};
use super::saved::{Purpose, SavedConfig, SavedMachine};
use crate::GuestMemory;
use crate::error::Error;
use crate::machine::Machine;
use crate::machine::save_task::Work;

/// A save under way, as its client sees it.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    pub(crate) ram: Arc<RamProgress>,
    pub(crate) cancel: Arc<AtomicBool>,
}

/// Makes another thread write a save. Returns when the machine may go on.
pub(super) type WriteInBackground = Box<dyn FnOnce(UnwrittenSave) -> Result<(), Error> + Send>;

/// Saves `machine` at the next standstill. Returns the job's number: the event [`MachineEvent::Done`](crate::machine::MachineEvent) with
/// it ends the save.
///
/// # Errors
/// The target cannot be made, or the machine is busy. Nothing has changed then.
pub(crate) fn begin(
    machine: &mut Machine,
    config: SavedConfig,
    destination: Destination,
    progress: &Progress,
    purpose: Purpose,
) -> Result<u64, Error> {
    begin_with(machine, config, destination, progress, purpose, None)
}

/// As [`begin`]. With `background`, the machine goes on when that function returns.
pub(super) fn begin_with(
    machine: &mut Machine,
    config: SavedConfig,
    destination: Destination,
    progress: &Progress,
    purpose: Purpose,
    background: Option<WriteInBackground>,
) -> Result<u64, Error> {
    let is_increment = purpose == Purpose::Increment;
    if is_increment {
        base_of_machine()?;
    }
    let target = Target::open(destination, machine, &config, is_increment)?;
    if purpose == Purpose::LastDump {
        // The guest has panicked: an ordinary save that is under way is canceled, as if the machine ended.
        machine.cancel_task(Error::Ending);
    }
    let cancel = Arc::clone(&progress.cancel);
    let progress = progress.clone();
    let goes_on = purpose == Purpose::Dump || background.is_some();
    let begin = move |machine: &Machine| {
        read_machine(machine, config, target, progress, purpose, background)
    };
    machine.save(Box::new(begin), cancel, goes_on)
}

fn base_of_machine() -> Result<Base, Error> {
    Base::of_machine().map_err(Error::save)
}

fn save_error(path: &Path, source: io::Error) -> Error {
    Error::save(SnapshotError::Target { path: path.to_owned(), source })
}

/// Device and inode of the file from which this machine was restored, and of its bases. A save of the whole machine may replace one,
/// because the machine keeps the old file mapped. An increment may not, because it needs the old one.
pub(super) static RESTORED_FROM: OnceLock<Vec<(u64, u64)>> = OnceLock::new();

/// Refuses a target that is no regular file, or that the machine uses: a reset would read it, or this process has it open (such as a
/// backing file or an increment's base). `given` is the target's descriptor, if a client has passed one.
fn check_target(
    machine: &Machine,
    config: &SavedConfig,
    target: &Metadata,
    given: Option<RawFd>,
    is_increment: bool,
) -> io::Result<()> {
    if !target.is_file() {
        return Err(io::Error::other("it is not a regular file; give another path"));
    }
    let disks = machine.hardware.disks.iter().map(|disk| &disk.config.image.path);
    let id = (target.dev(), target.ino());
    let same = |other: Metadata| (other.dev(), other.ino()) == id;
    let files = disks.chain([&config.kernel]).chain(&config.initrd);
    let is_origin = RESTORED_FROM.get().is_some_and(|files| files.contains(&id));
    let is_replaced = given.is_none() && !is_increment && is_origin;
    let open = !is_replaced && open_files(given).any(|file| file == id);
    if open || files.filter_map(|file| fs::metadata(file).ok()).any(same) {
        return Err(io::Error::other("the machine uses it; give another path"));
    }
    Ok(())
}

/// The device and inode of each file that this process has open, except for descriptor `except`. A confined process cannot read /proc, so
/// all descriptor numbers are tried, up to a large gap: the kernel assigns the lowest free number.
#[expect(unsafe_code, reason = "descriptors are looked at by their numbers")]
fn open_files(except: Option<RawFd>) -> impl Iterator<Item = (u64, u64)> {
    const LARGEST_GAP: usize = 1024;
    let mut gap = 0;
    let status = move |fd: RawFd| {
        // SAFETY: borrowed for this call only, which reads the file's status, and fails if the descriptor is not open.
        let status = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok();
        gap = if status.is_some() { 0 } else { gap + 1 };
        (gap <= LARGEST_GAP).then_some((fd, status))
    };
    let open = (0..RawFd::MAX).map_while(status).filter(move |(fd, _)| Some(*fd) != except);
    open.filter_map(|(_, status)| status).map(|status| (status.st_dev, status.st_ino))
}

/// Called at the standstill on the main thread: reads everything but RAM, and returns what is left to do.
fn read_machine(
    machine: &Machine,
    config: SavedConfig,
    target: Target,
    progress: Progress,
    purpose: Purpose,
    background: Option<WriteInBackground>,
) -> Result<Work, Error> {
    let mut saved = SavedMachine::read(machine, config, purpose)?;
    let mut mapped = None;
    if purpose == Purpose::Increment {
        let base = base_of_machine()?;
        saved.set_base(base.saved);
        mapped = Some(base.mapped);
    }
    let memory = machine.hardware.memory.clone();
    let bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    progress.ram.total.store(bytes, Ordering::Relaxed);
    progress.ram.remaining.store(bytes, Ordering::Relaxed);
    let save = UnwrittenSave { saved, memory, map: PageMap::read(), mapped, target, progress };
    let write = Box::new(move || save.run(background));
    Ok(Work { flush_disks: purpose.is_save(), write })
}

/// A save whose machine has been read, and which has still to be written.
pub(super) struct UnwrittenSave {
    saved: SavedMachine,
    memory: GuestMemory,
    map: Option<PageMap>,
    /// Only of an increment: the file mappings at the restore from its base.
    mapped: Option<Vec<FileMapping>>,
    target: Target,
    progress: Progress,
}

impl UnwrittenSave {
    /// Writes the file. The disks have been flushed.
    fn run(mut self, background: Option<WriteInBackground>) -> Result<(), Error> {
        self.saved.disks.iter_mut().for_each(|disk| disk.look_again());
        match background {
            Some(background) => background(self),
            None => self.write(|ram| ram.write()),
        }
    }

    /// The pages that an increment has. `None` for a save of all RAM.
    fn changed(&self) -> Option<io::Result<PageSet>> {
        let mapped = self.mapped.as_deref()?;
        let unknown = |error| io::Error::other(SnapshotError::NoPageMap(error));
        let Some(map) = &self.map else {
            return Some(Err(unknown(io::ErrorKind::Unsupported.into())));
        };
        Some(map.changed(&self.memory, mapped).map_err(unknown))
    }

    /// Writes the file. `write_ram` returns the checksums of RAM.
    pub(super) fn write(
        self,
        write_ram: impl FnOnce(&RamSave<'_>) -> io::Result<Vec<u64>>,
    ) -> Result<(), Error> {
        let path = self.target.path().to_owned();
        self.write_target(write_ram).map_err(|error| save_error(&path, error))
    }

    fn write_target(
        self,
        write_ram: impl FnOnce(&RamSave<'_>) -> io::Result<Vec<u64>>,
    ) -> io::Result<()> {
        let changed = self.changed().transpose()?;
        let Self { saved, memory, map, target, progress, .. } = self;
        let file = target.file();
        let json = serde_json::to_vec(&saved)?;
        let cpus: Vec<_> =
            saved.vcpus.iter().map(|vcpu| (vcpu.state.regs, vcpu.state.sregs)).collect();
        let ram: Vec<_> =
            memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let layout = CoreLayout::new(&json, &cpus, &ram, changed.as_ref());
        if let Target::Given(..) = &target {
            file.set_len(0)?;
        }
        let layout_length = layout.file_length();
        file.set_len(layout_length)?;
        let checksums = write_ram(&RamSave {
            memory: &memory,
            map: map.as_ref(),
            changed: changed.as_ref(),
            file,
            segments: &layout.segments,
            progress: &progress.ram,
            cancel: &progress.cancel,
        })?;
        file.write_all_at(&layout.head(&checksums), 0)?;
        file.sync_all()?;
        if file.metadata()?.len() != layout_length {
            // For a file that is open for appending, pwrite(2) ignores the offset.
            return Err(io::Error::other("it is open for appending; open it for writing"));
        }
        if progress.cancel.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        target.publish()
    }
}

/// Where a machine is saved to.
pub(crate) enum Destination {
    /// A new file, which gets this name when it is complete.
    Path(PathBuf),
    /// A file that is open already, with a name for messages. Its old content is lost.
    Given(PathBuf, File),
}

enum Target {
    New(NewFile),
    Given(PathBuf, File),
}

impl Target {
    /// Opens the target. Refuses to replace a file of the machine, which the user may have named by mistake.
    fn open(
        destination: Destination,
        machine: &Machine,
        config: &SavedConfig,
        is_increment: bool,
    ) -> Result<Self, Error> {
        let check =
            |target: &Metadata, given| check_target(machine, config, target, given, is_increment);
        match destination {
            Destination::Path(path) => {
                let checked = fs::metadata(&path).map_or(Ok(()), |present| check(&present, None));
                let new = checked.and_then(|()| NewFile::create(&path));
                new.map(Self::New).map_err(|error| save_error(&path, error))
            }
            Destination::Given(name, file) => {
                let fd = Some(file.as_raw_fd());
                let checked = file.metadata().and_then(|file| check(&file, fd));
                checked.map_err(|error| save_error(&name, error))?;
                Ok(Self::Given(name, file))
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::New(new) => new.path(),
            Self::Given(name, _) => name,
        }
    }

    fn file(&self) -> &File {
        match self {
            Self::New(new) => new.file(),
            Self::Given(_, file) => file,
        }
    }

    fn publish(self) -> io::Result<()> {
        match self {
            Self::New(new) => new.publish(),
            Self::Given(..) => Ok(()),
        }
    }
}

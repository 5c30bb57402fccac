//! Save and restore: writes a machine that stands still to a file, and makes a machine from that file.
//!
//! This folder is a capability. A save hooks in as a task of the machine (`machine::save_task`), which `control::migration` begins. A
//! restore is the builder's second way to start: an [`Incoming`] machine. QEMU's names are used where QMP shows them: a save is a
//! *migration*, a restore is *incoming*. The chapter is `vmm/docs/stop-reset-save.md`.
//!
//! | file | what it has |
//! |---|---|
//! | [`saved`], [`vcpu`] | the machine, and a vCPU, as values |
//! | [`core_file`], [`description`], [`checksum`] | the file around these values, the checks of its description, and what finds damage |
//! | [`pages`], [`page_map`] | guest RAM in the file, and which of its pages are data |
//! | [`increments`], [`page_set`] | files that are based on other files, and which pages they have |
//! | [`save`], [`incoming`] | a save and a restore, step by step |
//! | [`early_parts`] | what is made while a process waits for the name of the file |
//! | [`background_save`] | a background save: RAM is written while the guest goes on |
//! | [`panic_dump`] | `--dump-on-panic` |
//! | [`generation_id`] | the VM generation ID, by which a guest notices that it was restored |
//! | [`fit`] | whether this host's CPU can run a guest of the saved one |
//!
//! Every field of a file is checked before it is used. If a check fails, nothing of the file reaches a guest. Its paths of images and of
//! the kernel are used only with `paths=saved`, because the file's author could name any file of the user.

mod background_save;
mod checksum;
mod core_file;
mod description;
mod early_parts;
mod fit;
#[cfg(test)]
mod fuzz;
pub(crate) mod generation_id;
mod incoming;
mod increments;
mod new_file;
mod page_map;
mod page_set;
mod pages;
mod panic_dump;
mod save;
mod saved;
#[cfg(test)]
mod tests;
mod vcpu;

use std::io;
use std::path::PathBuf;

use crate::error::Error;
pub(crate) use background_save::{BackgroundSave, SaveThread, begin_in_background};
pub(crate) use early_parts::EarlyParts;
pub use incoming::{ClockMode, Incoming, IncomingConfig, MapMode};
pub use increments::check_new_increment;
pub use new_file::NewFile;
pub(crate) use new_file::remove_unfinished;
pub(crate) use page_map::open_page_map;
pub(crate) use panic_dump::PanicDump;
pub(crate) use save::{Destination, Progress, begin};
pub(crate) use saved::{Purpose, SavedConfig};

/// A save that was refused or has failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot save the machine")]
struct SaveError(#[source] SnapshotError);

impl Error {
    fn save(source: SnapshotError) -> Self {
        Self::Capability(SaveError(source).into())
    }

    /// What is wrong with a saved machine; the file's path is added later.
    fn incoming(source: SnapshotError) -> Self {
        Self::Incoming { path: PathBuf::new(), source: source.into() }
    }
}

/// Why a machine cannot be saved, or a file is not a machine that can go on here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("{}", path.display())]
    Target { path: PathBuf, source: io::Error },
    #[error("disk {disk}: cannot read the size and time of its image {}", path.display())]
    Image { disk: String, path: PathBuf, source: io::Error },
    #[error("disk {disk}: {why}")]
    Unsaveable { disk: String, why: &'static str },
    #[error(
        "a machine with huge pages cannot be saved while its guest goes on; save it without --background (QMP: background-snapshot)"
    )]
    HugePages,
    #[error("{0}")]
    Host(#[from] io::Error),
    #[error("it is not a saved machine; give a file that `minivmm ctl SOCKET save` wrote")]
    NotOurs,
    #[error("it is damaged: {0}; use another copy")]
    Damaged(&'static str),
    #[error("its description cannot be read; use another copy, or a minivmm that knows it")]
    Description(#[source] serde_json::Error),
    #[error("it has format {0}.{1}, and this minivmm reads {major}.x; use the minivmm that saved it", major = saved::MAJOR)]
    Format(u32, u32),
    #[error("it needs {0}, which this minivmm does not know; use the minivmm that saved it")]
    Needs(String),
    #[error(
        "map=on: it cannot be mapped (the host gives no lease or no pipe, or there are too many parts); give map=auto"
    )]
    NoLease,
    #[error(
        "the saved CPU has features that this host's lacks: {0}; restore on the host that saved it"
    )]
    Cpu(String),
    #[error(
        "the saved CPU's TSC has {saved} kHz and this host's {present}; restore on the host that saved it"
    )]
    Tsc { saved: u32, present: u32 },
    #[error(
        "the images of its disks are not given; add {0}, or the key paths=saved to open what the file names"
    )]
    DisksNotGiven(String),
    #[error("it is a dump that cannot be restored (disk {disk}: {why}); open it with gdb or crash")]
    Dump { disk: String, why: String },
    #[error("its guest may run guests of its own; add --nested on to allow that")]
    Nested,
    #[error("--disk id={0}: the saved machine has no such disk; its disks are {1}")]
    NoSuchDisk(String, String),
    #[error(
        "disk {id}: {} was changed after the machine was saved ({what}); give the image as it was, or disks=unchecked", path.display()
    )]
    DiskChanged { id: String, path: PathBuf, what: String },
    #[error("disk {0}: the image is not the one that the machine had")]
    Transport(String, #[source] devices::virtio::mmio::RestoreError),
    #[error("disk {0}: a saved queue does not fit the device; use another copy")]
    Queue(String),
    #[error(
        "the machine has no base: its memory is not mapped from a saved machine; save the whole machine"
    )]
    NoBase,
    #[error(
        "{} has been renamed or replaced since the machine was restored from it; save the whole machine", .0.display()
    )]
    BaseMoved(PathBuf),
    #[error(
        "the machine was restored from an increment on {0} other files; save the whole machine"
    )]
    DeepIncrement(usize),
    #[error("{} is a base of the increment; give another path", .0.display())]
    ReplacesBase(PathBuf),
    #[error("the host does not show which pages have changed; save the whole machine")]
    NoPageMap(#[source] io::Error),
    #[error("its base {path}")]
    Base { path: String, source: Box<SnapshotError> },
    #[error(
        "its base {name} is not beside it; put it there, or add the key paths=saved to take {path}"
    )]
    BaseNotBeside { name: String, path: String },
    #[error(
        "its base {name} is not beside it, and there is no {path}; put the base in one of these places"
    )]
    BaseMissing { name: String, path: String },
    #[error("it is not the file on which the increment was saved; put that one there")]
    BaseChanged,
    #[error("its base {0} is based on it; use another copy")]
    BasesInACircle(String),
    #[error("it is based on more than {0} other files; use another copy")]
    ManyBases(usize),
}

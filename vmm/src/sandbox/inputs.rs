//! What a confinement is made from.
//!
//! A process that waits for a saved machine (`--incoming defer`) has prepared its confinement and started its first threads. Until a client
//! names the file, other programs may make or replace directories, or give the process other processors or another priority
//! (taskset(1), chrt(1), renice(1), ionice(1)), which changes its main thread only. If the inputs are no longer the same then,
//! `Sandbox::fits` says so, and the confinement is prepared again, with new threads, which inherit what the main thread has.

#![expect(unsafe_code, reason = "sched_getattr and ioprio_get have no safe wrappers")]

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::thread::{CpuSet, sched_getaffinity};

use super::privileges;
use crate::config::{ConsoleConfig, GdbConfig, VmConfig};

/// The options on which the lists depend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// This process's ID.
    pub(super) process: u32,
    /// A disk takes SCSI commands.
    pub(super) scsi: bool,
    /// The machine may be saved to a directory (`--save-directory`), the only one in which Landlock lets it open files.
    pub(super) saves: bool,
    /// A debugger may connect.
    pub(super) debugs: bool,
}

impl Needs {
    /// Those of the machine.
    pub(super) fn of(config: &VmConfig) -> Self {
        Self {
            process: std::process::id(),
            scsi: config.disks.iter().any(|disk| disk.image.scsi),
            saves: config.save_directory.is_some(),
            debugs: config.gdb.is_some(),
        }
    }
}

/// The paths of the machine's own sockets.
pub(super) fn sockets(config: &VmConfig) -> Vec<&Path> {
    let consoles = config.consoles.iter().filter_map(|console| match console {
        ConsoleConfig::Unix(path) => Some(path.as_path()),
        _ => None,
    });
    let debugger = config.gdb.iter().filter_map(|gdb| match gdb {
        GdbConfig::Unix(path) => Some(path.as_path()),
        GdbConfig::Tcp(_) => None,
    });
    config.qmp.as_deref().into_iter().chain(consoles).chain(debugger).collect()
}

/// Compared to see whether a confinement still fits.
#[derive(PartialEq, Eq)]
pub(super) struct Inputs {
    /// What the filters are compiled for. A saved machine may change it.
    pub(super) needs: Needs,
    /// Those of Landlock's rules, in order. `None`: there was no directory at that path.
    directories: Vec<Option<Directory>>,
    scheduling: Scheduling,
}

/// Device, inode and time of creation of a directory, since a new directory may get the inode number of a removed one.
type Directory = (u64, u64, Option<SystemTime>);

impl Inputs {
    /// Of the calling thread, for `config`.
    pub(super) fn of(config: &VmConfig) -> Self {
        let sockets = sockets(config).into_iter().map(privileges::directory_of);
        let directories = sockets.chain(config.save_directory.as_deref()).map(directory).collect();
        Self { needs: Needs::of(config), directories, scheduling: Scheduling::of_this_thread() }
    }
}

fn directory(path: &Path) -> Option<Directory> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.st_dev(), metadata.st_ino(), metadata.created().ok()))
}

/// What a new thread inherits from the thread that starts it, and other programs can change of one thread. What the host does not show is the
/// same in all values.
#[derive(PartialEq, Eq)]
struct Scheduling {
    processors: Option<CpuSet>,
    /// `struct sched_attr` (include/uapi/linux/sched/types.h): the policy with its parameters, and the nice value.
    attributes: [u64; 7],
    io_priority: libc::c_long,
}

impl Scheduling {
    fn of_this_thread() -> Self {
        const THIS_THREAD: libc::c_int = 0;
        const IOPRIO_WHO_PROCESS: libc::c_int = 1;
        let mut attributes = [0; 7];
        let size = size_of_val(&attributes);
        // SAFETY: the kernel writes at most `size` bytes to `attributes`, which is plain numbers.
        unsafe {
            let to = attributes.as_mut_ptr();
            libc::syscall(libc::SYS_sched_getattr, THIS_THREAD, to, size, 0);
        }
        Self {
            processors: sched_getaffinity(None).ok(),
            attributes,
            // SAFETY: no argument is a pointer.
            io_priority: unsafe {
                libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, THIS_THREAD)
            },
        }
    }
}

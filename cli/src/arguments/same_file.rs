//! One file never plays two roles: a console file that is also a disk would be emptied, a disk that is also the kernel
//! overwritten. [`check`] looks before anything is opened. Two disks on one image are left to the locks of `devices::disk`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use vmm::{ConsoleConfig, GdbConfig, VmConfig};

use super::incoming::IncomingOption;
use super::usage_error::UsageError;
use crate::trace::TraceOptions;

/// What a path leads to. Hard links, symbolic links and two nodes of one block device are the same.
#[derive(PartialEq, Eq)]
enum Identity {
    BlockDevice(u64),
    File {
        device: u64,
        inode: u64,
    },
    /// There is nothing yet, and minivmm would create it.
    NewName {
        device: u64,
        inode: u64,
        name: OsString,
    },
}

impl Identity {
    /// `None`: the path leads nowhere. What opens it reports that.
    fn of(path: &Path) -> Option<Self> {
        if let Ok(file) = fs::metadata(path) {
            return Some(match file.file_type().is_block_device() {
                true => Self::BlockDevice(file.rdev()),
                false => Self::File { device: file.dev(), inode: file.ino() },
            });
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = fs::metadata(parent.unwrap_or(Path::new("."))).ok()?;
        let name = path.file_name()?.to_owned();
        Some(Self::NewName { device: directory.dev(), inode: directory.ino(), name })
    }
}

/// Compares all pairs of files that `config` names.
///
/// # Errors
/// The first pair that is the same file.
pub(super) fn check(
    config: &VmConfig,
    incoming: Option<&IncomingOption>,
    trace: Option<&TraceOptions>,
) -> Result<(), UsageError> {
    let mut files: Vec<(&str, PathBuf, &str)> = vec![("--kernel ", config.kernel.clone(), "")];
    if let Some(IncomingOption::File(incoming)) = incoming {
        files.push(("--incoming file:", incoming.path.clone(), ""));
    }
    files.extend(config.initrd.iter().map(|path| ("--initrd ", path.clone(), "")));
    files.extend(config.disks.iter().map(|disk| ("--disk ", disk.image.path.clone(), "disk")));
    let logs = config.disks.iter().filter_map(|disk| disk.image.log_writes.as_ref());
    files.extend(logs.map(|path| ("--disk log-writes=", path.clone(), "")));
    let dump = config.dump_on_panic.iter();
    files.extend(dump.map(|path| ("--dump-on-panic ", path.clone(), "")));
    let trace = trace.and_then(|trace| trace.file.clone()).into_iter();
    files.extend(trace.map(|path| ("--trace file=", path, "")));
    files.extend(config.qmp.iter().map(|path| ("--qmp unix:", path.clone(), "")));
    if let Some(GdbConfig::Unix(path)) = &config.gdb {
        files.push(("--gdb unix:", path.clone(), ""));
    }
    files.extend(config.consoles.iter().filter_map(|console| match console {
        ConsoleConfig::File { path, .. } => Some(("--console file:", path.clone(), "")),
        ConsoleConfig::Unix(path) => Some(("--console unix:", path.clone(), "")),
        _ => None,
    }));
    let identities: Vec<_> = files.iter().map(|(_, path, _)| Identity::of(path)).collect();
    for (second, (option, path, kind)) in files.iter().enumerate() {
        for (first, (other_option, other_path, other_kind)) in files[..second].iter().enumerate() {
            let both_disks = *kind == "disk" && *other_kind == "disk";
            if !both_disks && identities[first].is_some() && identities[first] == identities[second]
            {
                return Err(UsageError::SameFile {
                    first: format!("{other_option}{}", other_path.display()),
                    second: format!("{option}{}", path.display()),
                });
            }
        }
    }
    Ok(())
}

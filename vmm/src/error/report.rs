//! An error as one line, with its causes and what the user can do, and whether the user's arguments are at fault.
//!
//! A capability: the core only makes errors. `cli`, `control` and `snapshot` print them.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use devices::block::BlockError;

use super::{Error, VcpuError};

/// An error with its causes and what the user can do, on one line: `WHAT: CAUSE: CAUSE; REMEDY`. A cause that the line already
/// ends with is not repeated: some foreign errors quote theirs.
pub struct WithCauses<'a>(pub &'a (dyn StdError + 'static));

impl fmt::Display for WithCauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.to_string();
        for cause in causes(self.0).skip(1).map(ToString::to_string) {
            if !line.ends_with(&cause) {
                line = format!("{line}: {cause}");
            }
        }
        f.write_str(&line)?;
        let remedy = match self.0.downcast_ref::<Error>() {
            Some(error) => error.remedy(),
            None => causes(self.0).find_map(<dyn StdError>::downcast_ref).and_then(of_path),
        };
        match remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| (**error).source())
}

/// What to do if the host does not find a path.
fn of_path(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::ENOENT | libc::ENOTDIR | libc::ELOOP => Some("check the path"),
        libc::EEXIST => Some("give the path of a new file"),
        libc::EISDIR => Some("give the path of a file"),
        libc::ENXIO => Some("it is a socket, or a FIFO without a reader; give another path"),
        _ => None,
    }
}

/// What to do if the host is short of something, as the first errno among the causes tells.
fn shortage(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    let errno = |cause: &(dyn StdError + 'static)| {
        let kvm = || cause.downcast_ref().map(|error: &kvm_ioctls::Error| error.errno());
        cause.downcast_ref().and_then(io::Error::raw_os_error).or_else(kvm)
    };
    match causes(error).find_map(errno)? {
        libc::EMFILE => Some("raise the limit on open files (`ulimit -n`)"),
        libc::ENFILE => Some("the host has too many open files"),
        libc::ENOMEM => {
            Some("the host has too little free memory, or a limit is too low (`ulimit -v`)")
        }
        libc::EAGAIN => Some("raise the limit on tasks (`ulimit -u`, or the cgroup's pids.max)"),
        // Of a path's permissions, open(2) tells by EACCES.
        libc::EPERM | libc::ENOSYS => {
            Some("the container, service or file system forbids this; allow it there")
        }
        _ => None,
    }
}

impl Error {
    /// Whether the user's arguments are at fault (exit status 2) rather than the host (exit status 1). A shortage of the
    /// host is never the arguments' fault, whichever of them meets it.
    pub fn is_usage(&self) -> bool {
        let usage = match self {
            Self::Argument { .. }
            | Self::NotAFile { .. }
            | Self::Cmdline(_)
            | Self::BootFile { .. }
            | Self::FileChanged { .. }
            | Self::Incoming { .. }
            | Self::Disk { .. }
            | Self::TooManyDisks(_)
            | Self::TooMuchMemory { .. }
            | Self::TooManyCpus { .. }
            | Self::Refused(_) => true,
            Self::DiskOptions { source, .. } => !matches!(source, BlockError::Thread { .. }),
            _ => false,
        };
        usage && shortage(self).is_none()
    }

    /// What the user can do, where the message and its causes do not say so themselves.
    fn remedy(&self) -> Option<&'static str> {
        let specific = match self {
            Self::Argument { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => Some("stop the other program, or choose another path"),
                io::ErrorKind::PermissionDenied => Some("make it accessible for this user"),
                _ => of_path(source),
            },
            Self::Disk { remedy, .. } => *remedy,
            Self::Flush { .. } => Some("check the storage behind it"),
            Self::Vcpu { source: VcpuError::Entry(_) | VcpuError::Run(_), .. } => {
                Some("`dmesg` on the host may tell more")
            }
            Self::AddressMap(_)
            | Self::TooMany(_)
            | Self::ThreadPanicked
            | Self::Vcpu { source: VcpuError::Panicked, .. } => Some("please report it"),
            Self::Stopped(error) => error.remedy(),
            Self::Memory { .. } => {
                Some("ask for less with --memory, or raise the limit (`ulimit -v`)")
            }
            Self::NoKvm(source) => Some(match source.kind() {
                io::ErrorKind::NotFound => {
                    "load the kvm_intel or kvm_amd module, or enable virtualization in the firmware (in a virtual \
                     machine: nested virtualization), or use the lab (`make lab`)"
                }
                io::ErrorKind::PermissionDenied => "add yourself to the group kvm and log in again",
                _ => "it is not a working KVM device; check the kvm_intel or kvm_amd module",
            }),
            _ => None,
        };
        shortage(self).or(specific)
    }
}

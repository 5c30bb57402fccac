//! Why a VM could not be built or had to stop.
//!
//! `Display` names what failed (the option and its value) and the remedy. It never contains the cause: that is the error's
//! `source`, and [`WithCauses`] prints the whole chain once, where the error reaches the user or a QMP client.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use devices::block::BlockError;
use devices::disk::{OpenError, OpenReason};

pub(crate) type Cause = Box<dyn StdError + Send + Sync>;

/// Why a VM could not be built or had to stop. [`Error::is_usage`] decides the exit status; [`WithCauses`] prints everything.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name the variants and their fields")]
pub enum Error {
    /// The host refuses a path that the user gave.
    #[error("{option} {value}")]
    Argument { option: &'static str, value: String, source: io::Error },
    #[error("{option} {}: it is {kind}; give a regular file", path.display())]
    NotAFile { option: &'static str, path: PathBuf, kind: &'static str },
    #[error("--cmdline")]
    Cmdline(#[from] arch::cmdline::Error),
    #[error("{option} {}", path.display())]
    BootFile { option: &'static str, path: PathBuf, source: arch::boot::Error },
    /// The place of everything in memory was planned for the content that the file had when it was opened.
    #[error(
        "{option} {}: the file was changed after minivmm opened it; start minivmm again",
        path.display()
    )]
    FileChanged { option: &'static str, path: PathBuf },
    /// Made by `Error::disk`.
    #[error("--disk {}", path.display())]
    Disk { path: PathBuf, source: Cause, remedy: Option<&'static str> },
    #[error("--disk {}", path.display())]
    DiskOptions { path: PathBuf, source: BlockError },
    #[error("--disk: {0} disks, but a machine has room for {max}; give fewer", max = arch::layout::VIRTIO_MMIO_MAX)]
    TooManyDisks(usize),
    #[error("--memory {wanted_mib}M: the host has {host_mib}M; ask for less than that")]
    TooMuchMemory { wanted_mib: u64, host_mib: u64 },
    #[error("--memory {}K with --hugepages: give a multiple of 2M", .0 >> 10)]
    HugePageMemory(u64),
    #[error(
        "--hugepages: {wanted} pages of 2M are needed and {free} are free; make more: \
         echo {enough} >/proc/sys/vm/nr_hugepages"
    )]
    HugePages { wanted: u64, free: u64, enough: u64 },
    #[error(
        "{option} {processor}: this process may use the host's CPUs {allowed}; name some of them"
    )]
    Processor { option: &'static str, processor: usize, allowed: String },
    #[error("--cpus {wanted}: this host's KVM allows 1 to {max}; write a number in that range")]
    TooManyCpus { wanted: u32, max: u32 },
    #[error("cannot use /dev/kvm")]
    NoKvm(#[source] io::Error),
    #[error("this host's KVM lacks {0}; a Linux host with kernel 4.20 or later has it")]
    KvmLacks(&'static str),
    #[error("KVM cannot {what}")]
    Kvm { what: &'static str, source: kvm_ioctls::Error },
    #[error("cannot map {mib}M of guest memory")]
    Memory { mib: u64, source: Cause },
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("the machine's address map is wrong")]
    AddressMap(#[from] devices::bus::BusError),
    #[error("KVM refuses a value for MSR {0:#x}")]
    Msr(u32),
    #[error("the main loop failed")]
    EventLoop(#[from] event_manager::Error),
    #[error("vCPU {index}")]
    Vcpu { index: u32, source: VcpuError },
    #[error("disk {device}: {message}")]
    DiskThread { device: String, message: String },
    #[error("disk {device} could not be flushed at the end")]
    Flush { device: String, source: devices::disk::DiskError },
    #[error(
        "disk {disks}: the host has not finished its requests after {after:.1?}; check the storage behind it"
    )]
    DiskHung { disks: String, after: std::time::Duration },
    #[error("a device did not finish its reset in time; check the storage behind the disks")]
    ResetHung,
    #[error("cannot resize the disk")]
    Resize(#[source] io::Error),
    #[error("the machine is about to stop; wait until it has")]
    Stopping,
    #[error("cannot save the machine")]
    Save(#[source] Cause),
    #[error(
        "the machine was restored without a kernel, which a reset needs; restore it again with --kernel FILE"
    )]
    NoBootImage,
    #[error("--incoming file:{}", path.display())]
    Incoming { path: PathBuf, source: Cause },
    #[error("a background thread panicked; see the line before")]
    ThreadPanicked,
    #[error("--sandbox: the list of system calls cannot be compiled")]
    Sandbox(#[source] Cause),
    #[error("a thread broke out of what the sandbox allows; see the line before")]
    Violation,
    #[error("the VM was stopped")]
    Stopped(#[source] Box<Error>),
}

/// Why a vCPU cannot run any further. [`Error::Vcpu`] wraps it and adds the index of the vCPU.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name the variants and their fields")]
pub enum VcpuError {
    #[error("the CPU refuses to enter the guest, reason {0:#x}")]
    Entry(u64),
    #[error("KVM cannot emulate the instruction at {rip:#x}")]
    Emulation { rip: u64 },
    #[error("KVM internal error {suberror} at {rip:#x}")]
    Internal { suberror: u32, rip: u64 },
    #[error("unexpected exit {0}")]
    Exit(String),
    #[error("KVM_RUN")]
    Run(#[source] io::Error),
    #[error("its thread panicked")]
    Panicked,
    #[error("its thread has ended")]
    Ended,
    #[error("it is running")]
    Running,
    #[error("it has not left the guest after {0:.1?}")]
    Stuck(std::time::Duration),
}

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
        match self.0.downcast_ref::<Error>().and_then(Error::remedy) {
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

/// What to do if the host is short of something, as the first errno among the causes tells.
fn shortage(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    let errno = |cause: &(dyn StdError + 'static)| {
        let kvm = || cause.downcast_ref().map(|error: &kvm_ioctls::Error| error.errno());
        cause.downcast_ref().and_then(io::Error::raw_os_error).or_else(kvm)
    };
    match causes(error).find_map(errno)? {
        libc::EMFILE => Some("raise the limit on open files (`ulimit -n`)"),
        libc::ENFILE => Some("the host has too many open files"),
        libc::ENOMEM => Some("the host has too little free memory"),
        libc::EAGAIN => Some("raise the limit on tasks (`ulimit -u`, or the cgroup's pids.max)"),
        // Of a path's permissions, open(2) tells by EACCES.
        libc::EPERM | libc::ENOSYS => Some("allow it in the container, service or file system"),
        _ => None,
    }
}

impl Error {
    /// The image at `path`, as the user gave it, or a file that it builds on, cannot be a disk.
    pub(crate) fn disk(path: &Path, error: OpenError) -> Self {
        let remedy = error.reason.remedy();
        let source = match error.reason {
            _ if error.path != path => error.into(),
            OpenReason::Host(error) => error.into(),
            reason => reason.into(),
        };
        Self::Disk { path: path.to_owned(), source, remedy }
    }

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
            | Self::HugePageMemory(_)
            | Self::Processor { .. } => true,
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
                io::ErrorKind::NotFound => Some("check the path"),
                _ => None,
            },
            Self::Disk { remedy, .. } => *remedy,
            Self::Memory { .. } => Some("ask for less with --memory"),
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

    /// What is wrong with a saved machine; the file's path is added later.
    pub(crate) fn incoming(source: impl Into<Cause>) -> Self {
        Self::Incoming { path: PathBuf::new(), source: source.into() }
    }

    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

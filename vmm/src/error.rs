//! Why a VM could not be built or had to stop.
//!
//! `Display` names what failed (the option and its value) and the remedy, and never the cause: that is the error's `source`.
//! [`WithCauses`] prints the whole chain once, where the error reaches the user or a QMP client.

mod report;

use std::io;
use std::path::{Path, PathBuf};

use devices::block::BlockError;
use devices::disk::OpenError;

pub use report::WithCauses;

pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

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
    #[error("this host's CPU has more {0} than minivmm supports")]
    TooMany(&'static str),
    #[error("bug in minivmm: the machine's address map is wrong")]
    AddressMap(#[from] devices::bus::BusError),
    #[error("KVM refuses a value for MSR {0:#x}")]
    Msr(u32),
    #[error("the main loop failed")]
    EventLoop(#[from] event_manager::Error),
    #[error("vCPU {index}")]
    Vcpu { index: u32, source: VcpuError },
    #[error("disk {device}: its data could not be flushed")]
    Flush { device: String, source: devices::disk::DiskError },
    #[error(
        "disk {disks}: the host has not finished its requests after {after:.1?}; check the storage behind it"
    )]
    DiskHung { disks: String, after: std::time::Duration },
    #[error("the machine is being stopped, reset or saved; try again when that is done")]
    Busy,
    #[error("the VM is ending")]
    Ending,
    #[error(
        "the machine was restored without a kernel, which a reset needs; restore it again with --kernel FILE"
    )]
    NoBootImage,
    #[error("--incoming file:{}", path.display())]
    Incoming { path: PathBuf, source: Cause },
    #[error("bug in minivmm: a background thread panicked; see the line before")]
    ThreadPanicked,
    /// A capability refuses the user's arguments.
    #[error(transparent)]
    Refused(Cause),
    /// A capability has failed.
    #[error(transparent)]
    Capability(Cause),
    #[error("the VM ended")]
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
    #[error("KVM_RUN ended with {0}, which minivmm does not handle")]
    Exit(String),
    #[error("KVM_RUN")]
    Run(#[source] io::Error),
    #[error("bug in minivmm: its thread panicked (see the line before)")]
    Panicked,
    #[error("its thread has ended")]
    Ended,
    #[error("it is running")]
    Running,
    #[error("it has not left the guest after {0:.1?}")]
    Stuck(std::time::Duration),
}

impl Error {
    /// The image at `path`, as the user gave it, or a file that it builds on, cannot be a disk.
    pub(crate) fn disk(path: &Path, error: OpenError) -> Self {
        let remedy = error.remedy;
        let source = if error.path == path { error.reason } else { error.into() };
        Self::Disk { path: path.to_owned(), source, remedy }
    }

    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

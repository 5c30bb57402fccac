//! Why a VM could not be built or had to stop.

use std::io;
use std::path::PathBuf;

/// One line that tells the user what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened.
    #[error("{option} {}: {source}", path.display())]
    Open {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something other than a regular file where one is needed.
    #[error("{option} {}: it is {kind}; give a regular file", path.display())]
    NotAFile {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The user's words cannot be passed to the kernel.
    #[error("--cmdline: {0}")]
    Cmdline(#[from] arch::cmdline::Error),
    /// The kernel or the initrd does not suit this machine.
    #[error("{option} {}: {source}", path.display())]
    BootFile {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: arch::boot::Error,
    },
    /// A disk image is unsuitable.
    #[error("--disk: {0}")]
    Disk(#[from] devices::disk::OpenError),
    /// The disk's options contradict each other or its image.
    #[error("--disk {}: {source}", path.display())]
    DiskOptions {
        /// The image.
        path: PathBuf,
        /// Why.
        source: devices::block::BlockError,
    },
    /// Too many disks.
    #[error("--disk: {0} disks, but a machine has interrupt lines for {max}", max = arch::layout::VIRTIO_MMIO_MAX)]
    TooManyDisks(usize),
    /// More memory than the host has.
    #[error("--memory {wanted_mib}M: the host has {host_mib}M; ask for less than that")]
    TooMuchMemory {
        /// As asked, in MiB.
        wanted_mib: u64,
        /// The host's RAM, in MiB.
        host_mib: u64,
    },
    /// Memory that is not made of whole huge pages.
    #[error("--memory {}K with --hugepages: give a multiple of 2M", .0 >> 10)]
    HugePageMemory(u64),
    /// Too few huge pages.
    #[error(
        "--hugepages: {wanted} pages of 2M are needed and {free} are free; make more: \
         echo {enough} >/proc/sys/vm/nr_hugepages"
    )]
    HugePages {
        /// As needed.
        wanted: u64,
        /// Free in the pool.
        free: u64,
        /// Size of a pool that would do.
        enough: u64,
    },
    /// A processor that there is not, or not for us.
    #[error("{option} {processor}: this process may use the host's processors {allowed}")]
    Processor {
        /// The option that named it.
        option: &'static str,
        /// Its number.
        processor: usize,
        /// Those that would do.
        allowed: String,
    },
    /// More vCPUs than KVM or the interrupt controller allow.
    #[error("--cpus {wanted}: this host's KVM allows 1 to {max}")]
    TooManyCpus {
        /// As asked.
        wanted: u32,
        /// The limit.
        max: u32,
    },
    /// The console cannot be where the user wants it.
    #[error("--console {what}: {source}")]
    Console {
        /// The option's value.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The control socket cannot be where the user wants it.
    #[error("--qmp unix:{}: {source}", path.display())]
    Control {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No usable /dev/kvm.
    #[error("/dev/kvm: {0}")]
    NoKvm(String),
    /// KVM is there but lacks something that we cannot do without.
    #[error("this host's KVM lacks {0}; a Linux host with kernel 4.20 or later has it")]
    KvmLacks(&'static str),
    /// A KVM call failed.
    #[error("KVM: cannot {what}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Its errno.
        source: kvm_ioctls::Error,
    },
    /// Guest RAM could not be mapped.
    #[error("cannot map {mib}M of guest memory: {reason}")]
    Memory {
        /// As asked, in MiB.
        mib: u64,
        /// Why.
        reason: String,
    },
    /// The host refused a resource.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The ACPI tables or the MPTable do not fit.
    #[error("cannot describe the machine to the guest: {0}")]
    Tables(#[from] arch::tables::Error),
    /// The address map contradicts itself.
    #[error("the machine's address map is wrong: {0}")]
    AddressMap(#[from] devices::bus::BusError),
    /// The VM stopped because the monitor failed.
    #[error("the VM was stopped: {0}")]
    Stopped(String),
}

impl Error {
    /// The user's arguments are at fault (exit status 2) rather than the host (exit status 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Open { .. }
            | Self::NotAFile { .. }
            | Self::Cmdline(_)
            | Self::BootFile { .. }
            | Self::Disk(_)
            | Self::DiskOptions { .. }
            | Self::TooManyDisks(_)
            | Self::TooMuchMemory { .. }
            | Self::TooManyCpus { .. }
            | Self::HugePageMemory(_)
            | Self::Processor { .. }
            | Self::Console { .. }
            | Self::Control { .. } => true,
            Self::NoKvm(_)
            | Self::KvmLacks(_)
            | Self::Kvm { .. }
            | Self::HugePages { .. }
            | Self::Memory { .. }
            | Self::Host { .. }
            | Self::Tables(_)
            | Self::AddressMap(_)
            | Self::Stopped(_) => false,
        }
    }

    /// For `map_err` on KVM calls.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// For `map_err` on the host's other calls.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

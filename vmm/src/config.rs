//! What the user asked for, validated as far as that is possible without the host.

use std::path::PathBuf;
use std::time::Duration;

use devices::block::BlockOptions;
use devices::disk::OpenOptions;

use crate::timing::BootTiming;

/// A whole machine. `cli` fills it in; [`crate::builder::build`] makes it real.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The kernel image: ELF vmlinux or bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The user's words for the kernel command line; they follow the defaults and win over them.
    pub cmdline: String,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Guest RAM is huge pages of the host's pool, all of them taken at the start.
    pub hugepages: bool,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The host's processor for each vCPU; empty: any.
    pub vcpu_affinity: Vec<usize>,
    /// The host's processors for the disks' threads; empty: any.
    pub io_affinity: Vec<usize>,
    /// Describe the machine by ACPI tables; otherwise by an MPTable and command line arguments.
    pub acpi: bool,
    /// The disks in order: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// Where the serial console is.
    pub console: ConsoleConfig,
    /// Where to listen for control clients (QMP): the path of a Unix socket.
    pub qmp: Option<PathBuf>,
    /// The guest starts when a control client says so.
    pub paused: bool,
    /// End the VM after this long.
    pub timeout: Option<Duration>,
    /// Open the debug-exit port: a byte that the guest writes there becomes the exit status.
    pub debug_exit: bool,
    /// The guest's reads of device registers exit to us, as on a KVM without read-only memory.
    pub trap_registers: bool,
    /// Where the time until the guest's first sign of life goes.
    pub timing: BootTiming,
}

impl VmConfig {
    /// The guest has a serial port. With `--console none` it has not, and loses no time on one.
    pub(crate) fn has_serial(&self) -> bool {
        self.console != ConsoleConfig::None
    }
}

/// One disk: how to open the image and how to show it to the guest.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// What control clients call the disk: `id=`, or the name that the guest gives it.
    pub id: String,
    /// The image.
    pub image: OpenOptions,
    /// The virtio-blk device in front of it.
    pub device: BlockOptions,
}

/// Where the serial console is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Our own standard input and output, with `Ctrl-A` as the escape key when that is a terminal.
    Stdio,
    /// Output only, into a file.
    File(PathBuf),
    /// A new pseudo-terminal; its name is printed.
    Pty,
    /// A Unix socket that we listen on: one client at a time.
    Unix(PathBuf),
    /// Nowhere: the guest has no serial port.
    None,
}

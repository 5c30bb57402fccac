//! What the user asked for, validated as far as that is possible without looking at the host. `cli` makes a [`VmConfig`] of the
//! arguments, and `builder` a machine of the [`VmConfig`].

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use devices::block::BlockOptions;
use devices::disk::OpenOptions;
use serde::{Deserialize, Serialize};

/// A whole machine. `cli` fills it in, defaults included; [`crate::builder::build`] makes it real, and checks it
/// against what the host has.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The kernel image: ELF vmlinux or bzImage. It stays open for as long as the VM exists, since a reset loads it
    /// again.
    pub kernel: PathBuf,
    /// The initial RAM disk. It is copied into guest memory as it is; the guest's kernel unpacks it.
    pub initrd: Option<PathBuf>,
    /// Appended to the default kernel command line; later words override earlier ones.
    pub cmdline: String,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Guest RAM is huge pages of the host's pool, all of them taken at the start.
    pub hugepages: bool,
    /// Number of vCPUs. The builder refuses more than KVM supports on this host, or than the layout of the guest has
    /// room for.
    pub cpus: u32,
    /// The host CPU of each vCPU, by index. Empty: any.
    pub vcpu_affinity: Vec<usize>,
    /// The host CPUs of the disks' threads. Empty: any.
    pub io_affinity: Vec<usize>,
    /// An idle vCPU stays in the guest: its HLT and PAUSE cause no exits.
    pub cpu_pm: bool,
    /// The guest is given ACPI tables; otherwise an MPTable and command line arguments.
    pub acpi: bool,
    /// Offer the CPU's virtualization (VMX or SVM) to the guest, for guests of its own.
    pub nested: bool,
    /// The disks in order: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// Which serial ports the guest has. Without the first one (`--console none`) its kernel loses no time on it.
    pub serial: [bool; 2],
    /// Where the serial ports are, ttyS0 first. The kernel's log goes to the first.
    pub consoles: [ConsoleConfig; 2],
    /// A shell command that the guest runs instead of its init, with its output on the second serial port.
    pub exec: Option<OsString>,
    /// Where to listen for control clients (QMP): the path of a Unix socket.
    pub qmp: Option<PathBuf>,
    /// Where to listen for a debugger.
    pub gdb: Option<GdbConfig>,
    /// The guest starts when a control client sends `cont`, or a debugger `continue`.
    pub paused: bool,
    /// End the VM after this long, counted from the start of `build`. Disks are drained and flushed, as for SIGTERM.
    pub timeout: Option<Duration>,
    /// Open the debug-exit port: a byte that the guest writes there becomes the exit status.
    pub debug_exit: bool,
    /// The guest's reads of device registers exit, as on a KVM without read-only memory slots.
    pub trap_registers: bool,
    /// Where the confined process may save the machine to.
    pub save_directory: Option<PathBuf>,
    /// A file for the machine as it is when the guest panics.
    pub dump_on_panic: Option<PathBuf>,
    /// How much the process confines itself.
    pub sandbox: SandboxMode,
    /// The confined process may start the child process of a background save.
    pub spawn: bool,
    /// User and group that the process becomes before the guest runs.
    pub user: Option<(u32, u32)>,
    /// How long to wait for vCPUs and disks to stand still, at a stop and at the end.
    pub stop_timeout: Duration,
}

/// How much the process confines itself before the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxMode {
    /// A forbidden system call ends the VM.
    #[default]
    On,
    /// Not at all.
    Off,
    /// A forbidden system call is made, and the host's kernel logs it.
    Log,
}

/// One disk: how to open the image and how to show it to the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskConfig {
    /// What control clients call the disk: `id=`, or the name that the guest gives it.
    pub id: String,
    /// The image.
    pub image: OpenOptions,
    /// The virtio-blk device in front of it.
    pub device: BlockOptions,
}

impl DiskConfig {
    /// The name that Linux gives the disk at place `index`: vda to vdz, then vdaa.
    pub fn linux_name(index: usize) -> String {
        let letter = |value: usize| char::from(b'a' + (value % 26) as u8);
        let first = (index / 26).checked_sub(1).map(letter);
        "vd".chars().chain(first).chain([letter(index)]).collect()
    }
}

/// Where a debugger connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbConfig {
    /// A Unix socket that only this user can open.
    Unix(PathBuf),
    /// A port of the loopback interface, which every user of the host can reach.
    Tcp(SocketAddr),
}

/// Where a serial port is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Our own standard input and output, with `Ctrl-A` as the escape key when that is a terminal.
    Stdio,
    /// Output only, to our standard error.
    Stderr,
    /// Output only, into a file, which takes no more than `max` bytes.
    File {
        /// The file.
        path: PathBuf,
        /// `None`: without a limit.
        max: Option<u64>,
    },
    /// A new pseudo-terminal; its name is printed.
    Pty,
    /// A Unix socket that we listen on: one client at a time.
    Unix(PathBuf),
    /// Nowhere: the guest does not have this serial port, and its kernel loses no time on it.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_the_names_that_linux_gives_them() {
        let names = [0, 25, 26, 51, 52, 63].map(DiskConfig::linux_name);
        assert_eq!(names, ["vda", "vdz", "vdaa", "vdaz", "vdba", "vdbl"]);
    }
}

//! The monitors that are compared, and how each is told to run one guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm_tests::polling::{self, Windows};

use crate::table::BEFORE;

/// A monitor with one way of doing disk I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Monitor {
    /// minivmm as it is.
    Minivmm,
    /// Another minivmm, at this path.
    Before(&'static str),
    /// QEMU's microvm with an I/O thread and this `aio=`.
    Microvm(&'static str),
}

/// What a monitor is to run.
pub(crate) struct Setup<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: Option<&'a Path>,
    /// Words after `console=ttyS0`.
    pub(crate) cmdline: &'a str,
    /// MiB.
    pub(crate) memory: u32,
    pub(crate) cpus: u32,
    pub(crate) disks: &'a [DiskSetup<'a>],
}

/// One of its disks.
pub(crate) struct DiskSetup<'a> {
    pub(crate) path: &'a Path,
    /// By which the guest finds it.
    pub(crate) serial: &'static str,
    pub(crate) read_only: bool,
    /// Past the host's page cache.
    pub(crate) direct: bool,
}

impl Monitor {
    /// Those that are installed here.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Minivmm];
        let before = std::env::var("MINIVMM_BEFORE").ok().filter(|path| !path.is_empty());
        all.extend(before.map(|path| Self::Before(path.leak())));
        if Command::new("qemu-system-x86_64").arg("--version").output().is_ok() {
            all.extend([Self::Microvm("io_uring"), Self::Microvm("threads")]);
        }
        all
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Minivmm => "minivmm".to_owned(),
            Self::Before(_) => BEFORE.to_owned(),
            Self::Microvm(aio) => format!("microvm {aio}"),
        }
    }

    pub(crate) fn binary(self) -> Option<PathBuf> {
        match self {
            Self::Minivmm => Some(minivmm_tests::binary()),
            Self::Before(path) => Some(path.into()),
            Self::Microvm(_) => std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|directory| directory.join("qemu-system-x86_64"))
                .find(|path| path.is_file()),
        }
    }

    pub(crate) fn windows(self) -> Windows {
        match self {
            Self::Minivmm | Self::Before(_) => polling::MINIVMM,
            Self::Microvm(_) => polling::MICROVM,
        }
    }

    /// The console on standard output.
    pub(crate) fn command(self, setup: &Setup<'_>) -> Command {
        match self {
            Self::Minivmm => minivmm(minivmm_tests::minivmm(["--kernel"]), setup),
            Self::Before(path) => {
                let mut command = Command::new(path);
                command.arg("--kernel");
                minivmm(command, setup)
            }
            Self::Microvm(aio) => microvm(setup, aio),
        }
    }
}

/// Goes on with a command line that ends with `--kernel`.
fn minivmm(mut command: Command, setup: &Setup<'_>) -> Command {
    command.arg(setup.kernel);
    command
        .arg("--memory")
        .arg(format!("{}M", setup.memory))
        .arg("--cpus")
        .arg(setup.cpus.to_string());
    command.arg("--cmdline").arg(setup.cmdline);
    if let Some(initrd) = setup.initrd {
        command.arg("--initrd").arg(initrd);
    }
    for disk in setup.disks {
        let mut option = format!("{},serial={}", disk.path.display(), disk.serial);
        option += if disk.read_only { ",readonly=on" } else { "" };
        option += if disk.direct { ",cache=none" } else { "" };
        command.arg("--disk").arg(option);
    }
    command
}

/// Without the devices that microvm can do without. qboot enters the kernel soonest. Without the second IOAPIC, which KVM does
/// not emulate: Debian's kernel loses the disks' interrupts there (QEMU 10.0).
const MACHINE: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,ioapic2=off";

fn microvm(setup: &Setup<'_>, aio: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        MACHINE,
        "-bios",
        "qboot.rom",
        "-accel",
        "kvm",
        "-cpu",
        // Without an MSR that software KVM does not let QEMU 7.2 set.
        "host,arch-capabilities=off",
        "-name",
        "bench,debug-threads=on",
    ]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.arg("-m").arg(setup.memory.to_string()).arg("-smp").arg(setup.cpus.to_string());
    command.args(["-global", "virtio-mmio.force-legacy=false", "-object", "iothread,id=t"]);
    command.arg("-kernel").arg(setup.kernel);
    if let Some(initrd) = setup.initrd {
        command.arg("-initrd").arg(initrd);
    }
    // Besides the console, what minivmm adds too: it keeps the kernel from looking for hardware that is not there.
    command
        .arg("-append")
        .arg(format!("console=ttyS0 8250.nr_uarts=1 pci=off panic=-1 {}", setup.cmdline));
    for disk in setup.disks {
        let DiskSetup { path, serial, .. } = disk;
        let cache = if disk.direct { "none" } else { "writeback" };
        let read_only = if disk.read_only { ",readonly=on" } else { "" };
        let path = path.display();
        command.arg("-drive").arg(format!(
            "id={serial},file={path},format=raw,if=none,aio={aio},cache={cache}{read_only}"
        ));
        let queues = setup.cpus;
        command.arg("-device").arg(format!(
            "virtio-blk-device,drive={serial},serial={serial},iothread=t,num-queues={queues}"
        ));
    }
    command
}

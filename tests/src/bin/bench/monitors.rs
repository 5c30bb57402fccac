//! The monitors that are compared, and how each is told to run one kernel on one disk.

use std::path::Path;
use std::process::Command;

use minivmm_tests::polling::{self, Windows};

/// A monitor with one way of doing disk I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Monitor {
    /// minivmm as it is.
    Minivmm,
    /// QEMU's microvm with an I/O thread and this `aio=`.
    Microvm(&'static str),
}

impl Monitor {
    /// Those that are installed here.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Minivmm];
        if Command::new("qemu-system-x86_64").arg("--version").output().is_ok() {
            all.extend([Self::Microvm("io_uring"), Self::Microvm("threads")]);
        }
        all
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Minivmm => "minivmm".to_owned(),
            Self::Microvm(aio) => format!("microvm {aio}"),
        }
    }

    pub(crate) fn windows(self) -> Windows {
        match self {
            Self::Minivmm => polling::MINIVMM,
            Self::Microvm(_) => polling::MICROVM,
        }
    }

    /// `memory` MiB of RAM, one CPU, the console on standard output.
    pub(crate) fn command(self, kernel: &Path, disk: &Path, memory: u32) -> Command {
        match self {
            Self::Minivmm => {
                let mut command = minivmm_tests::minivmm(["--memory", &format!("{memory}M")]);
                command.arg("--kernel").arg(kernel).arg("--disk").arg(disk);
                command
            }
            Self::Microvm(aio) => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args([
                    "-M",
                    "microvm,x-option-roms=off,pit=off,pic=off,rtc=off",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                ]);
                command.args(["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"]);
                command.args(["-m", &memory.to_string(), "-global", "virtio-mmio.force-legacy=false"]);
                command.args(["-object", "iothread,id=t", "-device", "virtio-blk-device,drive=d,iothread=t"]);
                command.arg("-drive").arg(format!("id=d,file={},format=raw,if=none,aio={aio}", disk.display()));
                command.arg("-kernel").arg(kernel);
                command
            }
        }
    }
}

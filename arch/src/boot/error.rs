//! What can be wrong with a kernel, an initrd or a command line: one line each that says what to do.

use std::io;

use vm_memory::GuestMemoryError;

use crate::{WriteError, cmdline};

/// What a user can give instead.
const GIVE: &str = "give an x86-64 Linux kernel: a bzImage (vmlinuz) or an ELF vmlinux";

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel file cannot be read.
    #[error("cannot read the kernel")]
    Read(#[source] io::Error),
    /// No bytes at all.
    #[error("the kernel file is empty; {GIVE}")]
    Empty,
    /// Its headers speak of bytes that the file does not have.
    #[error(
        "the kernel file is truncated: its {what} ends at byte {end}, and the file has {size} bytes; copy it again"
    )]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Where it ends by the headers.
        end: u64,
        /// Where the file ends.
        size: u64,
    },
    /// Neither an ELF file nor a bzImage.
    #[error("this is not a kernel that can be booted, but {looks_like}; {GIVE}")]
    NotAKernel {
        /// What it looks like.
        looks_like: &'static str,
    },
    /// A 32-bit ELF file.
    #[error("this is a 32-bit ELF file; {GIVE}")]
    Elf32,
    /// An ELF file for another processor.
    #[error("this ELF file is for {machine}, and this machine is x86-64; {GIVE}")]
    ElfMachine {
        /// The processor's name, or its ELF number.
        machine: String,
    },
    /// An ELF file that is something else than a kernel.
    #[error("this ELF file is {kind}, not a kernel; {GIVE}")]
    ElfKind {
        /// What it is.
        kind: &'static str,
    },
    /// Headers that contradict themselves.
    #[error("the kernel's {format} headers are damaged ({what}); copy it again")]
    Damaged {
        /// ELF or bzImage.
        format: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A bzImage that only has a 32-bit entry.
    #[error("this bzImage has no 64-bit entry point ({why}); give one built with CONFIG_64BIT, of Linux 3.8 or later")]
    No64BitEntry {
        /// How that shows.
        why: String,
    },
    /// It would overwrite the structures that it starts from.
    #[error(
        "the kernel wants to be loaded at {address:#x}, below 1 MiB, where its start structures lie; link it higher"
    )]
    TooLow {
        /// Where it wants to be.
        address: u64,
    },
    /// Not enough RAM.
    #[error("the kernel alone needs {} of memory, and the guest has {}; give it more", Mib(*.needed), Mib(*.ram_end))]
    DoesNotFit {
        /// Address up to which it needs RAM.
        needed: u64,
        /// Address up to which there is RAM below the hole.
        ram_end: u64,
    },
    /// It wants to lie in the hole, or above 4 GiB.
    #[error("the kernel needs memory up to {needed:#x}, and guest RAM below 4 GiB ends at {end:#x}; link it lower", end = crate::layout::HOLE_START.0)]
    NeverFits {
        /// Address up to which it needs RAM.
        needed: u64,
    },
    /// The copy failed on an image that passed all checks: the file changed, or could not be read.
    #[error("cannot copy the kernel into guest memory; check that nobody is writing the file")]
    CopyKernel {
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host refuses to map the kernel's pages, or copies of them.
    #[error("cannot map the kernel into guest memory: {0}")]
    MapKernel(#[source] io::Error),
    /// The initrd cannot be read.
    #[error("cannot read the initrd")]
    ReadInitrd(#[source] io::Error),
    /// No bytes at all.
    #[error("the initrd is empty; give a cpio archive, or none")]
    EmptyInitrd,
    /// Not enough RAM above the kernel.
    #[error("the initrd of {} does not fit: the kernel leaves {}; give the guest {} of memory or more", Mib(*.size), Mib(*.room), Mib(*.needed))]
    InitrdDoesNotFit {
        /// Its bytes.
        size: u64,
        /// Bytes there are.
        room: u64,
        /// RAM with which it would fit.
        needed: u64,
    },
    /// More than the kernel can reach, whatever the guest's memory.
    #[error("the initrd of {} is too large: this kernel can take {} at most; make it smaller", Mib(*.size), Mib(*.room))]
    InitrdNeverFits {
        /// Its bytes.
        size: u64,
        /// Bytes that would do.
        room: u64,
    },
    /// The initrd changed while it was read.
    #[error("cannot copy the initrd into guest memory; check that nobody is writing the file")]
    CopyInitrd {
        /// The reason.
        #[source]
        source: GuestMemoryError,
    },
    /// The command line does not suit the kernel.
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
    /// Guest memory is too small even for the start structures.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Bytes as the `--memory` option takes them: whole mebibytes, rounded up.
struct Mib(u64);

impl std::fmt::Display for Mib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}M", self.0.div_ceil(1 << 20))
    }
}

//! What can be wrong with a kernel, an initrd or a command line.
//!
//! Each message is one line: what the file is or lacks, and what to give instead. `vmm` puts the option and the path before it. A cause
//! is the error's `source`.

use std::fmt;
use std::io;

use crate::cmdline;

const GIVE: &str = "give an x86-64 Linux kernel: a bzImage (vmlinuz) or an ELF vmlinux";

/// Why a kernel cannot be booted, or an initrd or a command line not be passed to it. Addresses and sizes count bytes; an
/// `end` or a `needed` is the first byte behind.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name the variants and their fields")]
#[non_exhaustive]
pub enum Error {
    #[error("cannot read the kernel")]
    Read(#[source] io::Error),
    #[error("the kernel file is empty; {GIVE}")]
    Empty,
    #[error(
        "the kernel file is truncated: its {what} ends at byte {end}, and the file has {size} bytes; copy it again"
    )]
    Truncated { what: &'static str, end: u64, size: u64 },
    #[error("this is not a kernel that can be booted, but {looks_like}; {GIVE}")]
    NotAKernel { looks_like: &'static str },
    #[error("this is a 32-bit ELF file; {GIVE}")]
    Elf32,
    #[error("this ELF file is for {machine}, and this machine is x86-64; {GIVE}")]
    ElfMachine { machine: String },
    #[error("this ELF file is {kind}, not a kernel; {GIVE}")]
    ElfKind { kind: &'static str },
    #[error("the kernel's {format} headers are damaged ({what}); copy it again")]
    Damaged { format: &'static str, what: String },
    #[error(
        "this bzImage has no 64-bit entry point ({why}); give one built with CONFIG_64BIT, of Linux 3.8 or later"
    )]
    No64BitEntry { why: String },
    #[error(
        "the kernel wants to be loaded at {address:#x}, below 1 MiB, where its start structures lie; link it higher"
    )]
    TooLow { address: u64 },
    #[error("the kernel alone needs {} of memory, and the guest has {}; give it more", Mib(*.needed), Mib(*.ram_end))]
    DoesNotFit { needed: u64, ram_end: u64 },
    #[error("the kernel needs memory up to {needed:#x}, and guest RAM below 4 GiB ends at {end:#x}; link it lower", end = crate::layout::HOLE_START.0)]
    NeverFits { needed: u64 },
    #[error("the initrd is empty; give a cpio archive, or none")]
    EmptyInitrd,
    #[error("the initrd of {} does not fit: the kernel leaves {}; give the guest {} of memory or more", Mib(*.size), Mib(*.room), Mib(*.needed))]
    InitrdDoesNotFit { size: u64, room: u64, needed: u64 },
    #[error("the initrd of {} is too large: this kernel can take {} at most; make it smaller", Mib(*.size), Mib(*.room))]
    InitrdNeverFits { size: u64, room: u64 },
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
}

/// Bytes as the `--memory` option takes them: whole mebibytes, rounded up.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0.div_ceil(1 << 20))
    }
}

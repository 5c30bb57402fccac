//! Images made by hand, byte by byte: what boots, where it goes, and what is said of each unsuitable file.

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::*;
use bzimage::bzimage;
use elf::{LOAD, Part, code, elf, note, notes, pvh_note};

mod bzimage;
mod elf;
mod fuzz;

use crate::machine_layout::MachineSpec;

const MIB: u64 = 1 << 20;

impl ReadAt for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let rest = self.get(offset as usize..).unwrap_or_default();
        Ok(rest[..rest.len().min(length)].to_vec())
    }
}

fn parse(bytes: Vec<u8>) -> Kernel {
    Kernel::parse(&bytes).unwrap()
}

fn machine(memory: u64) -> MachineLayout {
    MachineLayout::new(MachineSpec { memory, cpus: 1, serial: [true, false], acpi: true, disks: 1 })
}

fn planned(kernel: &Kernel, memory: u64, initrd: Option<u64>) -> Plan {
    plan(&machine(memory), kernel, initrd, "console=ttyS0").unwrap()
}

fn range(offset: u64, address: u64, length: u64) -> FileRange {
    FileRange { offset, address: GuestAddress(address), length }
}

/// The structure at `address`, from its first `T` on.
fn read<T: ByteValued>(plan: &Plan, address: GuestAddress) -> T {
    let found = plan.structures.iter().find(|structure| structure.address == address).unwrap();
    let mut value = T::zeroed();
    value.as_mut_slice().copy_from_slice(&found.bytes[..size_of::<T>()]);
    value
}

fn patched(mut bytes: Vec<u8>, offset: usize, with: &[u8]) -> Vec<u8> {
    bytes[offset..offset + with.len()].copy_from_slice(with);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    Kernel::parse(&bytes.to_vec()).unwrap_err().to_string()
}

// ---- Neither ----

#[test]
fn other_files_are_named_by_what_they_look_like() {
    let at = |offset: usize, bytes: &[u8]| patched(vec![1; 0x2000], offset, bytes);
    let table: &[(Vec<u8>, &str)] = &[
        (vec![], "the kernel file is empty"),
        (at(0, &[0x1f, 0x8b, 8]), "a gzip file (unpack it first)"),
        (at(0, b"\xfd7zXZ\0"), "an xz file"),
        (at(0, &[0x28, 0xb5, 0x2f, 0xfd]), "a zstd file"),
        (patched(at(0, b"MZ"), 56, b"ARM\x64"), "an aarch64 kernel Image"),
        (patched(at(0, b"MZ"), 56, b"RSC\x05"), "a RISC-V kernel Image"),
        (at(0, b"MZ"), "an EFI or Windows program"),
        (at(0, b"070701"), "a cpio archive"),
        (at(0, b"QFI\xfb"), "a qcow2 disk image"),
        (at(510, &[0x55, 0xaa]), "a disk image with a boot sector"),
        (at(0x438, &[0x53, 0xef]), "an ext2, ext3 or ext4 file system"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"hello, world\n".to_vec(), "a text file"),
        (vec![0; 4096], "a file of zeros"),
        (vec![0x80, 0x81], "a file of unknown format"),
    ];
    for (bytes, expected) in table {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

// ---- What does not fit ----

#[test]
fn what_does_not_fit_is_told_with_what_would_do() {
    let elf_at = |end: u64| elf(&[Part(LOAD, 2 * MIB, vec![0x90; 0x20], end - 2 * MIB)]);
    /// Name, image, the guest's mebibytes, the initrd's bytes, what is said.
    type Case<'a> = (&'a str, Vec<u8>, u64, Option<u64>, &'a str);
    let table: &[Case<'_>] = &[
        (
            "ELF",
            elf_at(40 * MIB),
            32,
            None,
            "the kernel alone needs 40M of memory, and the guest has 32M",
        ),
        (
            "ELF in the hole",
            elf_at((3 << 30) + 1),
            5 << 10,
            None,
            "needs memory up to 0xc0000001, and guest RAM",
        ),
        (
            "bzImage",
            bzimage(),
            20,
            None,
            "the kernel alone needs 24M of memory, and the guest has 20M",
        ),
        (
            "initrd",
            bzimage(),
            25,
            Some(16 << 20),
            "the initrd of 16M does not fit: the kernel leaves 15M; give the guest 41M",
        ),
        (
            "initrd above the limit",
            patched(bzimage(), 0x22c, &(25 * MIB as u32 - 1).to_le_bytes()),
            64,
            Some(16 << 20),
            "the initrd of 16M is too large: this kernel can take 15M",
        ),
        ("empty initrd", bzimage(), 32, Some(0), "the initrd is empty"),
        (
            "next to nothing",
            elf_at(3 * MIB),
            1,
            None,
            "the kernel alone needs 3M of memory, and the guest has 1M",
        ),
    ];
    for (name, bytes, mib, initrd, expected) in table {
        let kernel = parse(bytes.clone());
        let message = plan(&machine(mib * MIB), &kernel, *initrd, "").unwrap_err().to_string();
        assert!(message.contains(expected), "{name}: {message}");
    }
}

#[test]
fn the_kernel_bounds_its_command_line() {
    let planned = |kernel: &Kernel, cmdline: &str| plan(&machine(32 * MIB), kernel, None, cmdline);
    let short = patched(bzimage(), 0x238, &9u32.to_le_bytes());
    let endless = patched(bzimage(), 0x238, &u32::MAX.to_le_bytes());
    for (bytes, limit) in [(short, 9), (endless, 0xffff), (elf(&[code()]), 2047)] {
        let kernel = parse(bytes);
        assert_eq!(kernel.cmdline_limit, limit);
        planned(&kernel, &"x".repeat(limit)).unwrap();
        let error = planned(&kernel, &"x".repeat(limit + 1)).unwrap_err();
        let expected = format!("has {} bytes, and this kernel takes at most {limit}", limit + 1);
        assert!(error.to_string().contains(&expected), "{error}");
    }
    let error = planned(&parse(elf(&[code()])), "a\nb").unwrap_err();
    assert!(error.to_string().contains("byte 0x0a at position 1"), "{error}");
}

// ---- Made to hurt ----

/// An image with any content boots or is refused: never a panic, a place outside RAM, or a plan that takes longer to apply
/// than RAM is large.
#[test]
fn mutated_images_never_hurt() {
    let images =
        [elf(&[code(), notes([note(1, b"Linux\0", b"abc", 4), pvh_note()].concat())]), bzimage()];
    // The parts that are parsed: ELF headers and notes, the setup header.
    let targets =
        [[0..64 + 2 * 56, 64 + 2 * 56 + 0x1234..images[0].len()], [0x1f1..0x26c, 0..0x40]];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |bound: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % bound as u64) as usize
    };
    let mut booted = 0;
    for round in 0..600 {
        let which = round % 2;
        let mut bytes = images[which].clone();
        for _ in 0..1 + next(3) {
            let target = targets[which][usize::from(next(4) == 0)].clone();
            let place = target.start + next(target.len());
            match next(4) {
                0 => bytes[place] = next(256) as u8,
                1 => bytes[place] ^= 1 << next(8),
                2 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][next(5)],
                _ => (place..(place + 8).min(target.end)).for_each(|at| bytes[at] = 0xff),
            }
        }
        if next(8) == 0 {
            bytes.truncate(next(bytes.len()));
        }
        let plan =
            Kernel::parse(&bytes).and_then(|kernel| plan(&machine(32 * MIB), &kernel, None, ""));
        if let Ok(plan) = plan {
            booted += 1;
            let mut end = MIB;
            for FileRange { offset, address, length } in plan.kernel {
                assert!(address.0 >= end && offset + length <= bytes.len() as u64);
                end = address.0 + length;
            }
            assert!(end <= 32 * MIB);
        }
    }
    // Both ways out were taken.
    assert!((100..500).contains(&booted), "{booted}");
}

/// A file may become shorter while it is parsed, or the host may fail to read it: an error with its cause, not a panic.
#[test]
fn a_kernel_that_cannot_be_read_whole_is_an_error() {
    struct Shrinking(Vec<u8>);
    impl ReadAt for Shrinking {
        fn size(&self) -> io::Result<u64> {
            Ok(1 << 20)
        }
        fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
            self.0.read_at(offset, length)
        }
    }
    let kernel = patched(elf(&[code()]), 32, &0x8_0000u64.to_le_bytes());
    let error = Kernel::parse(&Shrinking(kernel)).unwrap_err().to_string();
    assert!(
        error.contains("program header table ends at byte 524344, and the file has 524288"),
        "{error}"
    );

    struct Unreadable;
    impl ReadAt for Unreadable {
        fn size(&self) -> io::Result<u64> {
            Ok(0)
        }
        fn read_at(&self, _: u64, _: usize) -> io::Result<Vec<u8>> {
            Err(io::Error::from_raw_os_error(5))
        }
    }
    let error = Kernel::parse(&Unreadable).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "Input/output error (os error 5)");
}

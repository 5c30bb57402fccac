//! What each boot protocol hands to the guest: the command line, the RSDP, the initrd.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{DISK_SECTORS, Program, SUCCESS};
use minivmm_tests::host_disk::HostDisk;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, minivmm, skip, small_guest, unexpected_lines};
use tempfile::tempdir;

#[test]
fn every_protocol_hands_over_the_same() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let write =
        |name: &str, content: &[u8]| fs::write(directory.path().join(name), content).unwrap();
    write("pvh", &image::pvh(Program::BootPvh));
    write("linux64", &image::linux64(Program::BootLinux64));
    write("bzimage", &image::bzimage(Program::BootLinux64));
    // A cpio archive at first sight, of an odd length, more than a page, and with an end to recognize.
    let initrd = format!("070701{}the end", "0123456789abcdef".repeat(300));
    write("initrd", initrd.as_bytes());
    sparse(&directory.path().join("disk.img"), 1 << 20);

    // (options, what the command line has to have, the RSDP, the initrd)
    let table: &[(&str, &[&str], &str, &str)] = &[
        ("", &["console=ttyS0"], "RSD PTR ", ""),
        ("--initrd initrd", &[], "RSD PTR ", &initrd),
        ("--acpi off", &["console=ttyS0"], "-", ""),
        ("--disk disk.img", &["root=/dev/vda rw"], "RSD PTR ", ""),
        ("--disk disk.img --cmdline root=/dev/vdb", &["root=/dev/vdb"], "RSD PTR ", ""),
        (
            "--disk disk.img --acpi off",
            &["virtio_mmio.device=4K@0xd0000000:", "root=/dev/vda"],
            "-",
            "",
        ),
        ("--cmdline quiet --cmdline foo.bar=1", &["quiet foo.bar=1\n"], "RSD PTR ", ""),
        ("--memory 5G --cpus 8 --initrd initrd", &[], "RSD PTR ", &initrd),
        ("--memory 16M", &[], "RSD PTR ", ""),
    ];
    for kernel in ["pvh", "linux64", "bzimage"] {
        for (options, words, rsdp, initrd) in table {
            if kernel == "bzimage" && *options == "--memory 16M" {
                continue; // it wants to be at 16 MiB
            }
            let mut command = minivmm(["--kernel", kernel]);
            command.args(options.split_whitespace()).current_dir(directory.path());
            let ended = Session::start(&mut command).wait(BOUND).must_be(0);
            let output = String::from_utf8_lossy(&ended.output);
            let (cmdline, rest) = output.split_at(output.find('\n').expect("a line") + 1);
            for word in *words {
                assert!(cmdline.contains(word), "{kernel} {options}: no {word:?} in {cmdline}");
            }
            assert_eq!(
                cmdline.matches("root=").count(),
                usize::from(options.contains("--disk")),
                "{cmdline}"
            );
            assert_eq!(rest, format!("{rsdp}\n{initrd}\n"), "{kernel} {options}");
            assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
        }
    }
}

/// What people want to know first when a guest does not start, or a disk is slow.
#[test]
fn verbose_names_kernel_memory_disks_and_what_the_driver_took() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), DISK_SECTORS * 512);
    fs::write(directory.path().join("initrd"), "no archive").unwrap();
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    command.args(["-v", "--debug-exit", "--cpus", "2", "--initrd", "initrd"]);
    let ended = Session::start(command.args(["--disk", "disk.img,cache=none,aio=threads"]));
    let ended = ended.wait(BOUND).must_be(SUCCESS);
    for line in [
        " bytes, boot protocol Pvh\n",
        "minivmm: initrd initrd: 10 bytes\n",
        "minivmm: warning: --initrd initrd: neither a cpio archive nor a compressed one; Linux will not unpack it\n",
        "minivmm: memory: 32 MiB, vCPUs: 2\n",
        "minivmm: disk vda: disk.img, 32768 bytes, raw, threads, cache=none\n",
        "minivmm: disk vda: its driver took FLUSH VERSION_1\n",
    ] {
        assert!(ended.errors.contains(line), "does not say {line:?}: {ended}");
    }
}

/// As a stock kernel without its drivers does on its root file system.
#[test]
fn a_panic_without_a_driver_says_which_ones_the_kernel_needs() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    for (disks, says) in [(&[][..], false), (&["--disk", "disk.img"], true)] {
        let mut command = small_guest(directory.path(), Program::Panic);
        let ended = Session::start(command.args(disks)).wait(BOUND).must_be(3);
        let line = "no driver in the guest has started vda: the kernel needs virtio_mmio and virtio_blk built in";
        assert_eq!(ended.errors.contains(line), says, "{ended}");
    }
}

/// One report when the guest is entered, one when it prints; both say what the time since exec adds up to.
#[test]
fn boot_timing_names_every_phase() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let ended = Session::start(
        small_guest(directory.path(), Program::Chatter).args(["--debug-exit", "--boot-timing"]),
    );
    let ended = ended.wait(BOUND).must_be(SUCCESS);
    let phases = ended
        .errors
        .lines()
        .filter_map(|line| line.strip_prefix("minivmm: boot: ")?.split_once("  "));
    let (names, times): (Vec<_>, Vec<_>) = phases.unzip();
    let until_entry = [
        "exec to main",
        "arguments",
        "files opened",
        "VM and memory",
        "kernel loaded",
        "devices",
        "vCPUs",
    ];
    let rest = ["first KVM_RUN", "since exec", "first console byte", "since exec"];
    assert_eq!(names, [&until_entry[..], &rest].concat(), "{ended}");
    let wall = |at: usize| times[at].split_once(" ms,").unwrap().0.trim().parse::<f64>().unwrap();
    let sum: f64 = (0..8).map(wall).sum();
    assert!((sum - wall(8)).abs() < 0.1 && wall(10) >= wall(8), "{ended}");
}

/// A guest whose kernel has whole pages, which can be mapped.
fn guest_with_pages(directory: &Path, program: Program) -> Command {
    let command = small_guest(directory, program);
    let (mut kernel, size) = (image::pvh(program), 0x8000_usize);
    kernel.resize(0x1000 + size, 0);
    for field in [image::P_FILESZ, image::P_MEMSZ] {
        kernel[image::ELF_LOAD + field..][..8].copy_from_slice(&size.to_le_bytes());
    }
    fs::write(directory.join("guest.elf"), kernel).unwrap();
    command
}

/// A program that rewrites the kernel's file in place changes nothing for the guest, and neither waits for the other.
#[test]
fn a_guest_outlives_its_kernel_file() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for program in [Program::Echo, Program::EarlyEcho] {
        let mut command = guest_with_pages(directory.path(), program);
        let mut session = Session::start(command.arg("--debug-exit"));
        session.expect(if program == Program::Echo { "ready\n" } else { "early\n" }, BOUND);
        let file =
            fs::File::options().write(true).open(directory.path().join("guest.elf")).unwrap();
        file.set_len(0).unwrap();
        session.send("still there\x04");
        session.expect("still there", BOUND);
        session.wait(BOUND).must_be(SUCCESS);
    }
}

/// Before the host takes the lease away (45 s), the VM lets the writer go on, or ends; if it might not, nothing is mapped.
#[test]
fn a_lease_on_the_kernel_is_given_up_in_time() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let kernel = directory.path().join("guest.elf");
    let is_mapped = |timeout: &str| {
        let mut command = guest_with_pages(directory.path(), Program::Echo);
        let session = Session::start(command.args(["--stop-timeout", timeout, "--sandbox", "off"]));
        session.expect("ready\n", BOUND);
        let maps = fs::read_to_string(format!("/proc/{}/maps", session.id())).unwrap();
        maps.contains("guest.elf")
    };
    if !is_mapped("1s") {
        return skip("kernels are copied here: no leases on this file system, or a nested host");
    }
    assert!(!is_mapped("24h"));
    let Some(disk) = HostDisk::mount(8 << 20) else {
        return skip("no FUSE file system can be mounted here");
    };
    let mut command = guest_with_pages(directory.path(), Program::DiskLoad);
    let mut option = disk.path().into_os_string();
    option.push(",id=slow,aio=threads");
    let session = Session::start(command.args(["--stop-timeout", "1s", "--disk"]).arg(option));
    session.output.expect_bytes(3, BOUND).unwrap();
    disk.hang();
    disk.wait_until_held();
    // Waits for the lease.
    fs::File::options().write(true).open(&kernel).unwrap().set_len(0).unwrap();
    disk.serve();
    let ended = session.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("disk slow"), "{ended}");
}

//! What each boot protocol hands to the guest: the command line, the RSDP, the initrd.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{DISK_SECTORS, Program, SUCCESS};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, minivmm, small_guest, unexpected_lines};
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

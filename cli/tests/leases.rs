//! A kernel's file that is mapped under a lease, and another program that writes to it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::guest::{Program, SUCCESS};
use minivmm_tests::host_disk::HostDisk;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, skip, small_guest};
use tempfile::tempdir;

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

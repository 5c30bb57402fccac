//! A kernel's file that is mapped under a lease, and another program that writes to it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use minivmm_tests::guest::{Program, SUCCESS};
use minivmm_tests::host_disk::HostDisk;
use minivmm_tests::refusal::{Call, refuse};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, skip, small_guest};
use rustix::process::{Pid, Resource, Rlimit, geteuid, prlimit};
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
    let with_timeout = |timeout: &str| {
        let mut command = guest_with_pages(directory.path(), Program::Echo);
        Session::start(command.args(["--stop-timeout", timeout, "--sandbox", "off"]))
    };
    if !is_mapped(&with_timeout("1s")) {
        return skip(COPIED);
    }
    assert!(!is_mapped(&with_timeout("24h")));
    let Some(disk) = HostDisk::mount(8 << 20) else { return };
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

/// Whether the guest has pages of its kernel's file.
fn is_mapped(session: &Session) -> bool {
    session.expect("ready\n", BOUND);
    let maps = fs::read_to_string(format!("/proc/{}/maps", session.id())).unwrap();
    maps.contains("guest.elf")
}

const COPIED: &str = "kernels are copied here: no leases on this file system, or a nested host";

/// Rewrites the kernel's file. The guest goes on, and the writer does not wait until the host takes the lease away.
fn rewrite_kernel(mut session: Session, directory: &Path) {
    let limit = fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap();
    let limit = Duration::from_secs(limit.trim().parse().unwrap());
    let began = Instant::now();
    let file = fs::File::options().write(true).open(directory.join("guest.elf")).unwrap();
    let waited = began.elapsed();
    assert!(waited < limit, "the host took the lease away after {waited:?}");
    file.set_len(0).unwrap();
    session.send("still there\x04");
    session.expect("still there", BOUND);
    session.wait(BOUND).must_be(SUCCESS);
}

/// The copy needs no file, no descriptor and no system call that may be refused only then.
#[test]
fn limits_and_filters_do_not_keep_the_pages_from_being_copied() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let memfd = Call { number: libc::SYS_memfd_create as u32, request: None };
    // In units of 512 bytes: less than the kernel has.
    for (shell, refused) in [("ulimit -f 1", None), (":", Some(memfd)), (":", None)] {
        let vm = guest_with_pages(directory.path(), Program::Echo);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{shell}; exec \"$@\""), "sh"]).arg(vm.get_program());
        command.args(vm.get_args()).arg("--debug-exit").current_dir(directory.path());
        if let Some(call) = refused {
            refuse(&mut command, call, libc::ENOSYS);
        }
        let session = Session::start(&mut command);
        if !is_mapped(&session) {
            return skip(COPIED);
        }
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        let process = Pid::from_raw(i32::try_from(session.id()).unwrap());
        prlimit(process, Resource::Nofile, none).unwrap();
        rewrite_kernel(session, directory.path());
    }
}

/// What could not take a pipe for the copy maps nothing.
#[test]
fn a_kernel_is_copied_if_its_pages_could_not_be_copied_later() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = guest_with_pages(directory.path(), Program::Echo);
    let pipe = Call { number: libc::SYS_pipe2 as u32, request: None };
    let session = Session::start(refuse(command.arg("--debug-exit"), pipe, libc::EMFILE));
    assert!(!is_mapped(&session));
    rewrite_kernel(session, directory.path());
}

/// A confined process has no CAP_LEASE, and with `--user` it is not the file's owner either.
#[test]
fn a_lease_on_another_users_file_is_given_up_in_time() {
    if !kvm_is_usable() {
        return;
    }
    if !geteuid().is_root() {
        return skip("only root has leases on the files of others");
    }
    let directory = tempdir().unwrap();
    for (owner, options) in [(1234, &[][..]), (0, &["--user", "1234:2345"])] {
        let mut command = guest_with_pages(directory.path(), Program::Echo);
        chown(directory.path().join("guest.elf"), Some(owner), None).unwrap();
        let session = Session::start(command.arg("--debug-exit").args(options));
        if !is_mapped(&session) {
            return skip(COPIED);
        }
        rewrite_kernel(session, directory.path());
    }
}

/// As in a container without root: the host's kernel sends no signal from one user of a namespace to another.
#[test]
fn a_lease_is_given_up_in_time_in_a_user_namespace() {
    if !kvm_is_usable() {
        return;
    }
    let mut holder = Session::start(Command::new("unshare").args(["-U", "cat"]));
    holder.send("made\n");
    if holder.output.expect("made\n", BOUND).is_err() {
        return skip("no user namespaces here");
    }
    for map in ["uid_map", "gid_map"] {
        let map = format!("/proc/{}/{map}", holder.id());
        if fs::write(map, "0 100000 65536").is_err() {
            return skip("only root maps several users into a namespace");
        }
    }
    let directory = tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(directory.path().join("dev")).unwrap();
    // The namespace's users may use a copy of /dev/kvm, and of the program.
    let shell = "mount -t tmpfs tmpfs dev && cp -a /dev/kvm dev && chmod 666 dev/kvm &&
        mount --bind dev/kvm /dev/kvm && exec nsenter -U -t \"$0\" \"$@\"";
    let inside = |program: &Path| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", shell, &holder.id().to_string()]).arg(program);
        command.current_dir(directory.path());
        command
    };
    if !inside(Path::new("true")).status().is_ok_and(|status| status.success()) {
        return skip("no device can be made here");
    }
    for options in [&[][..], &["--user", "1000:1000"]] {
        let vm = guest_with_pages(directory.path(), Program::Echo);
        chown(directory.path().join("guest.elf"), Some(100_000), Some(100_000)).unwrap();
        let program = directory.path().join("minivmm");
        fs::copy(vm.get_program(), &program).unwrap();
        let mut command = inside(&program);
        let session = Session::start(command.args(vm.get_args()).arg("--debug-exit").args(options));
        if !is_mapped(&session) {
            return skip(COPIED);
        }
        rewrite_kernel(session, directory.path());
    }
}

//! Debian's gdb on a Linux guest with two vCPUs: the commands of the chapter `vmm/docs/step-through-a-boot.md`.

use std::fs;
use std::path::Path;

use minivmm_tests::gdb::{chapter, gdb, in_start_kernel, small_kernel};
use minivmm_tests::linux::{BOOT_BOUND, SMALL, artefact, cpio};
use minivmm_tests::session::Session;
use minivmm_tests::{minivmm, skip};
use tempfile::tempdir;

/// Says that it is up, and powers off after the next line that is typed.
const INIT: &str = "#!/bin/sh
mount -t devtmpfs none /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo \"up with $(nproc) CPUs\"
read line
echo \"got $line\"
poweroff -f
";

fn start(directory: &Path, kernel: &Path, options: &[&str]) -> Session {
    let mut initrd = fs::read(artefact(SMALL.initrd)).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend_from_slice(&cpio("init", INIT.as_bytes()));
    fs::write(directory.join("initrd"), initrd).unwrap();
    let mut command = minivmm(["--cpus", "2", "--initrd", "initrd", "--cmdline", "nokaslr"]);
    command.args(["--gdb", "unix:debugger.sock", "--kernel"]).arg(kernel).args(options);
    Session::start(command.current_dir(directory))
}

/// The guest is up, takes a line, and powers off.
fn finish(mut session: Session) {
    session.send("hello\n");
    session.expect("got hello", BOOT_BOUND);
    session.wait(BOOT_BOUND).must_be(0);
}

#[test]
fn a_boot_is_stepped_through_and_goes_on_to_its_end() {
    if std::env::var_os("MINIVMM_LAB").is_some() {
        return skip("QEMU's emulated SVM knows neither debug registers nor INT3 of nested guests");
    }
    let Some([kernel, symbols]) = small_kernel() else { return };
    let directory = tempdir().unwrap();
    let session = start(directory.path(), &kernel, &["--paused"]);
    let [block, _] = chapter();
    let commands = block.into_iter().chain(["detach"]);
    let Some(text) = gdb(directory.path(), Some(&symbols), commands, BOOT_BOUND) else { return };
    in_start_kernel(&text);
    session.expect("up with 2 CPUs", BOOT_BOUND);
    finish(session);
}

#[test]
fn a_running_guest_is_looked_at_again_and_again() {
    let Some([kernel, symbols]) = small_kernel() else { return };
    let directory = tempdir().unwrap();
    let session = start(directory.path(), &kernel, &[]);
    session.expect("up with 2 CPUs", BOOT_BOUND);
    let [_, block] = chapter();
    // Once stopped and left alone, then with the end that the chapter has.
    let (_, before) = block.split_last().unwrap();
    let steps = before.iter().copied().chain([
        "x/s *(char**)&saved_command_line",
        "print (long)jiffies_64",
        "disconnect",
    ]);
    let Some(text) = gdb(directory.path(), Some(&symbols), steps, BOOT_BOUND) else { return };
    for line in ["Thread 1.1", "Thread 1.2", "nokaslr", "rip            0xffffffff"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    session.expect_error("the guest stays stopped until one connects again", BOOT_BOUND);
    let again = gdb(directory.path(), Some(&symbols), block, BOOT_BOUND).unwrap();
    assert!(again.contains("[Inferior 1 (process 1) detached]"), "{again}");
    finish(session);
}

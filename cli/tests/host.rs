//! Hosts that lack something: one line with the fix, exit status 1.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::process::Command;

use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, small_guest};
use tempfile::tempdir;

/// Whether the means to hide a file from a process are there; says why not.
fn can_hide_devices() -> bool {
    let probe = Command::new("unshare").args(["-rm", "mount", "--bind", "/dev/null", "/dev/kvm"]).output();
    match probe {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            println!("skipped: no mount namespace here: {}", String::from_utf8_lossy(&output.stderr).trim());
            false
        }
        Err(error) => {
            println!("skipped: unshare(1): {error}");
            false
        }
    }
}

#[test]
fn no_usable_kvm() {
    if !kvm_is_usable() || !can_hide_devices() {
        return;
    }
    let directory = tempdir().unwrap();
    // Root in the namespace may do everything but what its last command gives up.
    let table = [
        ("mount -t tmpfs none /dev && exec \"$@\"", &["/dev/kvm", "does not exist", "kvm_intel", "lab"][..]),
        (
            ": >forbidden && chmod 000 forbidden && mount --bind forbidden /dev/kvm && \
             exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"",
            &["/dev/kvm", "permission denied", "group kvm"],
        ),
        ("mount --bind /dev/null /dev/kvm && exec \"$@\"", &["/dev/kvm", "cannot be opened as a KVM device"]),
    ];
    for (hide, says) in table {
        let vm = small_guest(directory.path(), Program::PowerOff);
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", hide, "sh"]).arg(vm.get_program()).args(vm.get_args());
        command.args(["--console", "file:log"]).current_dir(directory.path());
        let ended = Session::start(&mut command).wait(BOUND).must_be(1);
        let lines: Vec<_> = ended.errors.lines().collect();
        assert_eq!(lines.len(), 1, "{ended}");
        for text in says {
            assert!(lines[0].contains(text), "does not say {text:?}: {}", lines[0]);
        }
        assert!(!directory.path().join("log").exists(), "the console's file was created all the same");
    }
}

/// A KVM without hardware support runs small guests; whoever wants Linux hears about the lab.
#[test]
fn kvm_without_hardware_support_names_the_lab() {
    if !kvm_is_usable() {
        return;
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap();
    let supported = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let directory = tempdir().unwrap();
    let ended = Session::start(&mut small_guest(directory.path(), Program::PowerOff)).wait(BOUND).must_be(0);
    let lines: Vec<_> = ended.errors.lines().collect();
    if supported {
        assert!(lines.is_empty(), "{lines:?}");
    } else {
        assert!(matches!(lines[..], [line] if line.contains("lab") && line.contains("Linux")), "{lines:?}");
    }
}

//! The files that a run writes (`--console`, `--trace`, `--dump-on-panic`, `log-writes=`): a run that is refused leaves each as it was,
//! however late it is refused.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::{Listing, sparse};
use minivmm_tests::guest::{Program, SUCCESS};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest};
use tempfile::tempdir;

/// Every option that names an output file. The first console, the trace and the dump are files of an earlier run if `are_old`.
fn output_files(directory: &Path, command: &mut Command, are_old: bool) {
    if are_old {
        for name in ["log", "trace"] {
            fs::write(directory.join(name), "of the last run").unwrap();
        }
        fs::write(directory.join("dump"), "").unwrap();
    }
    command.args(["--console", "file:log", "--trace", "*,file=trace", "--dump-on-panic", "dump"]);
}

#[track_caller]
fn is_refused(directory: &Path, command: &mut Command, says: &str) {
    let before = Listing::of(directory);
    let ended: Ended = Session::start(command).wait(BOUND).must_be(2);
    assert!(ended.errors.contains(says), "{ended}");
    assert_eq!(before, Listing::of(directory), "{ended}");
}

#[test]
fn one_that_the_host_refuses_leaves_the_others_as_they_were() {
    if !kvm_is_usable() {
        return;
    }
    for are_old in [true, false] {
        // The last that is opened is a directory: the second console, the dump.
        for (option, value) in [("--console", "file:other"), ("--dump-on-panic", "other")] {
            let directory = tempdir().unwrap();
            fs::create_dir(directory.path().join("other")).unwrap();
            sparse(&directory.path().join("disk.img"), 1 << 20);
            let mut command = small_guest(directory.path(), Program::Exit);
            if option == "--console" {
                output_files(directory.path(), &mut command, are_old);
            } else {
                command.args(["--console", "file:log", "--trace", "*,file=trace"]);
            }
            command.args(["--disk", "disk.img,log-writes=writes", option, value]);
            is_refused(
                directory.path(),
                &mut command,
                &format!("{option} {value}: Is a directory"),
            );
        }
    }
}

#[test]
fn a_saved_machine_that_does_not_fit_its_disk_leaves_them_as_they_were() {
    if !kvm_is_usable() {
        return;
    }
    for are_old in [true, false] {
        let directory = tempdir().unwrap();
        let disk = directory.path().join("disk.img");
        sparse(&disk, 1 << 20);
        let mut command = small_guest(directory.path(), Program::Echo);
        command.args(["--debug-exit", "--disk", "disk.img", "--qmp", "unix:qmp"]);
        let session = Session::start(command.args(["--save-directory", "."]));
        session.expect("ready\n", BOUND);
        let mut ctl = minivmm(["ctl", "qmp", "save", "saved", "--quit"]);
        Session::start(ctl.current_dir(directory.path())).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);

        let restore = |are_old: bool| {
            let mut command = minivmm(["--incoming", "file:saved,paths=saved"]);
            command.current_dir(directory.path());
            output_files(directory.path(), &mut command, are_old);
            command
        };
        let saved = fs::read(&disk).unwrap();
        fs::remove_file(&disk).unwrap();
        fs::write(&disk, &saved[512..]).unwrap();
        is_refused(directory.path(), &mut restore(are_old), "disk.img");
    }
}

#[test]
fn a_run_empties_those_of_the_last_one() {
    if !kvm_is_usable() {
        return;
    }
    for are_old in [true, false] {
        let directory = tempdir().unwrap();
        let mut command = small_guest(directory.path(), Program::Exit);
        command.arg("--debug-exit");
        output_files(directory.path(), &mut command, are_old);
        Session::start(&mut command).wait(BOUND).must_be(SUCCESS);
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let trace = read("trace");
        assert!(trace.contains("first KVM_RUN") && !trace.contains("of the last run"), "{trace}");
        assert!(!read("log").contains("of the last run"));
        assert_eq!(read("dump"), "");
    }
}

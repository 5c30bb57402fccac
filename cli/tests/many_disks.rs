//! As many disks as a machine has room for.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{Program, SUCCESS, words};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest, unexpected_lines};
use tempfile::{TempDir, tempdir};

const MOST: u32 = 64;
/// Where the first disk's registers are, and how far the next one's are from them.
const REGISTERS: (u32, u32) = (0xd000_0000, 0x1000);

/// A directory with the images, and the arguments that name them.
fn images() -> (TempDir, Vec<String>) {
    let directory = tempdir().unwrap();
    let image = |number| {
        sparse(&directory.path().join(format!("disk-{number}")), 1 << 20);
        format!("--disk=disk-{number}")
    };
    let arguments = (0..MOST).map(image).collect();
    (directory, arguments)
}

fn first_sector(directory: &Path, number: u32) -> Vec<u8> {
    fs::read(directory.join(format!("disk-{number}"))).unwrap()[..512].to_vec()
}

#[test]
fn each_of_the_most_disks_is_served_at_its_own_registers() {
    if !kvm_is_usable() {
        return;
    }
    for registers in [&[][..], &["--trap-registers"]] {
        let (directory, disks) = images();
        let mut command = small_guest(directory.path(), Program::Disks);
        command.arg("--debug-exit").args(&disks).args(registers);
        let ended = Session::start(&mut command).wait(BOUND).must_be(SUCCESS);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
        for number in 0..MOST {
            let expected = words(REGISTERS.0 + number * REGISTERS.1, 128);
            assert!(first_sector(directory.path(), number) == expected, "disk {number}");
        }
    }
}

/// Without ACPI each disk takes words on the command line, of which the kernel takes 2047 bytes.
#[test]
fn disks_that_do_not_fit_on_the_command_line_are_refused_in_one_line() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, disks) = images();
    let run = |count| {
        let mut command = small_guest(directory.path(), Program::PowerOff);
        Session::start(command.args(["--acpi", "off"]).args(&disks[..count])).wait(BOUND)
    };
    run(48).must_be(0);
    let ended = run(disks.len()).must_be(2);
    assert_eq!(
        ended.errors,
        "minivmm: --cmdline: the kernel command line has 2429 bytes, and this kernel takes at most 2047; shorten it, or with \
         '--acpi off' give fewer disks\n"
    );
}

#[test]
fn a_machine_with_the_most_disks_is_saved_and_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, disks) = images();
    let mut command = small_guest(directory.path(), Program::Echo);
    command.args(["--debug-exit", "--qmp", "unix:qmp", "--save-directory", "."]).args(&disks);
    let session = Session::start(&mut command);
    session.expect("ready", BOUND);
    let mut save = minivmm(["ctl", "qmp", "save", "saved", "--quit"]);
    Session::start(save.current_dir(directory.path())).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let mut restore = minivmm(["--incoming", "file:saved,paths=saved"]);
    let mut session = Session::start(restore.current_dir(directory.path()));
    session.send("more\x04");
    let ended = session.wait(BOUND).must_be(SUCCESS);
    assert_eq!(ended.output, b"more", "{ended}");
}

//! Bad input that takes more than a row of `messages.rs`: exit status 2, one line, and nothing created or changed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use support::{files, refused};

const USAGE: i32 = 2;

#[test]
fn an_image_in_use_is_refused_and_its_user_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let directory = files();
    let in_directory = |arguments: &[&str]| {
        let mut command = minivmm(["--kernel", "echo.elf", "--memory", "32M", "--debug-exit"]);
        command.args(arguments).current_dir(directory.path());
        command
    };
    let mut user = Session::start(&mut in_directory(&["--disk", "good.img"]));
    user.expect("ready", BOUND);
    for second in ["good.img", "good.img,readonly=on", "link.img"] {
        check(
            directory.path(),
            in_directory(&["--disk", second]),
            &["--disk", second.split(',').next().unwrap(), "lock"],
        );
    }
    user.send([4]);
    user.wait(BOUND).must_be(minivmm_tests::guest::SUCCESS);

    // Two readers are welcome.
    let read_only = ["--disk", "good.img,readonly=on"];
    let mut readers = [(); 2].map(|()| Session::start(&mut in_directory(&read_only)));
    for reader in &mut readers {
        reader.expect("ready", BOUND);
    }
    check(directory.path(), in_directory(&["--disk", "good.img"]), &["--disk", "good.img", "lock"]);
    for mut reader in readers {
        reader.send([4]);
        reader.wait(BOUND).must_be(minivmm_tests::guest::SUCCESS);
    }
}

#[test]
fn more_than_there_is() {
    let directory = files();
    let host = rustix::system::sysinfo().totalram >> 20;
    let memory = format!("{}M", host * 2);
    check(
        directory.path(),
        minivmm(["--kernel", "good.elf", "--memory", &memory]),
        &["--memory", &memory, "the host has"],
    );
    let disks = ["--disk=good.img,locking=off"; 65];
    check(
        directory.path(),
        minivmm([&["--kernel", "good.elf"][..], &disks].concat()),
        &["--disk", "65 disks", "64"],
    );
    if kvm_is_usable() {
        check(
            directory.path(),
            minivmm(["--kernel", "good.elf", "--cpus", "100000"]),
            &["--cpus", "100000", "write 1 to 255"],
        );
    }
}

#[test]
fn command_lines_that_a_kernel_could_not_read() {
    let directory = files();
    let command = |words: &OsStr| {
        let mut command = minivmm(["--kernel", "good.elf", "--cmdline"]);
        command.arg(words);
        command
    };
    for (words, reason) in [
        (&b"a".repeat(2048)[..], "2047"),
        (&b"a".repeat(70_000), "2047"),
        (b"quiet\x01", "printable"),
        (b"two\nlines", "printable"),
        ("gr\u{fc}n".as_bytes(), "printable"),
        (b"\xff", "UTF-8"),
    ] {
        let ended =
            check(directory.path(), command(OsStr::from_bytes(words)), &["--cmdline", reason]);
        assert!(
            ended.errors.len() < 1000,
            "the whole value in one line is too much: {} bytes",
            ended.errors.len()
        );
    }
    // A bzImage tells its own limit.
    check(
        directory.path(),
        minivmm(["--kernel", "bz-short-cmdline", "--cmdline", "--------"]),
        &["--cmdline", "20"],
    );
}

#[test]
fn a_file_without_read_permission() {
    let directory = files();
    for (arguments, option) in [
        (&["--kernel", "unreadable"][..], "--kernel"),
        (&["--kernel", "good.elf", "--initrd", "unreadable"], "--initrd"),
        (&["--kernel", "good.elf", "--disk", "unreadable"], "--disk"),
    ] {
        let plain = minivmm(arguments);
        let command = if rustix::process::geteuid().is_root() {
            // The superuser may read everything, unless the capabilities for that are given up.
            let mut command = Command::new("setpriv");
            command
                .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
                .arg(plain.get_program())
                .args(arguments);
            command
        } else {
            plain
        };
        check(directory.path(), command, &[option, "unreadable", "ermission denied"]);
    }
}

/// A console file that existed is not emptied when something else is wrong.
#[test]
fn an_earlier_log_survives() {
    let directory = files();
    fs::write(directory.path().join("log"), "from yesterday").unwrap();
    for wrong in [
        &["--disk", "missing"][..],
        &["--disk", "good.img,logical-block-size=65536"],
        &["--initrd", "2G"],
    ] {
        let mut command =
            minivmm(["--kernel", "good.elf", "--console", "file:log", "--memory", "32M"]);
        command.args(wrong);
        check(directory.path(), command, &[wrong[0]]);
    }
}

#[track_caller]
fn check(directory: &Path, mut command: Command, says: &[&str]) -> Ended {
    let ended = refused(directory, &mut command, USAGE);
    let ended = ended.unwrap_or_else(|complaint| panic!("{complaint}"));
    for text in says {
        assert!(ended.errors.contains(text), "does not say {text:?}: {ended}");
    }
    ended
}

/// A name may have newlines and a terminal's sequences, and standard output may be full.
#[test]
fn messages_are_one_line_and_lost_output_is_an_error() {
    let directory = files();
    for arguments in [["--kernel", "no\nfile\x1b[31m"], ["--qmp", "unix:no/\nsocket\x1b[31m"]] {
        let mut command = minivmm(["--kernel", "good.elf"]);
        if arguments[0] == "--kernel" {
            command = minivmm([] as [&str; 0]);
        }
        command.args(arguments);
        let ended = check(directory.path(), command, &["\\n", "\\u{1b}[31m"]);
        assert!(!ended.errors.contains('\x1b'), "{ended}");
    }
    let mut help = minivmm(["--help"]);
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = Session::start_on(help.stdout(full)).wait(BOUND).must_be(1);
    assert!(ended.errors.contains("standard output: No space left on device"), "{ended}");
}

//! Bad input: exit status 2, one line that names the option, its value and the reason, and nothing created or changed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::{Listing, sparse};
use minivmm_tests::guest::Program;
use minivmm_tests::image::{
    BZ_CMDLINE_SIZE, BZ_INIT_SIZE, BZ_LOADFLAGS, BZ_VERSION, BZ_XLOADFLAGS, ELF_CLASS, ELF_LOAD, ELF_MACHINE, P_MEMSZ,
    P_PADDR, bzimage, linux64, pvh,
};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

const USAGE: i32 = 2;

/// Arguments, and what the line has to contain. The files are those of [`files`]; the guest has 32 MiB.
const CASES: &[(&str, &[&str])] = &[
    // Options
    ("", &["--kernel", "--help"]),
    ("--kernal good.elf", &["--kernal", "did you mean '--kernel'"]),
    ("--kernel good.elf --dsik good.img", &["--dsik", "did you mean '--disk'"]),
    ("--kernel good.elf --kernel good.elf", &["--kernel", "multiple"]),
    ("good.elf", &["good.elf", "unexpected"]),
    ("--kernel good.elf --memory 0", &["--memory", "0", "at least"]),
    ("--kernel good.elf --memory 12Q", &["--memory", "12Q", "512M"]),
    ("--kernel good.elf --memory -1", &["--memory", "-1"]),
    ("--kernel good.elf --memory -64M", &["--memory", "-64M", "512M"]),
    ("--kernel good.elf --timeout -5s", &["--timeout", "-5s", "60s"]),
    ("--kernel good.elf --memory 1.5G", &["--memory", "1.5G", "512M"]),
    ("--kernel good.elf --memory 32769K", &["--memory", "32769K", "4K"]),
    ("--kernel good.elf --memory 15M", &["--memory", "15M", "at least 16M"]),
    ("--kernel good.elf --memory 99999999999T", &["--memory", "99999999999T"]),
    ("--kernel good.elf --cpus 0", &["--cpus", "0"]),
    ("--kernel good.elf --cpus 4294967296", &["--cpus", "4294967296"]),
    ("--kernel good.elf --cpus two", &["--cpus", "two"]),
    ("--kernel good.elf --acpi of", &["--acpi", "of", "did you mean 'off'"]),
    ("--kernel good.elf --timeout 0", &["--timeout", "0"]),
    ("--kernel good.elf --timeout 10x", &["--timeout", "10x", "60s"]),
    ("--kernel good.elf --console tty", &["--console", "tty", "stdio"]),
    ("--kernel good.elf --console file:", &["--console", "file:", "file:PATH"]),
    ("--kernel good.elf --console file:no/such/log", &["--console", "file:no/such/log", "No such file"]),
    ("--kernel good.elf --console file:directory", &["--console", "file:directory", "directory"]),
    ("--kernel good.elf --console file:fifo", &["--console", "file:fifo"]),
    ("--kernel good.elf --console unix:text", &["--console", "unix:text", "in use"]),
    ("--kernel good.elf --console unix:no/such/socket", &["--console", "unix:no/such/socket"]),
    // Kernels
    ("--kernel missing", &["--kernel", "missing", "No such file"]),
    ("--kernel directory", &["--kernel", "directory", "a directory"]),
    ("--kernel fifo", &["--kernel", "fifo", "a fifo"]),
    ("--kernel /dev/null", &["--kernel", "/dev/null", "regular file"]),
    ("--kernel empty", &["--kernel", "empty"]),
    ("--kernel text", &["--kernel", "text", "a script", "vmlinux"]),
    ("--kernel zeroes", &["--kernel", "zeroes", "a file of zeros", "vmlinux"]),
    ("--kernel gzip", &["--kernel", "gzip", "gzip"]),
    ("--kernel elf-40-bytes", &["--kernel", "elf-40-bytes", "truncated"]),
    ("--kernel elf-no-program-headers", &["--kernel", "elf-no-program-headers", "truncated"]),
    ("--kernel elf-no-segment", &["--kernel", "elf-no-segment", "truncated"]),
    ("--kernel elf-32-bit", &["--kernel", "elf-32-bit", "32-bit"]),
    ("--kernel elf-aarch64", &["--kernel", "elf-aarch64", "x86-64"]),
    ("--kernel image-aarch64", &["--kernel", "image-aarch64", "x86-64"]),
    ("--kernel elf-1G", &["--kernel", "elf-1G", "memory"]),
    ("--kernel elf-in-hole", &["--kernel", "elf-in-hole"]),
    ("--kernel elf-wraps", &["--kernel", "elf-wraps"]),
    ("--kernel elf-at-0", &["--kernel", "elf-at-0"]),
    ("--kernel bz-400-bytes", &["--kernel", "bz-400-bytes"]),
    ("--kernel bz-setup-only", &["--kernel", "bz-setup-only", "truncated"]),
    ("--kernel bz-old", &["--kernel", "bz-old"]),
    ("--kernel bz-low", &["--kernel", "bz-low"]),
    ("--kernel bz-32-bit", &["--kernel", "bz-32-bit", "64-bit"]),
    ("--kernel bz-1G", &["--kernel", "bz-1G", "memory"]),
    // Initrds
    ("--kernel good.elf --initrd missing", &["--initrd", "missing", "No such file"]),
    ("--kernel good.elf --initrd directory", &["--initrd", "directory", "a directory"]),
    ("--kernel good.elf --initrd fifo", &["--initrd", "fifo", "a fifo"]),
    ("--kernel good.elf --initrd 2G", &["--initrd", "2G", "2048M"]),
    ("--kernel good.bz --initrd 2G", &["--initrd", "2G", "2048M"]),
    ("--kernel good.64 --initrd 2G", &["--initrd", "2G", "2048M"]),
    ("--kernel good.elf --initrd empty", &["--initrd", "empty"]),
    // Disks
    ("--kernel good.elf --disk missing", &["--disk", "missing", "no such file"]),
    ("--kernel good.elf --disk directory", &["--disk", "directory", "a directory"]),
    ("--kernel good.elf --disk fifo", &["--disk", "fifo", "fifo"]),
    ("--kernel good.elf --disk /dev/null", &["--disk", "/dev/null"]),
    ("--kernel good.elf --disk empty", &["--disk", "empty"]),
    ("--kernel good.elf --disk 100-bytes", &["--disk", "100-bytes", "512"]),
    ("--kernel good.elf --disk good.img --disk good.img", &["--disk", "good.img"]),
    ("--kernel good.elf --disk good.img --disk ./good.img", &["--disk", "good.img"]),
    ("--kernel good.elf --disk good.img --disk link.img", &["--disk", "link.img"]),
    ("--kernel good.elf --disk good.img --disk good.img,readonly=on", &["--disk", "good.img"]),
    ("--kernel good.elf --disk good.img,sreial=1", &["--disk", "sreial", "unknown key", "did you mean 'serial'"]),
    ("--kernel good.elf --disk good.img,id=a --disk link.img,id=a", &["--disk", "link.img", "id=a"]),
    ("--kernel good.elf --disk good.img,id=vdb --disk link.img", &["--disk", "link.img", "id=vdb"]),
    ("--kernel good.elf --disk good.img,readonly", &["--disk", "readonly"]),
    ("--kernel good.elf --disk good.img,readonly=maybe", &["--disk", "readonly", "maybe"]),
    ("--kernel good.elf --disk good.img,cache=fast", &["--disk", "cache", "fast", "writeback"]),
    ("--kernel good.elf --disk good.img,format=vmdk", &["--disk", "format", "vmdk", "qcow2"]),
    ("--kernel good.elf --disk good.img,num-queues=0", &["--disk", "num-queues"]),
    ("--kernel good.elf --disk good.img,queue-size=3", &["--disk", "queue-size"]),
    ("--kernel good.elf --disk good.img,logical-block-size=1000", &["--disk", "logical-block-size"]),
    ("--kernel good.elf --disk ,readonly=on", &["--disk"]),
    ("--kernel good.elf --disk good.img,scsi=on", &["good.img", "scsi=on", "/dev/sda"]),
];

#[test]
fn each_is_one_clear_line_and_changes_nothing() {
    let directory = files();
    let mut complaints = Vec::new();
    for (arguments, says) in CASES {
        let console = if arguments.contains("--console") { "" } else { "--console file:log" };
        let memory = if arguments.contains("--memory") { "" } else { "--memory 32M" };
        let arguments: Vec<_> = [arguments, console, memory].iter().flat_map(|part| part.split_whitespace()).collect();
        complaints.extend(complaint(directory.path(), minivmm(&arguments), says));
    }
    assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
}

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
    let disks = ["--disk=good.img,locking=off"; 17];
    check(directory.path(), minivmm([&["--kernel", "good.elf"][..], &disks].concat()), &["--disk", "17", "16"]);
    if kvm_is_usable() {
        check(directory.path(), minivmm(["--kernel", "good.elf", "--cpus", "100000"]), &["--cpus", "100000", "allows"]);
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
        let ended = check(directory.path(), command(OsStr::from_bytes(words)), &["--cmdline", reason]);
        assert!(ended.errors.len() < 1000, "the whole value in one line is too much: {} bytes", ended.errors.len());
    }
    // A bzImage tells its own limit.
    check(directory.path(), minivmm(["--kernel", "bz-short-cmdline", "--cmdline", "--------"]), &["--cmdline", "20"]);
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
            command.args(["--bounding-set=-all", "--inh-caps=-all", "--"]).arg(plain.get_program()).args(arguments);
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
    for wrong in [&["--disk", "missing"][..], &["--disk", "good.img,logical-block-size=65536"], &["--initrd", "2G"]] {
        let mut command = minivmm(["--kernel", "good.elf", "--console", "file:log", "--memory", "32M"]);
        command.args(wrong);
        check(directory.path(), command, &[wrong[0]]);
    }
}

/// Runs `command` in `directory` and insists on one line with `says` and no change.
#[track_caller]
fn check(directory: &Path, command: Command, says: &[&str]) -> Ended {
    match run(directory, command, says) {
        Ok(ended) => ended,
        Err(complaint) => panic!("{complaint}"),
    }
}

fn complaint(directory: &Path, command: Command, says: &[&str]) -> Option<String> {
    run(directory, command, says).err()
}

fn run(directory: &Path, mut command: Command, says: &[&str]) -> Result<Ended, String> {
    let before = Listing::of(directory);
    let mut session = Session::start(command.current_dir(directory));
    session.close_input();
    let ended = session.wait(BOUND);
    let mut wrong = Vec::new();
    if ended.code() != USAGE {
        wrong.push(format!("exit status {}", ended.code()));
    }
    if ended.errors.lines().count() != 1 || !ended.errors.starts_with("minivmm: ") {
        wrong.push("not one line".to_owned());
    }
    wrong
        .extend(says.iter().filter(|text| !ended.errors.contains(**text)).map(|text| format!("does not say {text:?}")));
    if !ended.output.is_empty() {
        wrong.push("something on standard output".to_owned());
    }
    let after = Listing::of(directory);
    if before != after {
        wrong.push(format!("changed: {before:?} -> {after:?}"));
    }
    if wrong.is_empty() {
        return Ok(ended);
    }
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    let arguments: Vec<_> = arguments.map(|argument| argument.chars().take(80).collect::<String>()).collect();
    let errors: String = ended.errors.chars().take(1000).collect();
    Err(format!("{}: {}\n    {}", arguments.join(" "), wrong.join("; "), errors.trim_end()))
}

/// A directory with everything that can be wrong with a file.
fn files() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let write = |name: &str, content: &[u8]| fs::write(at(name), content).unwrap();
    let patched = |image: &[u8], offset: usize, bytes: &[u8]| {
        let mut image = image.to_vec();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        image
    };

    write("echo.elf", &pvh(Program::Echo));
    // What is taken for good input ends at once.
    let elf = pvh(Program::PowerOff);
    write("good.elf", &elf);
    write("good.64", &linux64(Program::BootLinux64));
    write("empty", b"");
    write("text", b"#!/bin/sh\necho this is not a kernel\n");
    write("zeroes", &[0; 8192]);
    write("gzip", &[&b"\x1f\x8b\x08\0"[..], &[0; 4096]].concat());
    write("elf-40-bytes", &elf[..40]);
    write("elf-no-program-headers", &elf[..ELF_LOAD + 6]);
    write("elf-no-segment", &elf[..0x1000 + 8]);
    write("elf-32-bit", &patched(&elf, ELF_CLASS, &[1]));
    write("elf-aarch64", &patched(&elf, ELF_MACHINE, &[183]));
    write("elf-1G", &patched(&elf, ELF_LOAD + P_MEMSZ, &(1u64 << 30).to_le_bytes()));
    write("elf-in-hole", &patched(&elf, ELF_LOAD + P_PADDR, &0xd000_0000_u64.to_le_bytes()));
    write("elf-wraps", &patched(&elf, ELF_LOAD + P_PADDR, &(u64::MAX - 100).to_le_bytes()));
    write("elf-at-0", &patched(&elf, ELF_LOAD + P_PADDR, &0u64.to_le_bytes()));
    // Documentation/arch/arm64/booting.rst: the magic at 56, behind a branch that reads as "MZ".
    write("image-aarch64", &patched(&patched(&[0; 4096], 0, b"MZ"), 56, b"ARM\x64"));

    let bz = bzimage(Program::BootLinux64);
    write("good.bz", &bz);
    write("bz-short-cmdline", &patched(&bz, BZ_CMDLINE_SIZE, &20u32.to_le_bytes()));
    write("bz-400-bytes", &bz[..400]);
    write("bz-setup-only", &bz[..1024]);
    write("bz-old", &patched(&bz, BZ_VERSION, &0x0205_u16.to_le_bytes()));
    write("bz-low", &patched(&bz, BZ_LOADFLAGS, &[0]));
    write("bz-32-bit", &patched(&bz, BZ_XLOADFLAGS, &[0]));
    write("bz-1G", &patched(&bz, BZ_INIT_SIZE, &(1u32 << 30).to_le_bytes()));

    fs::create_dir(at("directory")).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    sparse(&at("2G"), 2 << 30);
    sparse(&at("good.img"), 1 << 20);
    symlink("good.img", at("link.img")).unwrap();
    write("100-bytes", &[0; 100]);
    write("unreadable", &elf);
    fs::set_permissions(at("unreadable"), Permissions::from_mode(0o000)).unwrap();
    directory
}

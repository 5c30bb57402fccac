//! `--exec`: a command's output and status come out of Linux guests as they went in, and no other end looks like success.

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm_tests::linux::{
    BOOT_BOUND, CLOUD, SMALL, System, WORDS, artefact, assert_clean, content,
};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{minivmm, skip};
use rustix::process::Signal;

const AMD64: System = System { kernel: "linux-amd64/vmlinux", initrd: "initrd-amd64.cpio" };
/// Debian's own kernel and initrd.
const STOCK: System = System { kernel: "debian/vmlinuz", initrd: "debian/initrd.img" };

/// `minivmm --exec COMMAND` with `root` for its disk, in `directory`.
fn exec(system: System, directory: &Path, root: &str, command: &str) -> Command {
    let mut minivmm = minivmm(["--cmdline", WORDS, "--disk", root, "--exec", command, "--kernel"]);
    minivmm.arg(artefact(system.kernel)).arg("--initrd").arg(artefact(system.initrd));
    minivmm.current_dir(directory).env("TMPDIR", std::env::temp_dir());
    minivmm
}

fn finish(command: &mut Command) -> Ended {
    Session::start(command).wait(BOOT_BOUND)
}

/// busybox's commands, with dash as /bin/sh.
fn tools() -> String {
    format!("{},readonly=on", artefact("tools.img").display())
}

/// Runs `command`, and checks the status, the output, and whether standard error has `says`.
#[track_caller]
fn check(command: &str, status: i32, output: &str, says: &str) {
    let directory = tempfile::tempdir().unwrap();
    let mut minivmm = exec(CLOUD, directory.path(), &tools(), command);
    let ended = finish(minivmm.args(["--timeout", "500s"])).must_be(status);
    assert_eq!(String::from_utf8_lossy(&ended.output), output, "{ended}");
    assert!(ended.errors.contains(says), "{ended}");
}

/// Defines a test for each row.
macro_rules! table {
    ($($name:ident: $command:literal -> $status:literal $output:literal $says:literal;)+) => {
        $(#[test]
        fn $name() {
            check($command, $status, $output, $says);
        })+
    };
}

table! {
    success:             "true" -> 0 "" "";
    failure:             "false" -> 1 "" "";
    status_255:          "exit 255" -> 255 "" "";
    output_and_status:   "echo one; printf two; exit 42" -> 42 "one\ntwo" "";
    errors_go_apart:     "echo out; echo to the log >&2; exit 3" -> 3 "out\n" "to the log";
    quotes_and_newlines: "echo \"it's\" 'a \"$HOME\"'\necho \\\\ é $((6*7)) --" -> 0 "it's a \"$HOME\"\n\\ é 42 --\n" "";
    pipes_fail:          "set -e; echo x | grep -q y; echo not reached" -> 1 "" "";
    standard_streams:    "wc -c; cat /dev/stdin; [ -t 1 ] || echo a pipe" -> 0 "0\na pipe\n" "";
    mounts:              "ls -d /bin; for d in proc sys dev tmp run; do grep -c \" /$d \" /proc/mounts; done" -> 0 "/bin\n1\n1\n1\n1\n1\n" "";
    killed:              "kill -9 $$" -> 137 "" "";
    terminated:          "kill -TERM $$" -> 143 "" "";
    program_crashes:     "echo before; sh -c 'kill -SEGV $$'" -> 139 "before\n" "";
    missing_command:     "no-such-command --option" -> 127 "" "no-such-command";
    not_executable:      "/etc" -> 126 "" "/etc";
    syntax_error:        "if true; then" -> 2 "" "";
    daemon_left_behind:  "sleep 1000 & echo started" -> 0 "started\n" "";
    parent_killed:       "echo x; kill -9 $PPID" -> 4 "x\n" "--exec: the guest rebooted before the command's status was known";
    everything_killed:   "echo x; sync; kill -9 -1" -> 4 "x\n" "--exec: the guest rebooted before the command's status was known";
    powers_off:          "echo x; poweroff -f" -> 4 "x\n" "--exec: the guest powered off before the command's status was known";
    reboots:             "reboot -f" -> 4 "" "--exec: the guest rebooted before the command's status was known";
    panics:              "echo c >/proc/sysrq-trigger" -> 3 "" "the guest panicked";
    forged_status:       "printf '\\001%032d end 0;' 0; exit 9" -> 9 "\u{1}00000000000000000000000000000000 end 0;" "";
}

/// A guest that halts is like one that never ends.
#[test]
fn a_guest_that_halts_is_ended_by_the_clock() {
    let directory = tempfile::tempdir().unwrap();
    let mut minivmm = exec(CLOUD, directory.path(), &tools(), "echo before; halt -f");
    let ended = finish(minivmm.args(["--timeout", "150s"])).must_be(124);
    // A slow machine may not get as far.
    assert!(b"before\n".starts_with(&ended.output), "{ended}");
}

#[test]
fn a_signal_to_minivmm_is_no_success() {
    let directory = tempfile::tempdir().unwrap();
    let mut minivmm = exec(CLOUD, directory.path(), &tools(), "echo ready; exec sleep 100000");
    let session = Session::start(&mut minivmm);
    session.expect("ready\n", BOOT_BOUND);
    session.signal(Signal::TERM);
    let ended = session.wait(BOOT_BOUND).must_be(4);
    assert!(ended.errors.contains("the VM was ended before the command's status"), "{ended}");
}

/// Every byte value, beside newlines and carriage returns. Large outputs are in `cli/tests/exec.rs`: a serial port is slow in the lab.
#[test]
fn binary_output_is_unharmed() {
    let directory = tempfile::tempdir().unwrap();
    let mut data: Vec<u8> = (0..=255_u8).flat_map(|byte| [byte, b'\n', byte, b'\r']).collect();
    data.extend(b"\r\n\n\r\r\r\n".repeat(10));
    data.resize(data.len().next_multiple_of(512), b'\r');
    fs::write(directory.path().join("data"), &data).unwrap();
    let mut minivmm = exec(CLOUD, directory.path(), &tools(), "cat /dev/vdb; dd if=/dev/vdb bs=7");
    let ended = finish(minivmm.args(["--disk", "data,readonly=on"])).must_be(0);
    assert!(ended.output == data.repeat(2), "the output differs: {:?}", ended.output);
}

#[test]
fn a_missing_reader_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let minivmm = exec(CLOUD, directory.path(), &tools(), "yes");
    let mut shell = Command::new("sh");
    shell.args(["-c", "{ \"$@\"; echo $? >status; } | true", "sh"]);
    shell.arg(minivmm.get_program()).args(minivmm.get_args());
    let ended = finish(shell.current_dir(directory.path()));
    assert_eq!(fs::read_to_string(directory.path().join("status")).unwrap(), "1\n");
    assert!(ended.errors.contains("cannot write the command's output"), "{ended}");
}

/// Makes an ext4 image of `files` (path in the image, file here) and empty directories.
fn image(directory: &Path, files: &[(&str, &str)]) {
    let root = directory.join("root");
    for place in ["bin", "dev", "proc", "sys", "tmp", "run"] {
        fs::create_dir_all(root.join(place)).unwrap();
    }
    for (place, file) in files {
        let place = root.join(place);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(file, place).unwrap();
    }
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d", "root", "root.img", "32M"])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

const DASH: &[(&str, &str)] = &[
    ("bin/sh", "/bin/dash"),
    ("lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2"),
    ("lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6"),
];

/// What the command wrote is on the disk, and the file system is clean.
fn leaves_a_clean_disk(system: System, files: &[(&str, &str)]) {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path(), files);
    let command = "echo data >/file; echo done; exit 5";
    let ended = finish(&mut exec(system, directory.path(), "root.img", command)).must_be(5);
    assert_eq!(String::from_utf8_lossy(&ended.output), "done\n", "{ended}");
    let disk = directory.path().join("root.img");
    assert_clean(&disk);
    assert_eq!(content(&disk, "/file"), "data\n");
}

#[test]
fn a_root_with_nothing_but_dash_will_do() {
    leaves_a_clean_disk(CLOUD, DASH);
    leaves_a_clean_disk(AMD64, DASH);
}

#[test]
fn a_root_with_nothing_but_busybox_will_do() {
    leaves_a_clean_disk(CLOUD, &[("bin/sh", "/bin/busybox")]);
}

#[test]
fn a_root_without_a_shell_is_no_success() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path(), &[("bin/busybox", "/bin/busybox")]);
    let ended = finish(&mut exec(CLOUD, directory.path(), "root.img", "true")).must_be(3);
    assert_eq!(ended.output, b"");
    assert!(ended.errors.contains("--exec: the guest did not start the command"), "{ended}");
}

/// Debian's own initrd passes the arguments of init on. A whole Debian is there, and nothing is written to its image.
#[test]
fn a_stock_debian_runs_a_command() {
    let directory = tempfile::tempdir().unwrap();
    let root = format!("{},snapshot=on", artefact("debian/root.img").display());
    let command = "grep ^ID= /etc/os-release; findmnt -no FSTYPE /; ls -d /root /usr; exit 200";
    let mut minivmm = exec(STOCK, directory.path(), &root, command);
    let ended = finish(minivmm.args(["--memory", "1G", "--cpus", "2"])).must_be(200);
    assert_eq!(String::from_utf8_lossy(&ended.output), "ID=debian\next4\n/root\n/usr\n", "{ended}");
}

/// Without an initrd, as the kernel itself mounts the disk: busybox for everything, as in Alpine.
#[test]
fn a_small_kernel_needs_no_initrd() {
    let kernel = artefact("").join(SMALL.kernel);
    if !kernel.exists() {
        return skip("the small kernel is missing: make it with `resources/prepare linux-small`");
    }
    let directory = tempfile::tempdir().unwrap();
    let mut minivmm = minivmm(["--exec", "uname; ls /bin | head -n 2; exit 17", "--kernel"]);
    minivmm
        .arg(kernel)
        .arg("--disk")
        .arg(format!("{},snapshot=on", artefact("demo.img").display()));
    minivmm.current_dir(directory.path()).env("TMPDIR", std::env::temp_dir());
    let ended = finish(&mut minivmm).must_be(17);
    assert_eq!(String::from_utf8_lossy(&ended.output), "Linux\n[\n[[\n", "{ended}");
    assert!(ended.errors.contains("Linux version"), "{ended}");
}

/// The commands of the chapter, with a kernel, an initrd and a root disk of these names.
#[test]
fn the_chapters_commands_work() {
    const CHAPTER: &str = include_str!("../../../vmm/docs/minivmm-in-ci.md");
    let directory = tempfile::tempdir().unwrap();
    let files =
        [("vmlinuz", CLOUD.kernel), ("initrd.img", CLOUD.initrd), ("root.img", "tools.img")];
    for (name, artefact_name) in files {
        std::os::unix::fs::symlink(artefact(artefact_name), directory.path().join(name)).unwrap();
    }
    std::os::unix::fs::symlink(minivmm_tests::binary(), directory.path().join("minivmm")).unwrap();
    let blocks = CHAPTER.split("```sh\n").skip(1);
    let scripts: Vec<_> = blocks.map(|block| block.split("```").next().unwrap()).collect();
    let outputs = ["\n", "hello from the host\n", "numbers: OK\n", "\n"];
    let statuses = [42, 0, 0, 0];
    assert_eq!(scripts.len(), outputs.len(), "{scripts:#?}");
    for ((script, output), status) in scripts.iter().zip(outputs).zip(statuses) {
        let mut shell = Command::new("bash");
        // A slow machine needs longer than its readers'.
        let script = script.replace("--timeout 5m", "--timeout 9m");
        shell.args(["-ec", &format!("PATH=$PWD:$PATH\n{script}")]);
        shell.current_dir(directory.path()).env("TMPDIR", std::env::temp_dir());
        let ended = finish(&mut shell).must_be(status);
        assert!(String::from_utf8_lossy(&ended.output).ends_with(output), "{script}: {ended}");
    }
}

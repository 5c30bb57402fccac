//! Hosts that lack something: one line with the fix, exit status 1.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, minivmm, skip, small_guest, unexpected_lines};
use tempfile::tempdir;

/// Whether the means to hide a file from a process are there; says why not.
fn can_hide_devices() -> bool {
    let probe =
        Command::new("unshare").args(["-rm", "mount", "--bind", "/dev/null", "/dev/kvm"]).output();
    match probe {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            skip(&format!("no mount namespace here: {}", why.trim()));
            false
        }
        Err(error) => {
            skip(&format!("unshare(1): {error}"));
            false
        }
    }
}

/// What the host lacks, by a shell that takes it away and then runs minivmm; minivmm's arguments; and its line. In a user
/// namespace, root may do everything but what `setpriv` gives up.
const ROWS: &[(&str, &str, i32, &str)] = &[
    (
        "mount -t tmpfs none /dev && exec \"$@\"",
        "",
        1,
        "cannot use /dev/kvm: No such file or directory (os error 2); load the kvm_intel or kvm_amd module, or enable \
         virtualization in the firmware (in a virtual machine: nested virtualization), or use the lab (`make lab`)",
    ),
    (
        ": >forbidden && chmod 000 forbidden && mount --bind forbidden /dev/kvm && \
         exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"",
        "",
        1,
        "cannot use /dev/kvm: Permission denied (os error 13); add yourself to the group kvm and log in again",
    ),
    (
        "mount --bind /dev/null /dev/kvm && exec \"$@\"",
        "",
        1,
        "cannot use /dev/kvm: Inappropriate ioctl for device (os error 25); it is not a working KVM device; check the \
         kvm_intel or kvm_amd module",
    ),
    (
        "ulimit -v 300000; exec \"$@\"",
        "--memory 512M",
        1,
        "cannot map 512M of guest memory: Cannot allocate memory (os error 12); ask for less with --memory, or raise the limit (`ulimit -v`)",
    ),
    (
        "ulimit -n 5; exec \"$@\"",
        "",
        1,
        "--kernel guest.elf: Too many open files (os error 24); raise the limit on open files (`ulimit -n`)",
    ),
    (
        "TMPDIR=/proc exec \"$@\"",
        "--disk disk.img,snapshot=on",
        2,
        "--disk disk.img: cannot keep the writes of snapshot=on in /proc: No such file or directory (os error 2); set TMPDIR to a directory with space",
    ),
    (
        "TMPDIR=missing exec \"$@\"",
        "--disk disk.img,snapshot=on",
        2,
        "--disk disk.img: cannot keep the writes of snapshot=on in missing: No such file or directory (os error 2); \
         set TMPDIR to a directory with space",
    ),
];

#[test]
fn each_line_is_pinned_and_no_console_is_created() {
    if !kvm_is_usable() || !can_hide_devices() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut complaints = String::new();
    for (shell, arguments, status, line) in ROWS {
        let vm = small_guest(directory.path(), Program::PowerOff);
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", shell, "sh"]).arg(vm.get_program());
        command.args(["--kernel", "guest.elf", "--console", "file:log"]);
        command.args(arguments.split_whitespace()).current_dir(directory.path());
        let ended = Session::start(&mut command).wait(BOUND);
        if (ended.code(), ended.errors.as_str()) != (*status, &format!("minivmm: {line}\n")) {
            complaints += &format!("{shell}\n  - {line}\n  + {ended}\n");
        }
        assert!(!directory.path().join("log").exists(), "{shell}: the console's file was created");
    }
    assert!(complaints.is_empty(), "{complaints}");
}

/// With any limit on open files, either the guest runs or one line with exit status 1 says which limit to raise.
#[test]
fn too_few_descriptors_are_the_hosts_fault_at_every_step() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut refusals = 0;
    // The dynamic loader needs one itself.
    for limit in 4.. {
        let vm = small_guest(directory.path(), Program::PowerOff);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {limit}; exec \"$@\""), "sh"]);
        command.arg(vm.get_program()).args(vm.get_args()).current_dir(directory.path());
        command.args(["--disk", "disk.img", "--cpus", "2", "--qmp", "unix:socket"]);
        let ended = Session::start(command.args(["--console", "file:log"])).wait(BOUND);
        if ended.code() == 0 {
            break;
        }
        refusals += 1;
        let lines = unexpected_lines(&ended.errors);
        let cause =
            "Too many open files (os error 24); raise the limit on open files (`ulimit -n`)";
        assert!(matches!(lines[..], [line] if line.ends_with(cause)), "{limit}: {ended}");
        assert_eq!(ended.code(), 1, "{limit}: {ended}");
        assert!(!directory.path().join("socket").exists(), "{limit}");
    }
    assert!(refusals > 20, "{refusals}");
}

/// With any limit on memory, either the guest runs or one line with exit status 1 says what to do.
#[test]
fn too_little_memory_for_threads_is_the_hosts_fault_at_every_step() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut refusals = 0;
    // In KiB. The dynamic loader needs some itself.
    for limit in (48 << 10..).step_by(700) {
        let vm = small_guest(directory.path(), Program::PowerOff);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -v {limit}; exec \"$@\""), "sh"]);
        command.arg(vm.get_program()).args(vm.get_args()).current_dir(directory.path());
        command.args(["--disk", "disk.img", "--cpus", "3", "--qmp", "unix:socket"]);
        let ended = Session::start(command.args(["--console", "file:log"])).wait(BOUND);
        if ended.code() == 0 {
            break;
        }
        refusals += 1;
        let mut lines = unexpected_lines(&ended.errors);
        // A pool goes on with the threads that it has.
        lines.retain(|line| !line.contains(" I/O threads can be started: "));
        assert!(matches!(lines[..], [line] if line.contains("ulimit -v")), "{limit}: {ended}");
        assert_eq!(ended.code(), 1, "{limit}: {ended}");
    }
    assert!(refusals > 10, "{refusals}");
}

/// A KVM without hardware support runs small guests only: a line names the lab, where Linux runs.
#[test]
fn kvm_without_hardware_support_names_the_lab() {
    if !kvm_is_usable() {
        return;
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap();
    let supported = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let directory = tempdir().unwrap();
    let ended = Session::start(&mut small_guest(directory.path(), Program::PowerOff))
        .wait(BOUND)
        .must_be(0);
    let lines: Vec<_> = ended.errors.lines().collect();
    if supported {
        assert!(lines.is_empty(), "{lines:?}");
    } else {
        assert!(
            matches!(lines[..], [line] if line.contains("lab") && line.contains("Linux")),
            "{lines:?}"
        );
    }
}

/// The processors that the thread `name` of the process may run on, as /proc lists them.
fn processors_of(process: u32, name: &str) -> String {
    let tasks =
        fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap().path());
    // A thread may have ended since the directory was read.
    let is_named = |comm: String| comm.trim() == name;
    let mut named = tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(is_named));
    let status =
        fs::read_to_string(named.next().expect("the thread exists").join("status")).unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    list.trim().to_owned()
}

#[test]
fn threads_stay_on_their_processors() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let all =
        processors_of(std::process::id(), fs::read_to_string("/proc/self/comm").unwrap().trim());
    let (first, last) =
        (all.split([',', '-']).next().unwrap(), all.rsplit([',', '-']).next().unwrap());
    let mut command = small_guest(directory.path(), Program::Echo);
    command.args(["--cpus", "2", "--disk", "disk.img"]);
    let session = Session::start(command.args([
        "--vcpu-affinity",
        &format!("{last},{first}"),
        "--io-affinity",
        last,
    ]));
    session.expect("ready\n", BOUND);
    for (thread, processors) in [
        ("vcpu-0", last),
        ("vcpu-1", first),
        ("disk-vda-0", last),
        ("console", &all),
        ("minivmm", &all),
    ] {
        assert_eq!(processors_of(session.id(), thread), processors, "{thread}");
    }
    drop(session);

    for (option, list, says) in [
        ("--vcpu-affinity", "4000", "may use the host's CPUs"),
        ("--io-affinity", "0-1023", "may use the host's CPUs"),
        ("--io-affinity", "0-", "not a list of CPUs"),
        ("--vcpu-affinity", "0,0", "name one for each of the --cpus 1"),
    ] {
        let mut command = small_guest(directory.path(), Program::PowerOff);
        let ended = Session::start(command.args([option, list])).wait(BOUND).must_be(2);
        assert!(ended.errors.contains(option) && ended.errors.contains(says), "{ended}");
        assert_eq!(ended.errors.lines().count(), 1, "{ended}");
    }
}

/// Whatever this host's KVM can: a guest whose HLT runs without exits, or the line that says it cannot.
#[test]
fn an_idle_vcpu_may_stay_in_the_guest() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::PowerOff);
    command.args(["--overcommit", "cpu-pm=on"]);
    let ended = Session::start(&mut command).wait(BOUND);
    let refusal = "minivmm: --overcommit cpu-pm=on: this host's KVM does not let a guest's HLT run without exits \
                   (KVM_CAP_X86_DISABLE_EXITS); leave the option out\n";
    match ended.code() {
        0 => assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}"),
        code => assert_eq!((code, ended.errors.as_str()), (2, refusal), "{ended}"),
    }
}

/// Whatever this host has: a guest on huge pages, or the command that makes them.
#[test]
fn huge_pages() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let run = |memory| {
        fs::write(directory.path().join("guest.elf"), image::pvh(Program::BootPvh)).unwrap();
        let mut command = minivmm(["--kernel", "guest.elf", "--memory", memory, "--hugepages"]);
        Session::start(command.current_dir(directory.path())).wait(BOUND)
    };
    let ended = run("17M");
    assert_eq!(ended.code(), 2, "{ended}");
    assert!(ended.errors.contains("a multiple of 2M"), "{ended}");
    let ended = run("32M");
    if ended.code() != 0 {
        assert!(
            ended.errors.contains("echo ") && ended.errors.contains(">/proc/sys/vm/nr_hugepages"),
            "{ended}"
        );
        assert_eq!((ended.code(), ended.errors.lines().count()), (1, 1), "{ended}");
        skip("too few huge pages here");
        return;
    }
    assert!(String::from_utf8_lossy(&ended.output).contains("RSD PTR"), "{ended}");
}

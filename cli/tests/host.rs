//! Hosts that lack something: one line with the fix, exit status 1.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, image, kvm_is_usable, minivmm, small_guest};
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

/// The processors that the thread `name` of the process may run on, as /proc lists them.
fn processors_of(process: u32, name: &str) -> String {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap().path());
    let mut named = tasks.filter(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == name);
    let status = fs::read_to_string(named.next().expect("there is such a thread").join("status")).unwrap();
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
    let all = processors_of(std::process::id(), fs::read_to_string("/proc/self/comm").unwrap().trim());
    let (first, last) = (all.split([',', '-']).next().unwrap(), all.rsplit([',', '-']).next().unwrap());
    let mut command = small_guest(directory.path(), Program::Echo);
    command.args(["--cpus", "2", "--disk", "disk.img"]);
    let session = Session::start(command.args(["--vcpu-affinity", &format!("{last},{first}"), "--io-affinity", last]));
    session.expect("ready\n", BOUND);
    for (thread, processors) in
        [("vcpu-0", last), ("vcpu-1", first), ("disk-vda-0", last), ("console", &all), ("minivmm", &all)]
    {
        assert_eq!(processors_of(session.id(), thread), processors, "{thread}");
    }
    drop(session);

    for (option, list, says) in [
        ("--vcpu-affinity", "4000", "may use the host's processors"),
        ("--io-affinity", "0-1023", "may use the host's processors"),
        ("--io-affinity", "0-", "write numbers and ranges"),
        ("--vcpu-affinity", "0,0", "name one for each of the --cpus 1"),
    ] {
        let mut command = small_guest(directory.path(), Program::PowerOff);
        let ended = Session::start(command.args([option, list])).wait(BOUND).must_be(2);
        assert!(ended.errors.contains(option) && ended.errors.contains(says), "{ended}");
        assert_eq!(ended.errors.lines().count(), 1, "{ended}");
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
        assert!(ended.errors.contains("echo ") && ended.errors.contains(">/proc/sys/vm/nr_hugepages"), "{ended}");
        assert_eq!((ended.code(), ended.errors.lines().count()), (1, 1), "{ended}");
        println!("skipped: too few huge pages here");
        return;
    }
    assert!(String::from_utf8_lossy(&ended.output).contains("RSD PTR"), "{ended}");
}

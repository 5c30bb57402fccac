//! What a parent process can leave behind: signal masks and dispositions, closed descriptors, a umask, limits, a working
//! directory that is gone. In each case the VM runs, ends and leaves its files as it always does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, skip, small_guest, unexpected_lines};
use rustix::process::Signal;
use serde_json::json;
use tempfile::tempdir;

/// minivmm behind a shell that leaves something behind and then runs it by `exec "$@"`.
fn child_of(shell: &str, directory: &Path, program: Program) -> Command {
    let vm = small_guest(directory, program);
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh"]).arg(vm.get_program());
    command.args(["--kernel".into(), directory.join("guest.elf")]);
    command.args(["--memory", "32M"]).current_dir(directory);
    command
}

/// A guest that never leaves the vCPU by itself ends at once when the user wants it to.
#[test]
fn signals_end_the_vm_whatever_the_parent_blocked_or_ignored() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join("socket");
    for (shell, signal) in [
        ("exec env --block-signal \"$@\"", Signal::TERM),
        ("exec env --block-signal \"$@\"", Signal::INT),
        ("exec env --ignore-signal \"$@\"", Signal::TERM),
        ("exec env --ignore-signal --block-signal \"$@\"", Signal::QUIT),
        ("exec env --default-signal \"$@\"", Signal::HUP),
        ("trap '' INT QUIT; exec \"$@\"", Signal::INT),
    ] {
        let mut command = child_of(shell, directory.path(), Program::Spin);
        let session = Session::start(command.args(["--cpus", "2", "--qmp", "unix:socket"]));
        // The guest runs, and its vCPUs can be taken out of it.
        let mut qmp = Qmp::connect(&socket);
        qmp.query("stop");
        qmp.query("cont");
        session.signal(signal);
        // A vCPU that cannot be taken out of the guest makes it 1.
        session.wait(BOUND).must_be(0);
    }
}

/// The C library's own signals (SIGCANCEL and SIGSETXID), which posix_spawn(3) makes a new program ignore.
const INTERNAL: [i32; 2] = [32, 33];

/// Gives these their default action, as in a child of a shell.
#[expect(unsafe_code, reason = "the C library's sigaction refuses them")]
fn has_internal_signals(command: &mut Command) {
    let reset = || {
        for signal in INTERNAL {
            let default = [0_u64; 4];
            // SAFETY: the call reads the kernel's `struct sigaction`, which lives across it.
            unsafe {
                libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0_usize, 8_usize)
            };
        }
        Ok(())
    };
    // SAFETY: `reset` allocates nothing and takes no lock.
    unsafe { command.pre_exec(reset) };
}

/// Sends the signal of this number, which may be one without a name (SIGRTMIN+3 and others).
fn send(session: &Session, signal: i32) {
    let sent = Command::new("kill").args([format!("-{signal}"), session.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Each signal that Linux has, by its number (signal(7)): no default action ends a VM without its disks having been flushed.
#[test]
fn every_signal_ends_the_vm_cleanly_or_does_nothing_unless_it_means_a_crash() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let start = |shell| {
        let mut command = child_of(shell, directory.path(), Program::Echo);
        has_internal_signals(&mut command);
        let mut session = Session::start(&mut command);
        session.expect("ready\n", BOUND);
        session.send("x");
        session.expect("x", BOUND);
        session
    };
    // The last three stand for those from SIGRTMIN to SIGRTMAX.
    let ends = [1, 2, 3, 10, 12, 14, 15, 16, 24, 26, 27, 30, 34, 37, 64];
    for signal in ends {
        let session = start("exec \"$@\"");
        send(&session, signal);
        let ended = session.wait(BOUND);
        assert_eq!(ended.code(), 0, "signal {signal}: {ended}");
        let line = format!("minivmm: signal {signal} ended the VM; `kill -l {signal}` names it");
        let is_known = [1, 2, 3, 15].contains(&signal);
        assert!(ended.errors.contains(&line) != is_known, "signal {signal}: {ended}");
    }
    let mut session = start("exec \"$@\"");
    INTERNAL.into_iter().for_each(|signal| send(&session, signal));
    session.send("still here");
    session.expect("still here", BOUND);
    send(&session, 15);
    session.wait(BOUND).must_be(0);
    // What the parent ignores stays ignored, but for the signals by which users end a VM.
    let mut session = start("exec env --ignore-signal \"$@\"");
    let always = [2, 3, 15];
    for signal in [13, 17, 18, 23, 25, 28, 29].into_iter().chain(ends) {
        if !always.contains(&signal) {
            send(&session, signal);
        }
    }
    session.send("still here");
    session.expect("still here", BOUND);
    send(&session, 15);
    session.wait(BOUND).must_be(0);
    // Crashes: systemd's watchdog sends SIGABRT for a core dump. (Rust's library handles SIGBUS and SIGSEGV.)
    for signal in [4, 5, 6, 8, 31] {
        let session = start("ulimit -c 0; exec \"$@\"");
        send(&session, signal);
        session.wait(BOUND).must_be(128 + signal);
    }
}

/// At the hard limit, which is often the soft one, too, the kernel would kill the VM. At the soft one it sends SIGXCPU.
#[test]
fn a_limit_on_time_ends_the_vm_before_the_kernel_kills_it() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let real_time = "prlimit --rttime=1000000:1000000 chrt --rr 1";
    let may_be_real_time =
        Command::new("sh").args(["-c", &format!("exec {real_time} true")]).status().unwrap();
    let mut shells = vec!["ulimit -t 2; exec \"$@\"".to_owned()];
    match may_be_real_time.success() {
        true => shells.push(format!("exec {real_time} \"$@\"")),
        false => skip("no real-time priority here"),
    }
    for shell in shells {
        let mut command = child_of(&shell, directory.path(), Program::Spin);
        let ended = Session::start(&mut command).wait(BOUND);
        assert_eq!(ended.code(), 0, "{shell}: {ended}");
        assert!(ended.errors.contains("signal 24 ended the VM"), "{shell}: {ended}");
    }
    let mut command = child_of("ulimit -t 1; exec \"$@\"", directory.path(), Program::Spin);
    let ended = Session::start(&mut command).wait(BOUND).must_be(1);
    let expected =
        "minivmm: the limit on CPU time is too low; set it (`ulimit -t`) to 2 seconds or more\n";
    assert_eq!(ended.errors, expected);
}

/// What tunables make glibc's malloc and threads do, a confined thread may do. A limit on stacks that Rust's library reads is no limit here.
#[test]
fn a_machine_is_saved_whatever_the_libraries_are_told() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for (name, value) in [
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.mem.decorate_maps=1"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2:glibc.malloc.mmap_threshold=4096"),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.trim_threshold=1"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=64:glibc.malloc.arena_test=64"),
        ("GLIBC_TUNABLES", "glibc.malloc.perturb=85:glibc.malloc.check=3"),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0:glibc.pthread.stack_cache_size=0"),
        ("GLIBC_TUNABLES", "glibc.pthread.stack_hugetlb=0:glibc.pthread.mutex_spin_count=0"),
        ("RUST_MIN_STACK", "1"),
        ("RUST_MIN_STACK", "100000000000"),
    ] {
        sparse(&at("disk.img"), 1 << 20);
        let mut command = child_of("exec \"$@\"", directory.path(), Program::Spin);
        command.args(["--disk", "disk.img", "--qmp", "unix:socket", "--save-directory", "."]);
        let session = Session::start(command.env(name, value));
        let mut qmp = Qmp::connect(&at("socket"));
        qmp.execute("migrate", json!({ "uri": format!("file:{}", at("saved").display()) }))
            .unwrap();
        while qmp.query("query-migrate")["status"] == "active" {}
        assert_eq!(qmp.query("query-migrate")["status"], "completed", "{name}={value}");
        qmp.query("quit");
        let ended = session.wait(BOUND);
        assert!(
            ended.code() == 0 && unexpected_lines(&ended.errors).is_empty(),
            "{name}={value}: {ended}"
        );
        fs::remove_file(at("saved")).unwrap();
    }
}

/// The kernel then keeps no exit status of a program, unless minivmm corrects it.
#[test]
fn a_directory_becomes_a_disk_although_the_parent_ignores_the_ends_of_children() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    fs::create_dir(directory.path().join("d")).unwrap();
    let shell = "exec env --ignore-signal=CHLD \"$@\"";
    let mut command = child_of(shell, directory.path(), Program::Exit);
    let ended = Session::start(command.args(["--debug-exit", "--disk", "d"])).wait(BOUND);
    ended.must_be(guest::SUCCESS);
}

/// nohup keeps its promise: the terminal's end is not the VM's.
#[test]
fn an_ignored_hangup_stays_ignored() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = child_of("trap '' HUP; exec \"$@\"", directory.path(), Program::Echo);
    let mut session = Session::start(command.arg("--debug-exit"));
    session.expect("ready\n", BOUND);
    session.signal(Signal::HUP);
    session.send("still here");
    session.expect("still here", BOUND);
    session.send([4]);
    session.wait(BOUND).must_be(guest::SUCCESS);
}

/// What is printed must not land in a file that got the number of a standard descriptor; and a VM whose home is gone, or that
/// starts with few descriptors, works.
#[test]
fn the_guest_runs_and_its_disk_holds_what_it_wrote() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let written: Vec<u8> =
        (0..guest::DISK_SECTORS as u32).flat_map(|sector| guest::words(sector, 128)).collect();
    for shell in [
        "exec \"$@\" <&-",
        "exec \"$@\" >&-",
        "exec \"$@\" 2>&-",
        "exec \"$@\" <&- >&- 2>&-",
        "exec \"$@\" </dev/null >/dev/full 2>/dev/full",
        "mkdir gone && cd gone && rmdir ../gone && exec \"$@\"",
        "cd / && exec \"$@\"",
        "ulimit -S -n 20; exec \"$@\"",
        "ulimit -S -s 64; exec \"$@\"",
        "umask 777; exec \"$@\"",
        "exec env -i \"$@\"",
    ] {
        sparse(&image, guest::DISK_SECTORS * 512);
        let mut command = child_of(shell, directory.path(), Program::DiskLoad);
        command.args(["--debug-exit", "--verbose", "--cpus", "8", "--disk"]).arg(&image);
        Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS);
        assert!(fs::read(&image).unwrap() == written, "{shell}: the image has other content");
    }
}

#[test]
fn a_stack_that_is_too_small_is_said_in_one_line() {
    let directory = tempdir().unwrap();
    for kibibytes in [64, 128] {
        let shell = format!("ulimit -s {kibibytes}; exec \"$@\"");
        let mut command = child_of(&shell, directory.path(), Program::Exit);
        let ended = Session::start(&mut command).wait(BOUND).must_be(1);
        assert_eq!(
            ended.errors,
            "minivmm: the stack is too small; set the limit on it (`ulimit -s`) to 256 KiB or more\n"
        );
    }
}

/// A limit on the size of files holds for what a command prints, too.
#[test]
fn output_beyond_the_limit_on_files_is_an_error() {
    let directory = tempdir().unwrap();
    let mut command =
        child_of("ulimit -f 1; exec \"$1\" --help >out", directory.path(), Program::Exit);
    let ended = Session::start(&mut command).wait(BOUND).must_be(1);
    assert_eq!(ended.errors, "minivmm: standard output: File too large (os error 27)\n");
}

#[test]
fn new_files_are_private_with_every_umask() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for umask in ["0", "22", "777"] {
        let shell = format!("umask {umask}; exec \"$@\"");
        let mut command = child_of(&shell, directory.path(), Program::Spin);
        let session =
            Session::start(command.args(["--console", "file:log", "--qmp", "unix:socket"]));
        let mut qmp = Qmp::connect(&directory.path().join("socket"));
        for name in ["log", "socket"] {
            let mode = fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name} with umask {umask}");
        }
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
        fs::remove_file(directory.path().join("log")).unwrap();
    }
}

//! Tests of the filters: a child process applies the filter of a kind and makes the system calls that an attacker would make.
//!
//! The child is this test program again, with one test and an environment variable that names what to try.

#![expect(unsafe_code, reason = "system calls that have to fail")]

mod programs;

use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use seccompiler::SeccompAction;

use super::filters::{self, Kind};
use super::inputs::Needs;
use super::{ioctls, privileges, violation};

const TRY: &str = "MINIVMM_TEST_TRY";

const NEEDS: Needs = Needs { process: 0, scsi: false, saves: false, debugs: false };

fn needs() -> Needs {
    Needs { process: std::process::id(), ..NEEDS }
}

fn in_child(what: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let child = ["--exact", "sandbox::tests::child", "--nocapture", "--test-threads=1"];
    let mut command = Command::new(program);
    command.args(child).env(TRY, what);
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = {
        let _turn = without_forks();
        command.spawn().unwrap()
    };
    child.wait_with_output().unwrap()
}

/// While the guard is held, no test starts a child. Until a new child calls execve(2), it has copies of all descriptors. A test that
/// waits until a file or socket is closed must not run at that moment.
pub(crate) fn without_forks() -> MutexGuard<'static, ()> {
    static FORKS: Mutex<()> = Mutex::new(());
    FORKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each kind must not do, by name.
const ATTACKS: [&str; 9] = [
    "openat",
    "execve",
    "socket",
    "clone",
    "clone3",
    "ptrace",
    "mprotect(PROT_EXEC)",
    "mmap(PROT_EXEC)",
    "ioctl(KVM_CREATE_VM)",
];

fn attack(name: &str) {
    let path = c"/etc/passwd".as_ptr();
    let exec = libc::PROT_READ | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a filter refuses each of these before it does anything; the arguments are valid anyway.
    unsafe {
        match name {
            "openat" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDONLY),
            "execve" => libc::syscall(libc::SYS_execve, c"/bin/true".as_ptr(), 0, 0),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "clone" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            "clone3" => libc::syscall(libc::SYS_clone3, 0, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            "mprotect(PROT_EXEC)" => libc::syscall(libc::SYS_mprotect, 0, 4096, exec),
            "mmap(PROT_EXEC)" => libc::syscall(libc::SYS_mmap, 0, 4096, exec, anonymous, -1, 0),
            "ioctl(KVM_CREATE_VM)" => libc::syscall(libc::SYS_ioctl, 3, ioctls::KVM_CREATE_VM, 0),
            other => panic!("{other}"),
        };
    }
}

/// What glibc's malloc does by its tunables hugetlb and decorate_maps.
fn ask_for_memory() {
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (vma, name) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME);
    // SAFETY: nothing else uses the memory. The kernel may refuse the advice and the name; only the filter matters here.
    unsafe {
        let memory = libc::mmap(std::ptr::null_mut(), 4 << 20, access, kind, -1, 0);
        libc::madvise(memory, 4 << 20, libc::MADV_HUGEPAGE);
        libc::prctl(vma, name, memory, 4 << 20, c" glibc: malloc".as_ptr());
    }
}

/// Not a test by itself: the other tests run it in a child process.
#[test]
fn child() {
    let Ok(what) = std::env::var(TRY) else { return };
    let (kind, what) = what.split_once(' ').unwrap();
    let kind = Kind::ALL.into_iter().find(|known| known.name() == kind).unwrap();
    let filter = filters::compile(kind, needs(), SeccompAction::Trap).unwrap();
    match what.strip_prefix("handled ") {
        Some(_) => {
            violation::install_handler();
            violation::name_thread(kind);
        }
        None if what == "paths" => {
            privileges::drop_privileges().unwrap();
            let ruleset = privileges::no_paths(&[], None).unwrap();
            let Some(ruleset) = ruleset else {
                println!("no Landlock");
                return;
            };
            privileges::restrict(&ruleset).unwrap();
            let opened = std::fs::File::open("/etc/passwd").map_err(|error| error.kind());
            assert_eq!(opened.err(), Some(std::io::ErrorKind::PermissionDenied));
            println!("refused");
            return;
        }
        None => {}
    }
    seccompiler::apply_filter(&filter).unwrap();
    let what = what.strip_prefix("handled ").unwrap_or(what);
    match what {
        "nothing" => {}
        "memory" => ask_for_memory(),
        _ => attack(what),
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(7) };
}

#[test]
fn each_kind_dies_of_what_it_must_not_do() {
    for kind in Kind::ALL.map(Kind::name) {
        let ended = in_child(&format!("{kind} nothing"));
        assert_eq!(ended.status.code(), Some(7), "{kind} without an attack: {ended:?}");
        let ended = in_child(&format!("{kind} memory"));
        assert_eq!(ended.status.code(), Some(7), "{kind} asks for memory: {ended:?}");
        let its_purpose = |attack: &str| (kind, attack) == ("save", "clone");
        for attack in ATTACKS.into_iter().filter(|attack| !its_purpose(attack)) {
            let ended = in_child(&format!("{kind} {attack}"));
            assert_eq!(ended.status.signal(), Some(libc::SIGSYS), "{kind}, {attack}: {ended:?}");
        }
    }
}

#[test]
fn a_violation_is_one_line_and_exit_status_1() {
    for kind in [Kind::Main, Kind::Vcpu] {
        let ended = in_child(&format!("{} handled socket", kind.name()));
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let errors = String::from_utf8(ended.stderr).unwrap();
        let expected =
            format!("minivmm: sandbox: thread {} made the system call 41 (socket)", kind.name());
        assert!(errors.starts_with(&expected) && errors.lines().count() == 1, "{errors}");
    }
}

#[test]
fn landlock_refuses_paths() {
    let ended = in_child("vcpu paths");
    assert!(ended.status.success(), "{ended:?}");
    let output = String::from_utf8(ended.stdout).unwrap();
    if !output.contains("refused") {
        eprintln!("skipped: this host has no Landlock: {output}");
    }
}

/// The table of `vmm/docs/sandbox.md`.
fn table() -> String {
    let lists = Kind::ALL.map(|kind| filters::allowed(kind, NEEDS));
    let mut names: Vec<_> = lists.iter().flatten().map(|call| call.name).collect();
    names.sort_unstable();
    names.dedup();
    let mut table = String::from(
        "| system call | main | vcpu | disk | disk-io | console | registers | save |\n|---|---|---|---|---|---|---|---|\n",
    );
    for name in names {
        write!(table, "| {name} |").unwrap();
        for list in &lists {
            let calls: Vec<_> = list.iter().filter(|call| call.name == name).collect();
            let conditions: Vec<_> = calls.iter().map(|call| call.condition).collect();
            let conditions = conditions.join("; ");
            let cell = match calls[..] {
                [] => "",
                _ if conditions.is_empty() => "yes",
                _ => &conditions,
            };
            write!(table, " {cell} |").unwrap();
        }
        table.push('\n');
    }
    table
}

#[test]
fn the_chapter_shows_the_lists() {
    const CHAPTER: &str = include_str!("../../docs/sandbox.md");
    let table = table();
    assert!(CHAPTER.contains(&table), "replace the table of vmm/docs/sandbox.md by:\n{table}");
}

#[test]
fn only_the_main_thread_of_a_machine_with_a_debugger_may_debug_vcpus() {
    for (kind, debugs) in Kind::ALL.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let calls = filters::allowed(kind, Needs { debugs, ..NEEDS });
        let may = calls.iter().any(|call| call.condition.contains("KVM_SET_GUEST_DEBUG"));
        assert_eq!(may, debugs && kind == Kind::Main, "{kind:?}, {debugs}");
    }
}

/// Firecracker 1.14 allows 50 to its VMM thread, 31 to its API thread, and 27 to each vCPU.
#[test]
fn the_lists_are_short() {
    for (kind, most) in [
        (Kind::Main, 50),
        (Kind::Vcpu, 27),
        (Kind::Disk, 50),
        (Kind::DiskIo, 50),
        (Kind::Console, 27),
        (Kind::Registers, 27),
        (Kind::Save, 40),
    ] {
        let mut names: Vec<_> =
            filters::allowed(kind, NEEDS).iter().map(|call| call.name).collect();
        names.sort_unstable();
        names.dedup();
        println!("{}: {} system calls", kind.name(), names.len());
        assert!(names.len() <= most, "{}: {}", kind.name(), names.len());
    }
}

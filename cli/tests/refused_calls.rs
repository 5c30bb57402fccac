//! Each system call of a run, refused by a seccomp filter: the guest is served all the same, or one line says what the host
//! refuses, with exit status 1.
//!
//! strace(1) lists what a run calls on this host, down to the requests of ioctl(2). There are two runs for each of these calls and
//! each errno of [`errnos`]. What the user sees has to be what `vmm/docs/refused-system-calls.md` says.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, DISK_SECTORS, Program, words};
use minivmm_tests::refusal::{Call, refuse};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, skip, small_guest, unexpected_lines};
use rustix::process::Signal;
use tempfile::tempdir;

/// Calls that are not refused: by what starts the program, and those without which a thread cannot end.
const NOT_REFUSED: [&str; 4] = ["execve", "exit", "exit_group", "rt_sigreturn"];

/// What a filter answers to `call`, and what a kernel that is short of something does.
fn errnos(call: &str) -> Vec<(&'static str, i32)> {
    let mut errnos = vec![("EPERM", libc::EPERM), ("ENOSYS", libc::ENOSYS)];
    match call {
        "clone3" | "io_uring_enter" => errnos.push(("EAGAIN", libc::EAGAIN)),
        "accept4"
        | "epoll_create1"
        | "epoll_ctl"
        | "eventfd2"
        | "io_uring_setup"
        | "madvise"
        | "signalfd4"
        | "timerfd_create"
        | "KVM_CREATE_VM"
        | "KVM_CREATE_VCPU"
        | "KVM_IOEVENTFD"
        | "KVM_SET_USER_MEMORY_REGION" => errnos.push(("ENOMEM", libc::ENOMEM)),
        _ => {}
    }
    errnos
}

#[derive(Clone, Copy, Debug)]
enum Run {
    /// The guest fills its disk, flushing after each write, and ends the machine.
    Guest,
    /// A client stops and resumes the machine, resizes its disk and ends it, while the guest writes.
    Client,
}

fn vm(directory: &Path, run: Run) -> Command {
    for name in ["first", "second", "qmp"] {
        let _ = fs::remove_file(directory.join(name));
    }
    let (program, first, second) = match run {
        Run::Guest => (Program::DiskSync, "raw", "qcow2"),
        Run::Client => (Program::DiskLoad, "qcow2", "raw"),
    };
    let mut command = small_guest(directory, program);
    command.args(["--qmp", "unix:qmp"]);
    if matches!(run, Run::Guest) {
        command.arg("--debug-exit");
    }
    for (name, format) in [("first", first), ("second", second)] {
        match format {
            "raw" => sparse(&directory.join(name), DISK_SECTORS * 512),
            _ => _ = fs::copy(directory.join("empty.qcow2"), directory.join(name)).unwrap(),
        }
        command.args(["--disk", &format!("{name},format={format},id={name}")]);
    }
    command
}

impl Run {
    fn status(self) -> i32 {
        match self {
            Self::Guest => guest::SUCCESS,
            Self::Client => 0,
        }
    }
}

/// The calls of both runs on this host, with their names.
fn traced(directory: &Path) -> BTreeMap<Call, String> {
    let mut calls = BTreeMap::new();
    for run in [Run::Guest, Run::Client] {
        let vm = vm(directory, run);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-n", "-X", "verbose", "-o", "trace"]).arg(vm.get_program());
        let session = Session::start(strace.args(vm.get_args()).current_dir(directory));
        if matches!(run, Run::Client) {
            converse(directory, &session).unwrap();
        }
        session.wait(BOUND).must_be(run.status());
        for line in fs::read_to_string(directory.join("trace")).unwrap().lines() {
            calls.extend(parse(line));
        }
    }
    calls.retain(|_, name| !NOT_REFUSED.contains(&name.as_str()));
    calls
}

/// A line of strace: `PID [ NUMBER] NAME(ARGUMENTS...`.
fn parse(line: &str) -> Option<(Call, String)> {
    let (number, rest) = line.split_once('[')?.1.split_once(']')?;
    let (name, arguments) = rest.trim().split_once('(')?;
    let number = number.trim().parse().ok()?;
    if name.starts_with('<') {
        return None;
    }
    if name != "ioctl" {
        return Some((Call { number, request: None }, name.to_owned()));
    }
    // `FD, NUMBER /* NAME */, ...`; some requests have several names.
    let (request, name) = arguments.split_once(", ")?.1.split_once(" /* ")?;
    let request = u32::from_str_radix(request.strip_prefix("0x")?, 16).ok()?;
    let name = name.split(" */").next()?.split(" or ").next()?;
    Some((Call { number, request: Some(request) }, name.to_owned()))
}

/// How long an answer may take. Some calls are needed for any, so that their rows wait for all of it.
const ANSWER: Duration = Duration::from_secs(20);

/// Talks to the control socket until the machine ends.
fn converse(directory: &Path, session: &Session) -> Result<(), String> {
    let mut reader = loop {
        match UnixStream::connect(directory.join("qmp")) {
            Ok(stream) => break BufReader::new(stream),
            Err(error) if session.ends_within(Duration::ZERO) => return Err(error.to_string()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    // The guest uses its disk.
    session.output.expect_bytes(1, ANSWER)?;
    reader.get_mut().set_read_timeout(Some(ANSWER)).unwrap();
    for command in [
        r#"{"execute":"qmp_capabilities"}"#,
        r#"{"execute":"stop"}"#,
        r#"{"execute":"block_resize","arguments":{"device":"first","size":67108864}}"#,
        r#"{"execute":"cont"}"#,
        r#"{"execute":"quit"}"#,
    ] {
        reader.get_mut().write_all(command.as_bytes()).map_err(|error| error.to_string())?;
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            let count = reader.read_line(&mut line).map_err(|error| error.to_string())?;
            if count == 0 || line.contains("\"error\"") {
                return Err(line);
            }
        }
    }
    Ok(())
}

/// What a user sees of `run` while `call` fails with `errno`.
fn outcome(directory: &Path, run: Run, call: Call, errno: i32) -> String {
    let session = Session::start(refuse(&mut vm(directory, run), call, errno));
    let mut is_served = true;
    if matches!(run, Run::Client) {
        is_served = converse(directory, &session).is_ok();
        if !is_served && !session.ends_within(Duration::ZERO) {
            session.signal(Signal::TERM);
        }
    }
    let Some(ended) = session.wait_within(BOUND) else { return "HANGS".to_owned() };
    if ended.code() == guest::SUCCESS {
        let disk = fs::read(directory.join("first")).unwrap();
        let right = (0..DISK_SECTORS as u32).flat_map(|sector| words(sector, 128));
        assert!(disk == right.collect::<Vec<_>>(), "{call:?}: the disk's content is wrong");
    }
    describe(&ended, run.status(), is_served, errno)
}

fn describe(ended: &Ended, success: i32, is_served: bool, errno: i32) -> String {
    let errno = io::Error::from_raw_os_error(errno).to_string();
    let errors = ended.errors.replace(&errno, "ERRNO").replace('`', "'");
    let mut lines = unexpected_lines(&errors);
    // Some are repeated at a limited rate, with the number of those that were not.
    let suppressed = |line: &str| line.ends_with(" more like this not printed)");
    let lines_with = lines.iter_mut().filter(|line| suppressed(line));
    lines_with.for_each(|line| *line = line.rsplit_once(" (").unwrap().0);
    lines.dedup();
    let own = lines.iter().all(|line| line.starts_with("minivmm: "));
    let said = lines.iter().map(|line| format!("; `{}`", line.trim_start_matches("minivmm: ")));
    let said: String = said.collect();
    match ended.code() {
        code if code == success && is_served && said.is_empty() => "served".to_owned(),
        code if code == success && is_served => format!("served{said}"),
        code if code == success => format!("the client is not served{said}"),
        1 if own => format!("exit status 1{said}"),
        127 => "the dynamic loader ends the process: exit status 127".to_owned(),
        134 if !own || lines.is_empty() => "Rust's runtime ends the process: SIGABRT".to_owned(),
        139 if lines.is_empty() => "the dynamic loader crashes: SIGSEGV".to_owned(),
        code => format!("WRONG: exit status {code}{said}"),
    }
}

/// The rows of the table in the chapter: `| call | errnos | the guest's run | the client's run |`, and the calls outside of it, which
/// are served without a line.
fn documented() -> (BTreeSet<&'static str>, BTreeSet<&'static str>) {
    let chapter = include_str!("../../vmm/docs/refused-system-calls.md");
    let rows = chapter.lines().filter(|line| line.starts_with("| `")).collect();
    let served = chapter.split("<!-- served -->").nth(1).unwrap();
    (rows, served.split('`').skip(1).step_by(2).collect())
}

/// One row for each way that a call ends.
fn rows(name: &str, outcomes: &[(&str, [String; 2])]) -> Vec<String> {
    let mut ways: Vec<([String; 2], Vec<&str>)> = Vec::new();
    for (errno, outcome) in outcomes {
        match ways.iter_mut().find(|way| way.0 == *outcome) {
            Some(way) => way.1.push(errno),
            None => ways.push((outcome.clone(), vec![errno])),
        }
    }
    let row = |([guest, client], errnos): ([String; 2], Vec<&str>)| {
        let client = if guest == client { "the same".to_owned() } else { client };
        format!("| `{name}` | {} | {guest} | {client} |", errnos.join(", "))
    };
    ways.into_iter().map(row).collect()
}

#[test]
fn each_refused_call_is_served_or_named() {
    if !kvm_is_usable() {
        return;
    }
    let directories = [(); 3].map(|()| tempdir().unwrap());
    let create = ["create", "-q", "-f", "qcow2", "empty.qcow2", "32M"];
    for directory in &directories {
        let created = Command::new("qemu-img").args(create).current_dir(directory.path()).status();
        if !created.is_ok_and(|status| status.success()) {
            return skip("no qemu-img here (Debian: qemu-utils)");
        }
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("no strace here");
    }
    let calls = Mutex::new(traced(directories[0].path()));
    let found = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for directory in &directories {
            let work = || {
                loop {
                    let Some((call, name)) = calls.lock().unwrap().pop_first() else { return };
                    let outcomes = errnos(&name).into_iter().map(|(word, errno)| {
                        let runs = [Run::Guest, Run::Client];
                        (word, runs.map(|run| outcome(directory.path(), run, call, errno)))
                    });
                    let rows = rows(&name, &outcomes.collect::<Vec<_>>());
                    found.lock().unwrap().extend(rows);
                }
            };
            scope.spawn(work);
        }
    });
    let (rows, served) = documented();
    let is_documented = |row: &&String| {
        let call = row.split('`').nth(1).unwrap();
        let is_served = row.ends_with(" | served | the same |");
        rows.contains(row.as_str()) || is_served && served.contains(call)
    };
    let found = found.into_inner().unwrap();
    let news: Vec<_> = found.iter().filter(|row| !is_documented(row)).cloned().collect();
    assert!(news.is_empty(), "rows that the chapter does not have:\n{}", news.join("\n"));
}

//! A saved machine: how long a save and a restore take, and what a clone costs. A guest with 1 GiB of memory, of which 128 MiB are
//! in use, on any /dev/kvm. For an increment it has changed 16 of these MiB since it was restored.
//!
//! Beside the save of all and that of an increment is the host's limit: a write of as many bytes to a file in the same directory, and a
//! sync, just before the save. Just after it the host may slow writes down, until its disk has what was written.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use minivmm_tests::files::allocated;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::{image, minivmm};
use serde_json::{Value, json};

use crate::process::Process;
use crate::results::{Key, Results};
use crate::table::{LIMIT, Target};
use crate::{Options, limit, results};

/// The name of this part's results.
pub(crate) const PART: &str = "saved.json";
const GROUP: &str = "saved machine";
const INCREMENT: &str = "save of an increment";
/// Bytes of the guest's data, and of those that it changes for an increment.
const DATA: u64 = 128 << 20;
const CHANGED: u64 = 16 << 20;
const CLONES: [usize; 2] = [20, 100];
/// How long a guest may take to print something, on the most loaded of machines.
const SILENCE: Duration = Duration::from_secs(120);

/// What minivmm has to reach.
pub(crate) fn target(group: &str, row: &str) -> Option<Target> {
    Some(match row {
        _ if group != GROUP => return None,
        "save" => Target::AtMost(150.0),
        "pause of a background save" => Target::AtMost(25.0),
        "exec to the restored guest" => Target::AtMost(6.0),
        "migrate-incoming to the guest" => Target::AtMost(3.0),
        "private memory of a clone" => Target::AtMost(8192.0),
        "file, beyond the guest's data" => Target::AtMost(1024.0),
        _ => return None,
    })
}

pub(crate) fn run(options: &Options, results: &mut Results) {
    for _ in 0..options.repetitions {
        let directory = tempfile::tempdir_in(results::directory()).unwrap();
        let directory = directory.path();
        let mut limit = |row: &str, bytes| {
            let time = limit::write_and_sync(directory, bytes);
            results.add(Key::new(GROUP, row, LIMIT, "ms"), time);
        };
        limit("save", DATA);
        let [save, pause, background] = save(directory);
        let increments: Vec<_> = (0..3)
            .map(|_| {
                limit(INCREMENT, CHANGED);
                increment(directory)
            })
            .collect();
        let mut add = |row: &str, metric: &str, value| {
            results.add(Key::new(GROUP, row, "minivmm", metric), value);
        };
        add("save", "ms", save);
        add("pause of a background save", "ms", pause);
        add("background save, to its end", "ms", background);
        add("file, beyond the guest's data", "KiB", beyond(&directory.join("saved"), DATA));
        increments.into_iter().for_each(|save| add(INCREMENT, "ms", save));
        let extra = beyond(&directory.join("increment"), CHANGED);
        add("increment, beyond what changed", "KiB", extra);
        // What all clones share (the program's code, the file's pages) would be the only one's own.
        let other = start(directory);
        first_line(&other);
        other.pause();
        for _ in 0..9 {
            let clone = start(directory);
            add("exec to the restored guest", "ms", first_line(&clone).as_secs_f64() * 1e3);
            add("private memory of a clone", "KiB", memory(&clone).0);
            // Its guest prints without end.
            drop(clone);
            let clone = start_from("increment", directory, &[]);
            add("exec to the guest of an increment", "ms", first_line(&clone).as_secs_f64() * 1e3);
            drop(clone);
            add("migrate-incoming to the guest", "ms", deferred(directory));
        }
        drop(other);
        for count in CLONES.into_iter().take(if options.quick { 1 } else { 2 }) {
            let began = Instant::now();
            let clones: Vec<_> = (0..count).map(|_| start(directory)).collect();
            for clone in &clones {
                first_line(clone);
                // These guests print without end.
                clone.pause();
            }
            let row = format!("{count} clones at once");
            add(&row, "ms", began.elapsed().as_secs_f64() * 1e3);
            let each: Vec<_> = clones.iter().map(memory).collect();
            let mean = |total: f64| total / count as f64;
            add(&row, "KiB", mean(each.iter().map(|(private, _)| private).sum()));
            add(&row, "KiB with its share", mean(each.iter().map(|(_, share)| share).sum()));
        }
    }
}

/// Saves a guest to `saved`, and in the background. Returns milliseconds: of the save, of the pause in the background save, and of all
/// of that.
fn save(directory: &Path) -> [f64; 3] {
    fs::write(directory.join("guest.elf"), image::pvh(Program::Fill)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "1G", "--qmp", "unix:qmp"]);
    command.args(["--save-directory", ".", "--sandbox", "on,spawn=allow"]).current_dir(directory);
    let source = Process::start(&mut command);
    first_line(&source);
    let mut qmp = connect(&directory.join("qmp"));
    let capability = json!({ "capability": "background-snapshot", "state": true });
    let capability = json!({ "capabilities": [capability] });
    qmp.execute("migrate-set-capabilities", capability).unwrap();
    let (background, events) = save_by(&mut qmp, &directory.join("background"));
    let moment = |name: &str| {
        let event = events.iter().find(|event| event["event"] == name).unwrap();
        let [seconds, microseconds] =
            ["seconds", "microseconds"].map(|unit| event["timestamp"][unit].as_f64().unwrap());
        seconds * 1e3 + microseconds / 1e3
    };
    let pause = moment("RESUME") - moment("STOP");
    fs::remove_file(directory.join("background")).unwrap();
    [save_to(&directory.join("qmp"), &directory.join("saved")), pause, background]
}

/// KiB that the file has on the disk besides `data` bytes.
fn beyond(file: &Path, data: u64) -> f64 {
    (allocated(file) as f64 - data as f64) / 1024.0
}

/// Saves an increment on `saved` to `increment`. Returns milliseconds.
fn increment(directory: &Path) -> f64 {
    let options = ["--qmp", "unix:qmp", "--save-directory", "."];
    let mut machine = start_from("saved,map=on", directory, &options);
    first_line(&machine);
    machine.enter();
    while machine.line(SILENCE).expect("a guest that changes its memory").1 != "+" {}
    let mut qmp = connect(&directory.join("qmp"));
    let capability = json!({ "capability": "x-minivmm-incremental", "state": true });
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": [capability] })).unwrap();
    save_by(&mut qmp, &directory.join("increment")).0
}

fn connect(socket: &Path) -> Qmp {
    let mut qmp = Qmp::connect(socket);
    qmp.set_bound(SILENCE);
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.execute("migrate-set-capabilities", events).unwrap();
    qmp
}

/// Saves the machine with this control socket. Returns milliseconds.
pub(crate) fn save_to(socket: &Path, saved: &Path) -> f64 {
    let mut qmp = connect(socket);
    let in_background = json!({ "capability": "background-snapshot", "state": false });
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": [in_background] })).unwrap();
    save_by(&mut qmp, saved).0
}

/// Milliseconds, and what happened meanwhile.
fn save_by(qmp: &mut Qmp, saved: &Path) -> (f64, Vec<Value>) {
    let uri = format!("file:{}", saved.display());
    let began = Instant::now();
    qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    let mut events = std::mem::take(&mut qmp.events);
    loop {
        match events.last().and_then(|event| event["data"]["status"].as_str()) {
            Some("completed") => return (began.elapsed().as_secs_f64() * 1e3, events),
            Some("failed") => panic!("the save failed: {}", qmp.query("query-migrate")),
            _ => events.push(qmp.receive().expect("the end of a save")),
        }
    }
}

fn start(directory: &Path) -> Process {
    start_from("saved", directory, &[])
}

fn start_from(file: &str, directory: &Path, options: &[&str]) -> Process {
    let mut command = minivmm(["--incoming", &format!("file:{file}")]);
    Process::start(command.args(options).current_dir(directory))
}

/// From a client's migrate-incoming to the guest's first byte, in milliseconds.
fn deferred(directory: &Path) -> f64 {
    let mut command = minivmm(["--incoming", "defer", "--qmp", "unix:defer"]);
    let began = Instant::now();
    let process = Process::start(command.current_dir(directory));
    let mut qmp = Qmp::connect(&directory.join("defer"));
    let uri = format!("file:{}", directory.join("saved").display());
    let asked = began.elapsed();
    qmp.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
    (first_line(&process).saturating_sub(asked)).as_secs_f64() * 1e3
}

/// When after exec the guest printed its first byte.
fn first_line(process: &Process) -> Duration {
    process.line(SILENCE).unwrap_or_else(|why| panic!("a guest to save or to restore: {why}")).0
}

/// KiB of the process that no other has, and with its share of what others have, too.
pub(crate) fn memory(process: &Process) -> (f64, f64) {
    let path = format!("/proc/{}/smaps_rollup", process.id());
    let text = fs::read_to_string(path).unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(f64::NAN)
    };
    (value("Private_Clean:") + value("Private_Dirty:"), value("Pss:"))
}

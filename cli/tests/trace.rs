//! `--trace`: what a trace has, read back as its readers do, and what happens when it cannot be written.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::perfetto::Trace;
use minivmm_tests::qmp::{self, Qmp};
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::xml::elements;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest, unexpected_lines};
use serde_json::{Value, json};
use tempfile::tempdir;

const REQUESTS: u64 = 1000;
const EVERYTHING: &str = "*,file=trace,format=";

/// Runs a guest that writes a disk of [`REQUESTS`] sectors, one a request.
fn write_disk(directory: &Path, trace: &str) -> Ended {
    sparse(&directory.join("disk.img"), REQUESTS * 512);
    let mut command = small_guest(directory, Program::DiskLoad);
    command.args(["--debug-exit", "--disk", "disk.img", "--trace", trace]);
    Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS)
}

/// The objects of a file with one on each line.
fn objects(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
        .collect()
}

fn texts<'a>(events: &'a [Value], name: &str, field: &str) -> BTreeSet<&'a str> {
    let of_name = events.iter().filter(|event| event["event"] == name);
    of_name.filter_map(|event| event[field].as_str()).collect()
}

#[test]
fn every_request_of_a_trace_has_its_stations_in_order() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let ended = write_disk(directory.path(), &format!("{EVERYTHING}json"));
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    let events = objects(&directory.path().join("trace"));
    let mut lives: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    let mut interrupted = BTreeSet::new();
    for event in &events {
        if let Some(request) = event["req"].as_u64() {
            lives.entry(request).or_default().push(event);
        }
        for request in event["reqs"].as_array().into_iter().flatten() {
            let request = request.as_u64().unwrap();
            let last = lives[&request].last().unwrap();
            assert_eq!(last["event"], "virtio_blk_req_complete", "{last}");
            assert!(interrupted.insert(request), "{request} was interrupted for twice");
        }
    }
    assert!(lives.keys().copied().eq(1..=REQUESTS), "{} requests", lives.len());
    assert!(!interrupted.is_empty());
    for (request, life) in &lives {
        let stations: Vec<_> = life.iter().map(|event| event["event"].as_str().unwrap()).collect();
        let expected = ["handle_write", "submit", "rw_complete", "req_complete"];
        assert_eq!(stations, expected.map(|name| format!("virtio_blk_{name}")), "{request}");
        let times: Vec<_> = life.iter().map(|event| event["time_us"].as_f64().unwrap()).collect();
        assert!(times.is_sorted(), "{request}: {times:?}");
        assert_eq!((&life[0]["sector"], &life[0]["nsectors"]), (&json!(request - 1), &json!(1)));
        assert_eq!(life[3]["status"], 0);
        assert!(life[1..].iter().all(|event| event["since_us"].is_number()), "{life:?}");
    }
    for (name, thread) in [("virtio_queue_notify", "disk-vda-0"), ("irq_pulse", "disk-vda-0")] {
        assert_eq!(texts(&events, name, "thread"), BTreeSet::from([thread]), "{name}");
    }
    let phases = texts(&events, "boot_phase", "phase");
    assert!(phases.contains("files opened") && phases.contains("first KVM_RUN"), "{phases:?}");
}

#[test]
fn exits_are_decoded() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    write_disk(directory.path(), "kvm_*,file=trace,format=json");
    let events = objects(&directory.path().join("trace"));
    assert!(events.iter().all(|event| event["event"] == "kvm_run_exit"));
    let status = events.iter().find(|event| event["register"] == "Status").unwrap();
    assert_eq!(
        (&status["reason"], &status["address"]),
        (&json!("mmio_write"), &json!("0xd0000070"))
    );
    assert_eq!((&status["device"], &status["size"]), (&json!("virtio-mmio0"), &json!(4)));
    assert_eq!((&status["clause"], &status["value"]), (&json!("virtio 1.2 §2.1"), &json!("0x0")));
    let dots = events.iter().filter(|event| event["register"] == "RBR/THR");
    let dots = dots.filter(|event| event["value"] == "0x2e" && event["reason"] == "port_write");
    assert_eq!(dots.count() as u64, REQUESTS);
}

#[test]
fn a_trace_for_perfetto_has_a_track_for_each_thread_and_an_arrow_for_each_request() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    write_disk(directory.path(), &format!("{EVERYTHING}perfetto"));
    let trace = Trace::read(&fs::read(directory.path().join("trace")).unwrap());
    for name in ["main", "vcpu-0", "disk-vda-0"] {
        assert!(trace.threads.values().any(|thread| thread == name), "{name}: {:?}", trace.threads);
    }
    assert!(trace.flows.keys().copied().eq(1..=REQUESTS), "{} requests", trace.flows.len());
    for (request, arrow) in trace.flows {
        let phases: String = arrow.iter().map(|(phase, _)| phase.as_str()).collect();
        assert!(
            ["sttt", "stttt", "stttf", "sttttf"].contains(&phases.as_str()),
            "{request}: {phases}"
        );
        assert_eq!(trace.spans[&request].0, "disk-vda-0 engine");
    }
}

#[test]
fn requests_become_a_picture() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    write_disk(directory.path(), &format!("{EVERYTHING}json"));
    let mut command = minivmm(["trace-view", "trace", "--svg", "--requests", "5"]);
    let ended = Session::start(command.current_dir(directory.path())).wait(BOUND).must_be(0);
    let svg = String::from_utf8(ended.output).unwrap();
    let elements = elements(&svg);
    let count = |name: &str, text: &str| {
        let of_name = elements.iter().filter(|element| element.name == name);
        of_name.filter(|element| element.text.starts_with(text)).count()
    };
    for (request, sector) in (1..=5).zip(0..) {
        assert_eq!(count("text", &format!("{request}: write {sector}")), 1, "{svg}");
    }
    assert_eq!(count("title", "host's disk: "), 5);

    // Without requests there is nothing to draw.
    write_disk(directory.path(), "kvm_*,file=trace,format=json");
    let mut command = minivmm(["trace-view", "trace", "--svg"]);
    let ended = Session::start(command.current_dir(directory.path())).wait(BOUND).must_be(2);
    assert!(ended.errors.contains("it has no request with its start and its end"), "{ended}");
}

#[test]
fn a_thread_that_waits_for_the_hosts_disk_has_a_track() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for format in ["json", "perfetto"] {
        sparse(&directory.path().join("disk.img"), 8 * 512);
        let mut command = small_guest(directory.path(), Program::DiskSync);
        command.args(["--debug-exit", "--disk", "disk.img,aio=threads"]);
        command.args(["--trace", &format!("{EVERYTHING}{format}")]);
        Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS);
        if format == "json" {
            let events = objects(&directory.path().join("trace"));
            let of = |name: &str| events.iter().filter(|event| event["event"] == name).count();
            assert_eq!((of("virtio_blk_handle_write"), of("virtio_blk_handle_flush")), (8, 8));
            assert!(of("disk_io_begin") >= 8 && of("disk_io_begin") == of("disk_io_end"));
            continue;
        }
        let trace = Trace::read(&fs::read(directory.path().join("trace")).unwrap());
        let waits = trace.slices.iter().filter(|slice| slice.name == "disk_io");
        let flushes = waits.filter(|slice| slice.arguments["operation"] == "Flush");
        assert!(flushes.clone().count() >= 8);
        assert!(flushes.clone().all(|slice| slice.end > slice.start));
    }
}

#[test]
fn text_without_a_file_goes_to_standard_error() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Exit);
    command.args(["--debug-exit", "--trace", "*,-virtio_*", "--trace", "-kvm_run_exit"]);
    let ended = Session::start(&mut command).wait(BOUND).must_be(guest::SUCCESS);
    let is_phase = |line: &&str| line.contains(" boot_phase phase=");
    let lines = unexpected_lines(&ended.errors);
    assert!(lines.len() > 4 && lines.iter().all(is_phase), "{ended}");
    // A start that is refused has its trace, too.
    let mut command = small_guest(directory.path(), Program::Exit);
    command.args(["--trace", "boot_phase", "--disk", "missing.img"]);
    let ended = Session::start(&mut command).wait(BOUND).must_be(2);
    assert!(ended.errors.contains("missing.img"), "{ended}");
}

#[test]
fn a_start_that_is_refused_leaves_the_file_alone() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("trace");
    fs::write(&file, "of the last run").unwrap();
    let mut command = small_guest(directory.path(), Program::Exit);
    command.args(["--trace", "*,file=trace", "--disk", "missing.img"]);
    Session::start(&mut command).wait(BOUND).must_be(2);
    assert_eq!(fs::read_to_string(file).unwrap(), "of the last run");
}

#[test]
fn a_file_that_cannot_be_written_is_said_once_and_ends_nothing() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let ended = write_disk(directory.path(), "*,file=/dev/full");
    let lines = unexpected_lines(&ended.errors);
    let [failed, lost] = lines[..] else { panic!("{ended}") };
    assert!(
        failed.contains("--trace file=/dev/full: events may be lost: No space left"),
        "{ended}"
    );
    assert!(lost.contains("bytes were not written"), "{ended}");

    let pipe = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
    let mut options = File::options();
    let reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
    let mut command = small_guest(directory.path(), Program::Echo);
    command.args(["--debug-exit", "--trace", "kvm_*,file=pipe"]);
    let mut session = Session::start(&mut command);
    session.expect("ready\n", BOUND);
    drop(reader);
    session.send("typed\x04");
    let ended = session.wait(BOUND).must_be(guest::SUCCESS);
    assert!(ended.errors.contains("Broken pipe"), "{ended}");
}

#[test]
fn a_control_client_switches_events_on_and_off() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let options = ["--debug-exit", "--trace", "virtio_notify,file=trace,format=json"];
    let (mut session, mut qmp) = qmp::start(directory.path(), Program::Echo, &options);
    let state = |qmp: &mut Qmp, name: &str| {
        let states = qmp.execute("trace-event-get-state", json!({ "name": name })).unwrap();
        let states = states.as_array().unwrap().iter();
        states.map(|event| event["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(state(&mut qmp, "virtio_*notify"), ["disabled", "enabled"]);
    assert_eq!(state(&mut qmp, "floppy_*"), Vec::<String>::new());
    let set = |qmp: &mut Qmp, name: &str, enable: bool| {
        qmp.execute("trace-event-set-state", json!({ "name": name, "enable": enable }))
    };
    let unknown = set(&mut qmp, "floppy", true).unwrap_err();
    assert_eq!(unknown, ("GenericError".to_owned(), "unknown event \"floppy\"".to_owned()));
    session.expect("ready\n", BOUND);
    set(&mut qmp, "kvm_*", true).unwrap();
    assert_eq!(state(&mut qmp, "kvm_run_exit"), ["enabled"]);
    session.send("on");
    session.expect("on", BOUND);
    set(&mut qmp, "*", false).unwrap();
    assert_eq!(state(&mut qmp, "*_notify"), ["disabled", "disabled"]);
    session.send("off\x04");
    session.wait(BOUND).must_be(guest::SUCCESS);
    let events = objects(&directory.path().join("trace"));
    let typed = |byte: char| {
        let value = json!(format!("{:#x}", u32::from(byte)));
        events.iter().any(|event| event["register"] == "RBR/THR" && event["value"] == value)
    };
    assert!(typed('o') && typed('n') && !typed('f'), "{events:?}");
}

#[test]
fn without_the_option_no_event_is_available() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (mut session, mut qmp) = qmp::start(directory.path(), Program::Echo, &["--debug-exit"]);
    let states = qmp.execute("trace-event-get-state", json!({ "name": "irq_pulse" })).unwrap();
    assert_eq!(states, json!([{ "name": "irq_pulse", "state": "unavailable", "vcpu": false }]));
    let on = json!({ "name": "irq_*", "enable": true });
    let (_, text) = qmp.execute("trace-event-set-state", on).unwrap_err();
    assert!(text.contains("is disabled; start the VM with --trace"), "{text}");
    let ignore = json!({ "name": "irq_*", "enable": true, "ignore-unavailable": true });
    assert_eq!(qmp.execute("trace-event-set-state", ignore), Ok(json!({})));
    session.send("\x04");
    session.wait(BOUND).must_be(guest::SUCCESS);
}

#[test]
fn the_events_are_listed() {
    let ended = Session::start(&mut minivmm(["--trace", "help"])).wait(BOUND).must_be(0);
    let text = String::from_utf8(ended.output).unwrap();
    assert!(text.lines().any(|line| line.starts_with("virtio_blk_handle_write ")), "{text}");
}

//! `minivmm replay`: a small guest's trace is replayed request for request, on raw and qcow2 images, and nothing is destroyed unless
//! the user says so.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::OnceLock;

use minivmm_tests::files::sparse;
use minivmm_tests::polling::{self, Job};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const CAPACITY: u64 = 8 << 20;
const WRITES: u64 = 200;
const READS: u64 = 300;

/// A directory with `load.json`, a trace of a guest. It is on a real file system, not perhaps on a tmpfs.
fn trace() -> Option<TempDir> {
    static TRACE: OnceLock<Vec<u8>> = OnceLock::new();
    if !kvm_is_usable() {
        return None;
    }
    let directory = tempfile::tempdir_in(minivmm_tests::binary().parent().unwrap()).unwrap();
    fs::write(directory.path().join("load.json"), TRACE.get_or_init(record)).unwrap();
    Some(directory)
}

/// The trace of a guest that writes a disk and then reads it.
fn record() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let jobs = [
        Job { write: true, random: true, block: 4096, depth: 8, requests: WRITES },
        Job { write: false, random: true, block: 4096, depth: 4, requests: READS },
    ];
    let kernel = polling::kernel(polling::MINIVMM, &jobs, CAPACITY);
    fs::write(directory.path().join("guest.elf"), kernel).unwrap();
    sparse(&directory.path().join("traced.img"), CAPACITY);
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "64M"]);
    command.args(["--disk", "traced.img,serial=test"]);
    command.args(["--trace", "virtio_blk_*,file=load.json,format=json"]);
    let session = Session::start(command.current_dir(directory.path()));
    session.expect("E", BOUND);
    session.signal(Signal::TERM);
    session.wait(BOUND).must_be(0);
    fs::read(directory.path().join("load.json")).unwrap()
}

fn replay(directory: &Path, arguments: &[&str]) -> Output {
    let words = [&["replay", "load.json"], arguments].concat();
    minivmm(words).current_dir(directory).output().unwrap()
}

fn report(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn qcow2(directory: &Path) {
    let size = CAPACITY.to_string();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "image.qcow2", &size]).current_dir(directory);
    assert!(command.status().unwrap().success());
}

#[test]
fn every_request_is_replayed_on_raw_and_qcow2() {
    let Some(directory) = trace() else { return };
    let directory = directory.path();
    sparse(&directory.join("raw.img"), CAPACITY);
    qcow2(directory);
    let disks =
        ["raw.img", "raw.img,cache=directsync", "image.qcow2,format=qcow2", "raw.img,aio=threads"];
    for disk in disks {
        for pace in [&[][..], &["--no-stall"]] {
            let arguments = [&["--json", "--overwrite", "--disk", disk], pace].concat();
            let report = report(&replay(directory, &arguments));
            for (kind, count) in [("write", WRITES), ("read", READS)] {
                let kind = &report["kinds"][kind];
                assert_eq!(kind["errors"], 0, "{disk}: {report:#}");
                for side in ["replayed", "recorded"] {
                    assert_eq!(kind[side]["requests"], count, "{disk}: {report:#}");
                    assert!(kind[side]["p99.9-us"].as_f64() >= kind[side]["p50-us"].as_f64());
                }
            }
            let depth = report["in-flight-max"].as_u64().unwrap();
            assert!((1..=8).contains(&depth), "{report:#}");
            let (took, recorded) = (&report["seconds"], &report["recorded-seconds"]);
            let took_its_time = took.as_f64().unwrap() >= recorded.as_f64().unwrap() * 0.5;
            assert!(took_its_time || !pace.is_empty(), "{disk}: {report:#}");
        }
    }
    // The data is no zeroes, in the places that the guest wrote.
    let written = |name: &str| -> Vec<bool> {
        let bytes = fs::read(directory.join(name)).unwrap();
        bytes.chunks(4096).map(|block| block.iter().any(|byte| *byte != 0)).collect()
    };
    let blocks = written("raw.img");
    assert!(blocks.iter().any(|is| *is) && blocks.iter().any(|is| !*is));
    let mut check = Command::new("qemu-img");
    check.args(["check", "-q", "image.qcow2"]).current_dir(directory);
    assert!(check.status().unwrap().success());
}

#[test]
fn a_snapshot_keeps_the_image_and_faults_are_counted() {
    let Some(directory) = trace() else { return };
    let directory = directory.path();
    sparse(&directory.join("raw.img"), CAPACITY);
    let output = replay(directory, &["--no-stall", "--disk", "raw.img,snapshot=on"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["500 requests in ", "write               200       0 ", "  recorded          300 "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(fs::read(directory.join("raw.img")).unwrap().iter().all(|byte| *byte == 0));

    let faults = "raw.img,snapshot=on,fault=error:read:n=7,fault=error:write:n=9";
    let output = replay(directory, &["--no-stall", "--json", "--disk", faults]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (kind, count) in [("write", WRITES), ("read", READS)] {
        let kind = &report["kinds"][kind];
        assert_eq!(
            (&kind["errors"], &kind["replayed"]["requests"]),
            (&1.into(), &(count - 1).into())
        );
    }
}

#[test]
fn the_commands_of_the_chapter_work() {
    const CHAPTER: &str = include_str!("../../vmm/docs/tracing.md");
    let Some(directory) = trace() else { return };
    let (_, section) = CHAPTER.split_once("\n## Replay a load\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let script: String =
        section.split("```sh\n").skip(1).filter_map(|block| block.split("```").next()).collect();
    assert!(script.matches("minivmm replay").count() >= 2, "{script}");
    let program = minivmm_tests::binary();
    let script = format!("PATH={}:$PATH\n{script}", program.parent().unwrap().display());
    let mut shell = Command::new("bash");
    let output = shell.args(["-ec", &script]).current_dir(directory.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("500 requests in ").count(), 5, "{text}");
}

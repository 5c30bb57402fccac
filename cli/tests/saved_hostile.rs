//! Files that are damaged, cut, or made up: each is refused with one line, or starts a guest that can do no more than any other.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::{Ended, Session};
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest, unexpected_lines};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// A saved machine with a disk in use, and the content of its file.
fn saved() -> Option<(TempDir, Vec<u8>)> {
    if !kvm_is_usable() {
        return None;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut command = small_guest(directory.path(), Program::DiskLoad);
    let session = Session::start(command.args([
        "--disk",
        "disk.img",
        "--qmp",
        "unix:qmp",
        "--save-directory",
        ".",
    ]));
    session.output.expect_bytes(20, BOUND).unwrap();
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let path = directory.path().join("saved");
    qmp.enable_migration_events();
    qmp.execute("migrate", json!({ "uri": format!("file:{}", path.display()) })).unwrap();
    while qmp.event("MIGRATION")["status"] != "completed" {}
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    let content = fs::read(&path).unwrap();
    Some((directory, content))
}

fn start(directory: &Path, options: &str) -> Ended {
    let incoming = format!("file:mutant,disks=unchecked,paths=saved{options}");
    let mut command = minivmm(["--incoming", &incoming]);
    let command = command.args(["--timeout", "500ms", "--console", "none"]);
    Session::start(command.current_dir(directory)).wait(BOUND)
}

#[track_caller]
fn assert_refused(ended: &Ended, what: &str) {
    assert_eq!(ended.code(), 2, "{what}: {ended}");
    assert_eq!(ended.errors.lines().count(), 1, "{what}: {ended}");
    assert!(ended.errors.starts_with("minivmm: --incoming file:mutant: "), "{what}: {ended}");
}

/// Where RAM begins: everything before is covered by one checksum.
fn ram_offset(content: &[u8]) -> usize {
    let program_header = 64 + 56;
    usize::try_from(u64_at(content, program_header + 8)).unwrap()
}

fn u64_at(content: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(content[at..at + 8].try_into().unwrap())
}

fn notes_end(content: &[u8]) -> usize {
    usize::try_from(u64_at(content, 64 + 8) + u64_at(content, 64 + 32)).unwrap()
}

#[test]
fn a_damaged_file_is_refused() {
    let Some((directory, content)) = saved() else { return };
    let mutant = directory.path().join("mutant");
    let (end, ram) = (notes_end(&content), ram_offset(&content));
    // Every byte of the headers' fields that matter, and a sample of the rest.
    let places =
        (0..64).step_by(3).chain((64..64 + 112).step_by(7)).chain((200..end).step_by(end / 60));
    for at in places.chain([end - 1]) {
        let mut changed = content.clone();
        changed[at] ^= 0x41;
        fs::write(&mutant, &changed).unwrap();
        assert_refused(&start(directory.path(), ""), &format!("byte {at}"));
    }
    let lengths = [0, 1, 63, 64, 200, end - 1, end, ram, ram + 1, content.len() - 4096];
    for length in lengths.into_iter().chain([content.len() - 1]) {
        fs::write(&mutant, &content[..length]).unwrap();
        assert_refused(&start(directory.path(), ""), &format!("{length} bytes"));
    }
    fs::write(&mutant, [&content[..], &[0]].concat()).unwrap();
    assert_refused(&start(directory.path(), ""), "a byte more");
    // RAM is compared where it is copied.
    let data = (ram..content.len()).filter(|at| content[*at] != 0).step_by(97).take(10);
    for at in data.chain([ram, content.len() - 1]) {
        let mut changed = content.clone();
        changed[at] ^= 1;
        fs::write(&mutant, &changed).unwrap();
        assert_refused(&start(directory.path(), ",map=off"), &format!("byte {at} of RAM"));
    }
}

/// As `vmm/src/snapshot/checksum.rs` defines it: what an attacker would compute, too.
fn checksum(bytes: &[u8]) -> u64 {
    let step =
        |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let mut sums = [1_u64, 2, 3, 4];
    let blocks = bytes.chunks_exact(32);
    let rest = blocks.remainder();
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block.chunks(8)) {
            *sum = step(*sum, u64::from_le_bytes(word.try_into().unwrap()));
        }
    }
    let tail = rest.iter().fold(bytes.len() as u64, |sum, byte| step(sum, u64::from(*byte)));
    sums.iter().fold(tail, |sum, lane| step(sum, *lane))
}

/// The file with another description of the same length or less, and a checksum that agrees.
fn described(content: &[u8], machine: &Value) -> Option<Vec<u8>> {
    // The first note: header (name's and content's length, type), name, JSON.
    let note = usize::try_from(u64_at(content, 64 + 8)).unwrap();
    let length = u32::from_le_bytes(content[note + 4..note + 8].try_into().unwrap()) as usize;
    let mut text = serde_json::to_vec(machine).unwrap();
    if text.len() > length {
        return None;
    }
    text.resize(length, b' ');
    let mut changed = content.to_vec();
    changed[note + 20..note + 20 + length].copy_from_slice(&text);
    let end = notes_end(&changed);
    let sum = checksum(&changed[..end - 8]);
    changed[end - 8..end].copy_from_slice(&sum.to_le_bytes());
    Some(changed)
}

fn machine(content: &[u8]) -> Value {
    let note = usize::try_from(u64_at(content, 64 + 8)).unwrap();
    let length = u32::from_le_bytes(content[note + 4..note + 8].try_into().unwrap()) as usize;
    serde_json::from_slice(&content[note + 20..note + 20 + length]).unwrap()
}

#[test]
fn a_made_up_description_is_refused_by_name() {
    let Some((directory, content)) = saved() else { return };
    let saved = machine(&content);
    let disk = "/disks/0/queues/0";
    for (pointer, value, expected) in [
        ("/format/major", json!(2), "it has format 2.0"),
        ("/format/needs", json!(["x"]), "it needs x, which"),
        ("/config/cpus", json!(0), "the number of vCPUs"),
        ("/config/cpus", json!(2), "the number of vCPUs"),
        ("/config/memory", json!(1), "the size of memory"),
        ("/vcpus", json!([]), "the number of vCPUs"),
        ("/disks/0/transport/device_id", json!(1), "the saved device has type 1"),
        (&format!("{disk}/queue"), json!(9), "a saved queue"),
        (&format!("{disk}/stopped"), json!([60000]), "a saved queue"),
        (&format!("{disk}/stopped"), json!([1, 1]), "a saved queue"),
        ("/disks/0/transport/registers/queues", json!([]), "other queues"),
        ("/disks/0/config/image/path", json!("none"), "none"),
        ("/disks/0/config/device/name", json!("a\0b"), "the name of a disk"),
        ("/disks/0/config/id", json!("a\u{1b}[2J"), "the name of a disk"),
        ("/config/nested", json!(true), "add --nested on"),
        ("/serial/0/input", json!(vec![0; 65]), "serial"),
        ("/state", json!("Dreaming"), "its description cannot be read"),
    ] {
        let mut made_up = saved.clone();
        // Makes room: what is missing is zero.
        if let Some(xsave) = made_up.pointer_mut("/vcpus/0/state/xsave") {
            xsave.as_array_mut().unwrap().truncate(1000);
        }
        *made_up.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let Some(bytes) = described(&content, &made_up) else { panic!("{pointer}: too long") };
        fs::write(directory.path().join("mutant"), bytes).unwrap();
        let ended = start(directory.path(), "");
        let lines = unexpected_lines(&ended.errors);
        assert!([1, 2].contains(&ended.code()) && lines.len() == 1, "{pointer}: {ended}");
        assert!(ended.errors.contains(expected), "{pointer}: {ended}");
    }
}

/// A base has to be the file of the save, and a regular file: nothing else is read, and no other file is opened.
#[test]
fn a_made_up_base_is_refused() {
    let Some((directory, _)) = saved() else { return };
    let incoming = ["--incoming", "file:saved,paths=saved,map=on", "--paused"];
    let mut command = minivmm(incoming);
    command.args(["--qmp", "unix:qmp"]).current_dir(directory.path());
    let session = Session::start(&mut command);
    Qmp::connect(&directory.path().join("qmp"));
    let mut ctl = minivmm(["ctl", "qmp", "save", "mutant", "--incremental", "--quit"]);
    Session::start(ctl.current_dir(directory.path())).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let content = fs::read(directory.path().join("mutant")).unwrap();
    let saved = machine(&content);
    for (pointer, value, expected) in [
        ("/base/path", json!("/none/mutant"), "its base mutant is based on it"),
        ("/base/path", json!("/dev/zero"), "its base zero is not beside it, and there is no"),
        ("/base/path", json!("/a\u{1b}/.."), "its base /a\u{fffd}/.. is not beside it"),
        ("/base/path", json!(""), "is not beside it"),
        ("/base/identity", json!([1, 1]), "it is not the file on which the increment was saved"),
        ("/base", Value::Null, "it is damaged: its base"),
        ("/format/needs", json!(["base", "x"]), "it needs x, which"),
        ("/config/memory", json!(64 << 20), "the size of memory"),
    ] {
        let mut made_up = saved.clone();
        made_up["vcpus"][0]["state"]["xsave"].as_array_mut().unwrap().truncate(1000);
        *made_up.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let Some(bytes) = described(&content, &made_up) else { panic!("{pointer}: too long") };
        fs::write(directory.path().join("mutant"), bytes).unwrap();
        let ended = start(directory.path(), "");
        assert_refused(&ended, pointer);
        assert!(ended.errors.contains(expected), "{pointer}: {ended}");
    }
}

/// Any value may be anything: the machine is refused, or starts, and never panics.
#[test]
fn no_description_makes_minivmm_panic() {
    let Some((directory, content)) = saved() else { return };
    let saved = machine(&content);
    let mut pointers = Vec::new();
    collect(&saved, String::new(), &mut pointers);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for (number, pointer) in pointers.iter().enumerate().step_by(pointers.len() / 120 + 1) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let values =
            [json!(0), json!(255), json!(u64::MAX), json!(-1), json!([]), Value::Null, json!("")];
        let value = values[(random % values.len() as u64) as usize].clone();
        let mut made_up = saved.clone();
        *made_up.pointer_mut(pointer).unwrap() = value.clone();
        let Some(bytes) = described(&content, &made_up) else { continue };
        fs::write(directory.path().join("mutant"), bytes).unwrap();
        let ended = start(directory.path(), "");
        let what = format!("{number}: {pointer} = {value}: {ended}");
        assert!(!ended.errors.contains("panicked"), "{what}");
        assert!([0, 1, 2, 3, 124].contains(&ended.code()), "{what}");
    }
}

/// The places of all values; of long lists the first few.
fn collect(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                collect(member, format!("{at}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate().take(12) {
                collect(item, format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
    if !at.is_empty() {
        found.push(at);
    }
}

/// Huge pages are copied to, and all of them are taken at the start: a host whose pool is too small says so.
#[test]
fn a_machine_of_huge_pages_needs_the_pool() {
    let Some((directory, content)) = saved() else { return };
    let mut huge = machine(&content);
    huge["config"]["hugepages"] = json!(true);
    huge["vcpus"][0]["state"]["xsave"].as_array_mut().unwrap().truncate(1000);
    fs::write(directory.path().join("mutant"), described(&content, &huge).unwrap()).unwrap();
    let ended = start(directory.path(), "");
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.is_ok_and(|free| free.trim().parse().is_ok_and(|free: u32| free >= 16)) {
        ended.must_be(124);
    } else {
        let lines = unexpected_lines(&ended.errors);
        assert!(lines.len() == 1 && lines[0].contains("--hugepages"), "{ended}");
        assert!([1, 2].contains(&ended.code()), "{ended}");
    }
}

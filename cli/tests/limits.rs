//! A disk's limits while the machine runs: changed, lifted, and in the way of a standstill.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::Read;
use std::time::Instant;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::qmp::{Qmp, SOCKET, start};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;

/// Bytes of a disk that `Program::DiskLoad` does not fill before the test is over.
const PLENTY: u64 = 1 << 30;

fn write_limit(bytes: u64) -> Value {
    json!({"device": "vda", "bps": 0, "bps_rd": 0, "bps_wr": bytes, "iops": 0, "iops_rd": 0, "iops_wr": 0})
}

#[test]
fn limits_and_histograms() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let disk = "disk.img,throttling.iops-write=1,throttling.bps-total=1000000,throttling.bps-total-max=2000000";
    let (session, mut qmp) = start(directory.path(), Program::DiskLoad, &["--disk", disk]);
    let shown = qmp.query("query-block")[0]["inserted"].clone();
    assert_eq!(
        (&shown["iops_wr"], &shown["bps"], &shown["bps_max"]),
        (&json!(1), &json!(1_000_000), &json!(2_000_000))
    );
    // One write a second, or so, until the limit is lifted; also for the one that waits.
    let started = Instant::now();
    session.output.expect_bytes(1, BOUND).unwrap();
    assert!(qmp.writes() <= 10 + started.elapsed().as_secs());
    let none = write_limit(0);
    let mut bad = none.clone();
    bad["bps_max"] = 1.into();
    let (class, description) = qmp.execute("block_set_io_throttle", bad).unwrap_err();
    assert!(
        class == "GenericError" && description.contains("bps-total-max"),
        "{class}: {description}"
    );
    qmp.execute(
        "block-latency-histogram-set",
        json!({"id": "vda", "boundaries": [1_000_000_000_u64]}),
    )
    .unwrap();
    qmp.execute("block_set_io_throttle", none).unwrap();
    session.output.expect_bytes(1000, BOUND).unwrap();
    qmp.query("stop");
    let stats = qmp.query("query-blockstats")[0]["stats"].clone();
    let counted: u64 = stats["wr_latency_histogram"]["bins"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_u64)
        .sum();
    let writes = stats["wr_operations"].as_u64().unwrap();
    assert!(counted > 900 && counted <= writes, "{stats}");
    assert_eq!(
        (&stats["wr_bytes"], &stats["wr_highest_offset"]),
        (&json!(writes * 512), &json!(writes * 512))
    );
    assert_eq!(stats["rd_latency_histogram"]["bins"], json!([0, 0]));
    qmp.execute("block-latency-histogram-set", json!({"id": "vda"})).unwrap();
    assert_eq!(qmp.query("query-blockstats")[0]["stats"].get("wr_latency_histogram"), None);
    let bad = json!({"id": "vda", "boundaries-write": [2, 1]});
    assert_eq!(qmp.execute("block-latency-histogram-set", bad).unwrap_err().0, "GenericError");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// QEMU's docs/throttle.txt, "Applying I/O limits to groups of disks"; and a saved machine knows the group.
#[test]
fn disks_of_a_group_have_one_set_of_limits() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let group = ",throttling.bps-write=1,throttling.group=slow";
    let mut options = Vec::new();
    for (name, keys) in [("a", group), ("b", group), ("c", "")] {
        sparse(&directory.path().join(name), PLENTY);
        options.extend(["--disk".to_owned(), format!("{name},id={name}{keys}")]);
    }
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let shown = |qmp: &mut Qmp| {
        let disks = qmp.query("query-block");
        [0, 1, 2].map(|disk| {
            let disk = &disks[disk]["inserted"];
            (disk["bps_wr"].as_u64().unwrap(), disk["group"].as_str().map(str::to_owned))
        })
    };
    let set = |qmp: &mut Qmp, disk: &str, bytes: u64, group: Option<&str>| {
        let mut limits = write_limit(bytes);
        limits["device"] = disk.into();
        group.inspect(|group| limits["group"] = (*group).into());
        qmp.execute("block_set_io_throttle", limits).unwrap();
    };
    let of = |bytes, group: &str| (bytes, Some(group.to_owned()));
    let (session, mut qmp) = start(directory.path(), Program::DiskLoad, &options);
    assert_eq!(shown(&mut qmp), [of(1, "slow"), of(1, "slow"), (0, None)]);
    session.output.expect_bytes(1, BOUND).unwrap();
    // New limits of one member are those of all, and let go what the guest's disk, another member, made wait.
    set(&mut qmp, "b", 1 << 40, None);
    session.output.expect_bytes(100, BOUND).unwrap();
    assert_eq!(shown(&mut qmp), [of(1 << 40, "slow"), of(1 << 40, "slow"), (0, None)]);
    // A disk moves, with limits for the new group only, and another joins it.
    set(&mut qmp, "b", 7, Some("other"));
    set(&mut qmp, "c", 8, Some("other"));
    assert_eq!(shown(&mut qmp), [of(1 << 40, "slow"), of(8, "other"), of(8, "other")]);
    // Without limits it leaves, whatever group is named; the others stay limited.
    set(&mut qmp, "b", 0, Some("other"));
    assert_eq!(shown(&mut qmp), [of(1 << 40, "slow"), (0, None), of(8, "other")]);
    // The default name of a group is the disk's.
    set(&mut qmp, "b", 5, None);
    set(&mut qmp, "a", 1, Some("b"));
    assert_eq!(shown(&mut qmp), [of(1, "b"), of(1, "b"), of(8, "other")]);
    let mut save = minivmm(["ctl", SOCKET, "save", "saved", "--quit"]);
    Session::start(save.current_dir(directory.path())).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let disks = ["--disk", "a,id=a", "--disk", "b,id=b", "--disk", "c,id=c"];
    let mut command =
        minivmm(["--incoming", "file:saved", "--qmp", "unix:qmp"].iter().chain(&disks));
    let session = Session::start(command.current_dir(directory.path()));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    assert_eq!(shown(&mut qmp), [of(1, "b"), of(1, "b"), of(8, "other")]);
    set(&mut qmp, "b", 2, None);
    assert_eq!(shown(&mut qmp), [of(2, "b"), of(2, "b"), of(8, "other")]);
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// Requests that wait for the limits go back to their queue at a stop. The first write starts at once, the next one after eight minutes.
#[test]
fn what_the_limits_hold_back_delays_no_standstill_and_is_not_lost() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    sparse(&image, PLENTY);
    let options = ["--disk", "disk.img,throttling.bps-write=1", "--debug-exit"];
    for end in ["quit", "system_reset", "SIGTERM"] {
        let (session, mut qmp) = start(directory.path(), Program::Reborn, &options);
        session.expect(".", BOUND);
        let before = Instant::now();
        for command in ["stop", "cont", "stop", "cont"] {
            qmp.query(command);
            assert_eq!(qmp.writes(), 1);
        }
        qmp.execute("block_set_io_throttle", write_limit(0)).unwrap();
        session.expect("..", BOUND);
        qmp.execute("block_set_io_throttle", write_limit(1)).unwrap();
        if end == "system_reset" {
            qmp.query("system_reset");
            session.expect("ready\n", BOUND);
        }
        if end == "SIGTERM" {
            session.signal(Signal::TERM)
        } else {
            drop(qmp.query("quit"))
        }
        // A signal comes before the guest's byte.
        let status = if end == "SIGTERM" { 4 } else { 0 };
        let output = session.wait(BOUND).must_be(status).output;
        assert!(before.elapsed() < BOUND / 2, "{end}: it waits for the limits");
        let dots = output.iter().filter(|byte| **byte == b'.').count();
        // After a reset the guest writes the first sectors again.
        let sectors = if end == "system_reset" { 3 } else { dots };
        let mut content = vec![0; sectors * 512];
        fs::File::open(&image).unwrap().read_exact(&mut content).unwrap();
        let expected: Vec<u8> =
            (0..sectors as u32).flat_map(|sector| guest::words(sector, 128)).collect();
        assert!(dots >= 3 && content == expected, "{end}");
    }
}

//! The control socket of the real binary, and what it does to a running guest.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::{self, Program};
use minivmm_tests::qmp::{Qmp, SOCKET, start};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, skip, small_guest, unexpected_lines};
use serde_json::{Value, json};
use tempfile::tempdir;

/// Bytes of a disk that `Program::DiskLoad` does not fill before the test is over.
const PLENTY: u64 = 1 << 30;

fn status(qmp: &mut Qmp) -> String {
    let status = qmp.query("query-status");
    assert_eq!(status["running"], status["status"] == "running");
    status["status"].as_str().unwrap().to_owned()
}

#[test]
fn the_socket_is_private_and_goes_with_the_vm() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join(SOCKET);
    let (session, mut qmp) = start(directory.path(), Program::Spin, &[]);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Another VM does not take it over.
    let ended = Session::start(
        small_guest(directory.path(), Program::Spin).args(["--qmp", "unix:control.sock"]),
    )
    .wait(BOUND)
    .must_be(2);
    assert!(ended.errors.contains("control.sock"), "{ended}");
    qmp.query("quit");
    assert_eq!(qmp.event("SHUTDOWN"), json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(qmp.receive(), None);
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    assert!(!socket.exists());
}

#[test]
fn pause_and_resume_under_load() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let (session, mut qmp) =
        start(directory.path(), Program::DiskLoad, &["--disk", "disk.img", "--cpus", "2"]);
    let mut before = 0;
    for _ in 0..100 {
        qmp.query("stop");
        assert_eq!(status(&mut qmp), "paused");
        qmp.event("STOP");
        let (first, second) = (qmp.writes(), qmp.writes());
        assert_eq!(first, second, "the guest writes while the VM is paused");
        assert!(first >= before);
        before = first;
        qmp.query("cont");
        qmp.event("RESUME");
        assert_eq!(status(&mut qmp), "running");
    }
    session.output.expect_bytes(usize::try_from(before).unwrap() + 10, BOUND).unwrap();
    // Twice is as good as once, and says so once.
    for command in ["stop", "stop", "cont", "cont"] {
        qmp.query(command);
    }
    assert_eq!(qmp.events.len(), 2);
    qmp.query("stop");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// The ways to end, as the guest's or the operator's, with the events that tell them apart.
#[test]
fn ends_are_announced() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let table = [
        (Program::PowerOff, 0, &[("SHUTDOWN", "guest-shutdown")][..]),
        (Program::Reset, 0, &[("RESET", "guest-reset"), ("SHUTDOWN", "guest-reset")]),
        (Program::Panic, 3, &[("GUEST_PANICKED", ""), ("STOP", ""), ("SHUTDOWN", "guest-panic")]),
        (
            Program::TripleFault,
            3,
            &[("GUEST_PANICKED", ""), ("STOP", ""), ("SHUTDOWN", "guest-panic")],
        ),
    ];
    for (program, exit, events) in table {
        // The guest waits until we are there to listen.
        let mut command = small_guest(directory.path(), program);
        command.args(["--qmp", &format!("unix:{SOCKET}"), "--paused"]);
        let session = Session::start(&mut command);
        let mut qmp = Qmp::connect(&directory.path().join(SOCKET));
        assert_eq!(status(&mut qmp), "prelaunch");
        qmp.query("cont");
        for (event, reason) in events {
            let data = qmp.event(event);
            assert!(reason.is_empty() || data["reason"] == *reason, "{program:?}: {data}");
        }
        session.wait(BOUND).must_be(exit);
    }
}

/// The guest checks that it finds the machine as at power-on, and the VM is the same process with the same threads.
#[test]
fn a_reset_starts_the_guest_over() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let options = ["--disk", "disk.img", "--cpus", "2", "--debug-exit"];
    let (session, mut qmp) = start(directory.path(), Program::Reborn, &options);
    let threads = qmp.query("query-cpus-fast");
    for _ in 0..20 {
        session.expect("ready\n", BOUND);
        session.expect("..", BOUND);
        qmp.query("system_reset");
        assert_eq!(qmp.event("RESET"), json!({"guest": false, "reason": "host-qmp-system-reset"}));
        assert_eq!(status(&mut qmp), "running");
    }
    // A machine that stands still is ready to start afterwards.
    session.expect("ready\n", BOUND);
    session.expect("..", BOUND);
    qmp.query("stop");
    qmp.events.clear();
    for _ in 0..2 {
        qmp.query("system_reset");
        assert_eq!(status(&mut qmp), "prelaunch");
    }
    let written = qmp.writes();
    assert!(written >= 42, "the accounts go on: {written}");
    assert_eq!(qmp.query("query-cpus-fast"), threads);
    qmp.query("cont");
    session.expect("ready\n", BOUND);
    session.expect("..", BOUND);
    let names: Vec<_> = qmp.events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["RESET", "RESET", "RESUME"]);
    qmp.query("quit");
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

/// A reset loads both files again, to places that were planned for the old content.
#[test]
fn a_reset_is_refused_if_kernel_or_initrd_was_changed_in_place() {
    if !kvm_is_usable() {
        return;
    }
    for (file, option) in [("guest.elf", "--kernel"), ("initrd", "--initrd")] {
        let directory = tempdir().unwrap();
        fs::write(directory.path().join("initrd"), "070701").unwrap();
        let options = ["--initrd", "initrd", "--debug-exit"];
        let (mut session, mut qmp) = start(directory.path(), Program::Echo, &options);
        session.expect("ready\n", BOUND);
        qmp.query("system_reset");
        session.expect("ready\n", BOUND);
        fs::write(directory.path().join(file), "other content").unwrap();
        let (class, description) = qmp.execute("system_reset", json!({})).unwrap_err();
        assert_eq!(class, "GenericError");
        assert!(
            description.starts_with(&format!("{option} {file}: the file was changed")),
            "{description}"
        );
        // The machine goes on as it was.
        assert_eq!(status(&mut qmp), "running");
        session.send(b"still here");
        session.expect("still here", BOUND);
        session.send([4]);
        session.wait(BOUND).must_be(guest::SUCCESS);
    }
}

/// A qcow2 image of two clusters, of which `cluster` is said to be where the L1 table is: the addresses of L1 and L2 table. `None`: there is
/// no qemu-img.
fn make_corrupt(image: &Path, cluster: usize) -> Option<(u64, u64)> {
    let directory = image.parent().unwrap();
    fs::write(directory.join("raw"), [7; 128 << 10]).unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2", "raw"]).arg(image).current_dir(directory);
    if !convert.status().is_ok_and(|status| status.success()) {
        skip("no qemu-img here (Debian: qemu-utils)");
        return None;
    }
    let mut bytes = fs::read(image).unwrap();
    let long = |at: u64| u64::from_be_bytes(*bytes[at as usize..].first_chunk().unwrap());
    let l1 = long(40);
    let l2 = long(l1) & 0xff_ffff_ffff_fe00;
    bytes[l2 as usize + 8 * cluster..][..8].copy_from_slice(&(1 << 63 | l1).to_be_bytes());
    fs::write(image, bytes).unwrap();
    Some((l1, l2))
}

/// As QEMU reports it, before the errors that it causes.
#[test]
fn a_corrupt_image_is_reported_once() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let Some((l1, l2)) = make_corrupt(&image, 0) else { return };
    let disk = ["--disk", "disk.img,format=qcow2,id=data,werror=report", "--paused"];
    let (session, mut qmp) = start(directory.path(), Program::DiskLoad, &disk);
    qmp.query("cont");
    let event = qmp.event("BLOCK_IMAGE_CORRUPTED");
    let message = format!("an L2 table refers to cluster {}", l1 >> 16);
    assert_eq!(
        event,
        json!({
            "device": "data", "node-name": "data", "msg": message, "offset": l2, "size": 64 << 10, "fatal": true,
        })
    );
    assert_eq!(qmp.event("BLOCK_IO_ERROR")["action"], "report");
    qmp.query("quit");
    assert!(qmp.events.iter().all(|event| event["event"] != "BLOCK_IMAGE_CORRUPTED"));
    let ended = session.wait(BOUND);
    assert!(ended.errors.contains("error: disk image \"disk.img\": corrupt, and"), "{ended}");
    assert_eq!(fs::read(&image).unwrap()[79], 2, "it is not marked corrupt");
}

#[test]
fn a_resize_that_finds_an_image_corrupt_is_answered_after_the_event() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    if make_corrupt(&directory.path().join("disk.img"), 1).is_none() {
        return;
    }
    let disk = ["--disk", "disk.img,format=qcow2,id=data", "--paused"];
    let (_session, mut qmp) = start(directory.path(), Program::DiskLoad, &disk);
    let shrink = json!({ "device": "data", "size": 64 << 10 });
    let (_, why) = qmp.execute("block_resize", shrink).unwrap_err();
    let is_corrupt = |event: &Value| event["event"] == "BLOCK_IMAGE_CORRUPTED";
    assert!(qmp.events.iter().any(is_corrupt), "{why}: {:?}", qmp.events);
    assert!(why.starts_with("disk data: cannot change its size: "), "{why}");
}

/// The operator's disks are full: writing stops at a limit of our own on the size of files.
#[test]
fn a_reset_leaves_an_io_error_behind() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let guest = small_guest(directory.path(), Program::Reborn);
    // What reaches past the limit, in units of 512 bytes, fails with EFBIG (setrlimit(2)).
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 16; exec \"$@\"", "sh"]).arg(guest.get_program());
    command.args(guest.get_args()).args(["--disk", "disk.img,werror=stop", "--debug-exit"]);
    command.args(["--qmp", &format!("unix:{SOCKET}"), "--paused"]).current_dir(directory.path());
    let session = Session::start(&mut command);
    let mut qmp = Qmp::connect(&directory.path().join(SOCKET));
    for _ in 0..3 {
        qmp.query("cont");
        session.expect("ready\n................", BOUND);
        let error = qmp.event("BLOCK_IO_ERROR");
        assert_eq!((&error["operation"], &error["action"]), (&json!("write"), &json!("stop")));
        qmp.event("STOP");
        assert_eq!(status(&mut qmp), "io-error");
        qmp.query("system_reset");
        assert_eq!(status(&mut qmp), "prelaunch");
    }
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

#[test]
fn a_panic_with_a_crash_kernel_is_announced_and_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let options = ["--paused", "--debug-exit"];
    let (mut session, mut qmp) = start(directory.path(), Program::EarlyEcho, &options);
    for _ in 0..2 {
        qmp.query("cont");
        assert_eq!(qmp.event("GUEST_CRASHLOADED"), json!({"action": "run"}));
        assert_eq!(status(&mut qmp), "running");
        // The next life may panic, too.
        session.expect("early\n", BOUND);
        qmp.query("system_reset");
    }
    qmp.event("GUEST_CRASHLOADED");
    session.send([4]);
    session.wait(BOUND).must_be(guest::SUCCESS);
}

#[test]
fn errors_have_qemus_classes() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let (_session, mut qmp) =
        start(directory.path(), Program::Spin, &["--disk", "disk.img,id=root"]);
    let mut fails = |command: &str, arguments: Value| qmp.execute(command, arguments).unwrap_err();
    assert_eq!(fails("human-monitor-command", json!({})).0, "CommandNotFound");
    assert_eq!(fails("qmp_capabilities", json!({})).0, "CommandNotFound");
    assert_eq!(fails("block_resize", json!({"device": "sda", "size": 512})).0, "DeviceNotFound");
    for (arguments, says) in [
        (json!({"device": "root"}), "'size' is missing"),
        (json!({"device": "root", "size": "1M"}), "'size', expected: integer"),
        (json!({"device": "root", "size": -512}), "'size' expects a non-negative integer"),
        (json!({"device": "root", "size": 512, "force": true}), "'force' is unexpected"),
        (json!({"size": 512}), "'device' and 'node-name'"),
        (json!({"device": "root", "size": 513}), "multiple of 512"),
        (json!({"device": "root", "size": 0}), "multiple of 512"),
    ] {
        let (class, description) = fails("block_resize", arguments.clone());
        assert_eq!(class, "GenericError", "{arguments}");
        assert!(description.contains(says), "{arguments}: {description}");
    }
    for (command, arguments) in [
        ("eject", json!({"device": "root", "force": true})),
        ("blockdev-change-medium", json!({"id": "root", "filename": "other.img"})),
    ] {
        let removable = ("GenericError".to_owned(), "Device 'root' is not removable".to_owned());
        assert_eq!(fails(command, arguments), removable);
    }
    // Both names of the disk do, as either argument or both, and so does what `query-block` calls its device.
    for mut arguments in [
        json!({"device": "root"}),
        json!({"device": "vda"}),
        json!({"node-name": "root"}),
        json!({"device": "root", "node-name": "root"}),
        json!({"device": "", "node-name": "root"}),
    ] {
        arguments["size"] = (2 << 20).into();
        qmp.execute("block_resize", arguments).unwrap();
    }
    let device = qmp.query("query-block")[0]["qdev"].clone();
    for id in [device, json!("/machine/peripheral/root"), json!("root")] {
        let mut limits = json!({"id": id});
        for name in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
            limits[name] = (1000 * i32::from(name == "iops")).into();
        }
        qmp.execute("block_set_io_throttle", limits).unwrap();
    }
    let nodes = qmp.query("query-named-block-nodes");
    assert_eq!(
        (&nodes[0]["group"], &nodes),
        (&json!("root"), &json!([qmp.query("query-block")[0]["inserted"]]))
    );
    let stats = qmp.execute("query-blockstats", json!({"query-nodes": true})).unwrap();
    assert_eq!((&stats[0]["node-name"], stats[0].get("device")), (&json!("root"), None));
    let disks = qmp.query("query-block");
    assert_eq!(disks[0]["inserted"]["image"]["virtual-size"], 2 << 20);
    assert_eq!((&disks[0]["device"], &disks[0]["io-status"]), (&json!("root"), &json!("ok")));
    assert_eq!(fs::metadata(directory.path().join("disk.img")).unwrap().len(), 2 << 20);
}

#[test]
fn people_control_it_too() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let (session, _qmp) =
        start(directory.path(), Program::DiskLoad, &["--disk", "disk.img,id=data", "--cpus", "3"]);
    let ctl = |arguments: &str, status: i32| {
        let words = ["ctl", SOCKET].into_iter().chain(arguments.split(' '));
        let ended = Session::start(minivmm(words).current_dir(directory.path()))
            .wait(BOUND)
            .must_be(status);
        assert_eq!(ended.errors.is_empty(), status == 0, "{ended}");
        String::from_utf8(ended.output).unwrap() + &ended.errors
    };
    let status = ctl("status", 0);
    assert!(status.starts_with("running, 3 vCPUs, 32M of memory\nDISK "), "{status}");
    assert!(status.contains("\ndata  1G "), "{status}");
    for (command, says) in
        [("stop", "paused"), ("cont", "running"), ("pause", "paused"), ("resume", "running")]
    {
        assert_eq!(ctl(command, 0), "");
        assert!(ctl("status", 0).starts_with(says));
    }
    assert_eq!(ctl("resize data 2G", 0), "");
    assert_eq!(ctl("reset", 0), "");
    assert!(ctl("resize vdb 2G", 1).contains("'vdb' not found"));
    assert!(ctl("resize data big", 2).contains("SIZE big: not a size in range"));
    let shrinks = "the disk has 2G, and a smaller size loses the data at its end; add --shrink";
    assert!(ctl("resize data 1.5G", 2).contains(shrinks));
    assert!(ctl("status", 0).contains("\ndata  2G "));
    assert_eq!(ctl("resize data 1.5G --shrink", 0), "");
    assert!(ctl("status", 0).contains("\ndata  1.5G "));
    assert!(!ctl("status", 0).contains("limited"));
    ctl("throttle data iops=1000 iops_max=2000 group=shared", 0);
    let limited = "\ndata is limited: iops=1000, iops_max=2000, iops_max_length=1, group=shared\n";
    assert!(ctl("status", 0).ends_with(limited));
    assert!(ctl("throttle data iops=1000 group", 2).contains("group has no value; write group=N"));
    assert!(
        ctl("throttle data iops=1000 iops_rd=1000", 1)
            .contains("iops-total cannot be used together with")
    );
    session.output.expect_bytes(10, BOUND).unwrap();
    assert!(ctl("disks", 0).contains("write"));
    let metrics = ctl("metrics", 0);
    for line in ["minivmm_running 1", "minivmm_vcpu_exits_total{vcpu=\"2\",reason=\"mmio_read\"} "]
    {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert!(
        !metrics.contains("minivmm_disk_operations_total{disk=\"data\",kind=\"write\"} 0\n"),
        "{metrics}"
    );
    ctl("quit", 0);
    session.wait(BOUND).must_be(0);
    assert!(ctl("status", 1).contains(SOCKET));
}

#[test]
fn a_write_past_the_threshold_is_reported() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), PLENTY);
    let (session, mut qmp) =
        start(directory.path(), Program::DiskLoad, &["--disk", "disk.img,id=data", "--paused"]);
    let set = |qmp: &mut Qmp, offset: u64| {
        let arguments = json!({"node-name": "data", "write-threshold": offset});
        qmp.execute("block-set-write-threshold", arguments).unwrap();
        assert_eq!(shown(qmp), offset);
    };
    fn shown(qmp: &mut Qmp) -> u64 {
        qmp.query("query-block")[0]["inserted"]["write_threshold"].as_u64().unwrap()
    }
    assert_eq!(shown(&mut qmp), 0);
    set(&mut qmp, 4096);
    set(&mut qmp, 0);
    set(&mut qmp, 5000);
    qmp.query("cont");
    // The guest writes sector after sector: the tenth is the first that reaches past it.
    let event = qmp.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(
        event,
        json!({"node-name": "data", "amount-exceeded": 120, "write-threshold": 5000})
    );
    assert_eq!(shown(&mut qmp), 0);
    let unknown = json!({"node-name": "floppy", "write-threshold": 1});
    assert_eq!(qmp.execute("block-set-write-threshold", unknown).unwrap_err().0, "DeviceNotFound");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// Tools written for QEMU ask this before anything else.
#[test]
fn what_clients_of_qemu_ask_first_has_an_answer() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let (_session, mut qmp) = start(directory.path(), Program::Spin, &["--acpi", "off"]);
    let none = qmp.execute("query-vm-generation-id", json!({})).unwrap_err();
    assert_eq!(none.1, "VM Generation ID device not found");
    assert_eq!(qmp.query("query-name"), json!({}));
    assert_eq!(qmp.query("query-uuid"), json!({ "UUID": "00000000-0000-0000-0000-000000000000" }));
    assert_eq!(qmp.query("query-kvm"), json!({ "enabled": true, "present": true }));
    let machines = qmp.query("query-machines");
    assert_eq!(machines[0]["name"], "minivmm");
    assert_eq!(machines[0]["cpu-max"], 255);
    assert_eq!(
        qmp.query("query-chardev"),
        json!([
            { "label": "compat_monitor0", "filename": "unix:control.sock,server=on", "frontend-open": true },
            { "label": "serial0", "filename": "stdio", "frontend-open": true },
        ])
    );
    for none in ["query-iothreads", "query-block-jobs", "query-jobs"] {
        assert_eq!(qmp.query(none), json!([]), "{none}");
    }
}

//! A disk on network storage, by the commands of the chapter.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest, Report};
use minivmm_tests::skip;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const CHAPTER: &str = include_str!("../../../devices/docs/network-storage.md");

/// At this rate fio takes longer than the server is away.
const SCRIPT: &str = "fact started
fio --name=nbd --filename=/dev/vdb --rw=randrw --rate_iops=200 --bs=4k --size=4m --direct=1 --ioengine=libaio --iodepth=4 \
    --verify=crc32c --verify_fatal=1 --end_fsync=1 --output=/run/fio --eta=never
fact fio $?
dmesg -r | grep -iE 'I/O error|timed out|hung' | while read -r line; do fact complaint $line; done";

/// Runs the chapter's commands number `block` in `directory`.
fn run(directory: &Path, block: usize) {
    let blocks: Vec<_> =
        CHAPTER.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let status = Command::new("sh").args(["-ec", blocks[block]]).current_dir(directory).status();
    assert!(status.unwrap().success(), "{}", blocks[block]);
}

/// Waits until `done`.
fn until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < BOOT_BOUND, "it takes too long");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_goes_on_when_its_nbd_server_is_killed_and_restarted() {
    if std::env::var_os("MINIVMM_LAB").is_none() {
        return skip(
            "it loads the module nbd and takes /dev/nbd0, which may be another's outside of the lab",
        );
    }
    let guest = Guest::new(CLOUD, SCRIPT).with_tools();
    let directory = guest.path("");
    minivmm_tests::files::sparse(&guest.path("disk.img"), 16 << 20);
    run(&directory, 0);
    run(&directory, 1);
    let guest = guest.with("--disk /dev/nbd0,cache=none");
    let session = guest.start();
    session.expect("fact: started", BOOT_BOUND);
    let written = || minivmm_tests::files::allocated(&guest.path("disk.img"));
    until(|| written() > 100 << 12);
    let pid = fs::read_to_string(guest.path("nbd.pid")).unwrap().trim().parse().unwrap();
    let server = Pid::from_raw(pid).unwrap();
    kill_process(server, Signal::KILL).unwrap();
    until(|| test_kill_process(server).is_err());
    let before = written();
    run(&directory, 0);
    let report = Report::new(session.wait(BOOT_BOUND).must_be(0));
    assert_eq!(report.number("fio"), 0, "{}", report.ended);
    assert_eq!(report.all("complaint"), [""; 0]);
    assert!(written() > before, "fio had ended before the server was killed");
    assert_eq!(report.ended.errors, "", "{}", report.ended);
}

//! A Linux guest in the middle of verified disk I/O is saved at random moments, and goes on in another process each time.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest, Report};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{minivmm, runs};
use serde_json::json;

const SOCKET: &str = "control.sock";

/// Writes and verifies two disks until a line comes from the console. `tick` has the guest's uptime, and its date in seconds.
const SCRIPT: &str = "
load() { while ! test -e /run/stop; do fio --filename=/dev/$1 --name=$1 --direct=1 --ioengine=libaio --rw=randwrite --bs=4k \
  --size=6m --iodepth=4 --end_fsync=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/run/$1.log --eta=never || fact broken $1
  echo x >>/run/$1.rounds; done; fact finished $1; }
load vdb & load vdc &
while ! test -e /run/stop; do read -r up rest </proc/uptime; fact tick $up $(date +%s); sleep 0.2; done &
fact started
read -r line
fact echo $line
touch /run/stop
wait
fact rounds $(wc -l </run/vdb.rounds) $(wc -l </run/vdc.rounds)
dmesg -r | grep -E '^<[0-4]>' | grep -iE 'lockup|stall|hung|unstable|skew|warp|I/O error' | while read -r line; do fact complaint $line; done";

fn restore(guest: &Guest, options: &str) -> Session {
    let mut command = minivmm([
        "--incoming",
        &format!("file:saved,paths=saved{options}"),
        "--save-directory",
        ".",
        "--qmp",
    ]);
    command.arg(format!("unix:{SOCKET}")).current_dir(guest.path("."));
    Session::start(command.env("TMPDIR", std::env::temp_dir()))
}

/// Saves the guest and ends its process. What it printed is returned.
fn save(guest: &Guest, session: Session) -> String {
    let saved = format!("file:{}", guest.path("saved").display());
    let mut qmp = Qmp::connect(&guest.path(SOCKET));
    qmp.set_bound(BOOT_BOUND);
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.execute("migrate-set-capabilities", events).unwrap();
    qmp.execute("migrate", json!({ "uri": saved })).unwrap();
    loop {
        let state = qmp.query("query-migrate");
        match state["status"].as_str().unwrap() {
            "completed" => break println!("saved: {state}"),
            "active" => drop(qmp.receive()),
            other => panic!("{other}: {state}"),
        }
    }
    qmp.query("quit");
    Report::new(session.wait(BOOT_BOUND).must_be(0)).text
}

#[test]
fn a_guest_under_load_goes_on_in_another_process_again_and_again() {
    save_and_restore(1, runs(5, 100));
}

#[test]
fn a_guest_with_two_processors_goes_on_too() {
    save_and_restore(2, runs(3, 40));
}

fn save_and_restore(cpus: u32, rounds: u32) {
    let guest = Guest::new(CLOUD, SCRIPT)
        .with_tools()
        .with(&format!("--qmp unix:{SOCKET} --save-directory ."));
    let guest = guest.with(&format!("--memory 256M --cpus {cpus}")).with_disk("raw", 16 << 20, "");
    let qcow2 = guest.path("qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args([qcow2.as_os_str(), "16M".as_ref()])
        .status();
    assert!(made.unwrap().success());
    let guest = guest.with("--disk qcow2,format=qcow2");

    let began = Instant::now();
    let mut text = String::new();
    let mut session = guest.start();
    // The same moments in each run; the first few are in the middle of the boot.
    let mut moment = 7;
    for round in 0..rounds {
        moment = moment * 75 % 65_537;
        if round >= 2 {
            session.expect("fact: tick ", BOOT_BOUND);
        }
        thread::sleep(Duration::from_millis(moment % 3000));
        text += &save(&guest, session);
        let options = ["", ",map=off", ",map=on", ",clock=host"][round as usize % 4];
        println!("round {round}: restored with `{options}`");
        session = restore(&guest, options);
    }
    session.expect("fact: tick ", BOOT_BOUND);
    session.send("hello\n");
    let report = Report::new(session.wait(BOOT_BOUND).must_be(0));
    text += &report.text;
    let all = |name: &str| -> Vec<String> {
        let prefix = format!("fact: {name} ");
        let lines = text.lines().filter_map(|line| line.split_once(&prefix));
        lines.map(|(_, value)| value.to_owned()).collect()
    };
    assert_eq!(all("echo"), ["hello"], "{text}");
    assert_eq!((all("broken"), all("complaint")), (vec![], vec![]), "{text}");
    assert_eq!(all("finished").len(), 2, "{text}");
    println!("rounds of verified writes: {:?}", all("rounds"));
    let ticks: Vec<f64> =
        all("tick").iter().filter_map(|tick| tick.split(' ').next()?.parse().ok()).collect();
    assert!(ticks.is_sorted(), "time went back: {ticks:?}");
    let host = began.elapsed().as_secs_f64();
    assert!(*ticks.last().unwrap() < host + 1.0, "the guest counts {ticks:?}, the host {host} s");
}

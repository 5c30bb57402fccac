//! A Linux guest in the middle of verified disk I/O is saved at random moments, and goes on in another process each time.

use std::fs::File;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use minivmm_tests::linux::{BOOT_BOUND, CLOUD, Guest, Report, System};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{minivmm, runs};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

const SOCKET: &str = "control.sock";
const SAVED: &str = "saved";
/// A file that has [`SAVED`] as its base.
const INCREMENT: &str = "increment";
/// It has a driver for the VM generation ID.
const PLAIN: System = System { kernel: "linux-amd64/vmlinux", initrd: "initrd-amd64.cpio" };

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

/// For each number that comes from the console, waits until the guest has heard that often that it is a copy, and then draws random
/// bytes.
const DRAW: &str = "
fact ready
while read -r copies && test $copies != end; do
  until test $(dmesg | grep -c 'crng reseeded due to virtual machine fork') = $copies; do sleep 0.1; done
  fact drawn $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ')
done";

fn restore(guest: &Guest, options: &str) -> Session {
    restore_at(guest, options, SOCKET)
}

fn restore_at(guest: &Guest, options: &str, socket: &str) -> Session {
    restore_from(guest, SAVED, options, socket)
}

fn restore_from(guest: &Guest, file: &str, options: &str, socket: &str) -> Session {
    let mut command = minivmm([
        "--incoming",
        &format!("file:{file},paths=saved{options}"),
        "--save-directory",
        ".",
        "--qmp",
    ]);
    command.arg(format!("unix:{socket}")).current_dir(guest.path("."));
    Session::start(command.env("TMPDIR", std::env::temp_dir()))
}

/// Saves the guest and ends its process. What it printed is returned.
fn save(guest: &Guest, session: Session) -> String {
    save_to(guest, session, SAVED)
}

/// To [`INCREMENT`] what has changed only, to another file all.
fn save_to(guest: &Guest, session: Session, file: &str) -> String {
    let saved = format!("file:{}", guest.path(file).display());
    let mut qmp = Qmp::connect(&guest.path(SOCKET));
    qmp.set_bound(BOOT_BOUND);
    let capabilities = json!([
        { "capability": "events", "state": true },
        { "capability": "x-minivmm-incremental", "state": file == INCREMENT },
    ]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
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

/// Two clones of one machine, and then a copy of one of them.
#[test]
fn a_restored_guest_draws_other_random_numbers() {
    let options = format!("--memory 256M --qmp unix:{SOCKET} --save-directory .");
    let guest = Guest::new(PLAIN, DRAW).with(&options);
    let session = guest.start();
    session.expect("fact: ready", BOOT_BOUND);
    save(&guest, session);
    let mut drawn = Vec::new();
    let mut draw = |clone: &mut Session, copies: u32| {
        clone.send(format!("{copies}\n"));
        let text = clone.expect("fact: drawn ", BOOT_BOUND) + &clone.expect("\n", BOOT_BOUND);
        println!("copied {copies} times: {text}");
        let bytes = text.rsplit("fact: drawn ").next().unwrap().trim().to_owned();
        assert!(bytes.len() == 32 && !drawn.contains(&bytes), "{bytes} after {drawn:?}");
        drawn.push(bytes);
    };
    let [mut first, mut second] = ["first", SOCKET].map(|socket| restore_at(&guest, "", socket));
    draw(&mut first, 1);
    draw(&mut second, 1);
    first.send("end\n");
    first.wait(BOOT_BOUND).must_be(0);
    save(&guest, second);
    let mut third = restore(&guest, "");
    draw(&mut third, 2);
    third.send("end\n");
    third.wait(BOOT_BOUND).must_be(0);
}

/// A guest with a raw disk and a qcow2 one, which [`SCRIPT`] fills.
fn loaded(cpus: u32) -> Guest {
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
    guest.with("--disk qcow2,format=qcow2")
}

/// What the lines of [`SCRIPT`] in `text` say of `name`.
fn facts(text: &str, name: &str) -> Vec<String> {
    let prefix = format!("fact: {name} ");
    let lines = text.lines().filter_map(|line| line.split_once(&prefix));
    lines.map(|(_, value)| value.to_owned()).collect()
}

/// The guest writes on to its disks while its memory is written. What was saved goes on with the images that were copied at that moment.
#[test]
fn a_guest_under_load_is_saved_in_the_background_and_its_past_goes_on() {
    let guest = loaded(1).with("--sandbox on,spawn=allow");
    let session = guest.start();
    let mut qmp = Qmp::connect(&guest.path(SOCKET));
    qmp.set_bound(BOOT_BOUND);
    let capabilities = ["events", "background-snapshot"];
    let capabilities = capabilities.map(|name| json!({ "capability": name, "state": true }));
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
    let end = |mut session: Session, text: &str| {
        session.send("hello\n");
        let text = text.to_owned() + &Report::new(session.wait(BOOT_BOUND).must_be(0)).text;
        let complaints = (facts(&text, "broken"), facts(&text, "complaint"));
        assert_eq!(complaints, (vec![], vec![]), "{text}");
        assert_eq!(facts(&text, "finished").len(), 2, "{text}");
        println!("rounds of verified writes: {:?}", facts(&text, "rounds"));
    };
    let mut text = String::new();
    for round in 0..runs(1, 20) {
        text += &session.expect("fact: tick ", BOOT_BOUND);
        qmp.query("stop");
        let saved = format!("file:{}", guest.path("saved").display());
        qmp.execute("migrate", json!({ "uri": saved })).unwrap();
        while qmp.event("MIGRATION")["status"] != "active" {}
        for image in ["raw", "qcow2"] {
            let mut copy = Command::new("cp");
            copy.args(["--preserve=timestamps", "--reflink=auto"]);
            copy.args([guest.path(image), guest.path(&format!("{image}-copy"))]);
            assert!(copy.status().unwrap().success());
        }
        qmp.query("cont");
        while qmp.event("MIGRATION")["status"] != "completed" {}
        println!("round {round}: {}", qmp.query("query-migrate"));
        let mut past = minivmm(["--incoming", "file:saved,paths=saved"]);
        past.args(["--disk", "raw-copy,id=vdb", "--disk", "qcow2-copy,id=vdc,format=qcow2"]);
        past.current_dir(guest.path(".")).env("TMPDIR", std::env::temp_dir());
        let past = Session::start(&mut past);
        past.expect("fact: tick ", BOOT_BOUND);
        end(past, "");
    }
    end(session, &text);
}

fn save_and_restore(cpus: u32, rounds: u32) {
    let guest = loaded(cpus);
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
        let kind = round as usize % 4;
        let file = [SAVED, SAVED, SAVED, INCREMENT][kind];
        text += &save_to(&guest, session, file);
        let options = ["", ",map=off", ",map=on", ",map=on,clock=host"][kind];
        println!("round {round}: {file} is restored with `{options}`");
        // A page that the host has to read first makes the guest's task wait for an asynchronous page fault. In tmpfs all pages stay.
        for file in [SAVED, file] {
            fadvise(File::open(guest.path(file)).unwrap(), 0, None, Advice::DontNeed).unwrap();
        }
        session = restore_from(&guest, file, options, SOCKET);
    }
    session.expect("fact: tick ", BOOT_BOUND);
    session.send("hello\n");
    let report = Report::new(session.wait(BOOT_BOUND).must_be(0));
    text += &report.text;
    let all = |name: &str| facts(&text, name);
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

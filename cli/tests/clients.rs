//! The control socket's clients: they come and go, several at once, and some are broken.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

use minivmm_tests::files::sparse;
use minivmm_tests::guest::Program;
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm, small_guest};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use tempfile::tempdir;

const SOCKET: &str = "control.sock";

fn start(directory: &Path, program: Program) -> (Session, Qmp) {
    let session =
        Session::start(small_guest(directory, program).args(["--qmp", &format!("unix:{SOCKET}")]));
    let qmp = Qmp::connect(&directory.join(SOCKET));
    (session, qmp)
}

fn status(qmp: &mut Qmp) -> String {
    qmp.query("query-status")["status"].as_str().unwrap().to_owned()
}

#[test]
fn clients_come_and_go_and_need_no_newlines() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join(SOCKET);
    let (_session, mut qmp) = start(directory.path(), Program::Spin);
    // Before the negotiation there is nothing else.
    let mut second = Qmp::greeted(&socket);
    assert_eq!(second.execute("stop", json!({})).unwrap_err().0, "CommandNotFound");
    let offered = second.execute("qmp_capabilities", json!({"enable": ["oob"]})).unwrap_err();
    assert_eq!(offered.0, "GenericError");
    second.execute("qmp_capabilities", json!({"enable": []})).unwrap();
    // Several at once, cut anywhere.
    for part in [
        r#"{"execute": "query-sta"#,
        r#"tus"}{"execute":"stop","id":[1]}  {"execu"#,
        r#"te":"quary"}"#,
    ] {
        second.stream().write_all(part.as_bytes()).unwrap();
        second.stream().flush().unwrap();
    }
    assert_eq!(second.receive().unwrap()["return"]["status"], "running");
    assert_eq!(second.receive().unwrap()["event"], "STOP");
    assert_eq!(second.receive().unwrap(), json!({"return": {}, "id": [1]}));
    assert_eq!(second.receive().unwrap()["error"]["class"], "CommandNotFound");
    // Everyone hears of what one did.
    qmp.event("STOP");
    drop(second);
    for _ in 0..50 {
        assert_eq!(status(&mut Qmp::connect(&socket)), "paused");
    }
    // More than there are places: silent clients give way to those that come.
    let mut others: Vec<_> = (0..40).map(|_| Qmp::connect(&socket)).collect();
    assert_eq!(status(others.last_mut().unwrap()), "paused");
    assert_eq!(others[0].receive(), None);
    drop(others);
    // A client may say all it has to say and hang up its end.
    let mut brief = Qmp::greeted(&socket);
    brief
        .stream()
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-version\"}")
        .unwrap();
    brief.stream().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(brief.receive().is_some() && brief.receive().is_some());
    assert_eq!(brief.receive(), None);
}

#[test]
fn a_long_answer_arrives_whole() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    sparse(&directory.path().join("disk.img"), 1 << 20);
    let mut command = small_guest(directory.path(), Program::Spin);
    let _session =
        Session::start(command.args(["--qmp", &format!("unix:{SOCKET}"), "--disk", "disk.img"]));
    let mut qmp = Qmp::connect(&directory.path().join(SOCKET));
    let boundaries: Vec<u64> = (1..120_000).collect();
    let arguments = json!({ "id": "vda", "boundaries": boundaries });
    qmp.execute("block-latency-histogram-set", arguments).unwrap();
    let stats = &qmp.query("query-blockstats")[0]["stats"];
    assert_eq!(stats["rd_latency_histogram"]["bins"].as_array().unwrap().len(), 120_000);
    assert_eq!(status(&mut qmp), "running");
}

#[test]
fn broken_clients_cost_nothing() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let socket = directory.path().join(SOCKET);
    let (session, mut qmp) = start(directory.path(), Program::Echo);
    session.expect("ready\n", BOUND);
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", session.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = resident();

    // One hundred megabytes of one string.
    let mut endless = Qmp::connect(&socket);
    endless.stream().write_all(b"{\"execute\": \"").unwrap();
    let chunk = vec![b'x'; 1 << 20];
    let sent = (0..100).take_while(|_| endless.stream().write_all(&chunk).is_ok()).count();
    assert!(sent < 100, "all of it was taken");

    // A new start after half a command, as QEMU's protocol describes it; and garbage takes no command with it.
    let mut lost = Qmp::connect(&socket);
    for bytes in [
        &b"{\"execute\": \"que\x01{\"execute\":\"query-status\"}"[..],
        b"[[{'a\xff{'execute':'query-status'}",
        b"}{\"execute\":\"query-status\"}",
    ] {
        lost.stream().write_all(bytes).unwrap();
        assert_eq!(lost.receive().unwrap()["error"]["class"], "GenericError");
        assert_eq!(lost.receive().unwrap()["return"]["status"], "running");
    }

    // Garbage: answered as long as the answers are read.
    let mut garbage = Qmp::connect(&socket);
    garbage
        .stream()
        .write_all(b"\xff\x00GET / HTTP/1.1\r\n\r\n]]}}\n\x01\n{\"execute\":\"query-status\"}")
        .unwrap();
    let mut errors = 0;
    loop {
        let message = garbage.receive().unwrap();
        if message.get("return").is_some() {
            break;
        }
        assert_eq!(message["error"]["class"], "GenericError");
        errors += 1;
    }
    assert!((1..=4).contains(&errors), "{errors}");

    // Commands and garbage, and never a look at the answers: in the end the VM does not read from the client any more.
    for bytes in [&b"{\"execute\":\"query-qmp-schema\"}"[..], b"nonsense\n"] {
        let mut deaf = Qmp::connect(&socket);
        deaf.stream().set_nonblocking(true).unwrap();
        let flood = bytes.repeat(64 << 10);
        let mut taken = 0;
        let full = loop {
            match deaf.stream().write(&flood) {
                Ok(count) => taken += count,
                // What is under way in the socket may still be taken: only a standstill counts.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let calm = status(&mut qmp);
                    assert_eq!(calm, "running");
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    match deaf.stream().write(&flood) {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break true,
                        Ok(count) => taken += count,
                        Err(_) => break false,
                    }
                }
                Err(_) => break false,
            }
            assert!(taken < 64 << 20, "a client that never reads is served for ever");
        };
        // And one that only listens to nothing is sent away once too much has happened.
        if full {
            for _ in 0..4000 {
                qmp.query("stop");
                qmp.query("cont");
                qmp.events.clear();
            }
        }
    }

    assert_eq!(status(&mut qmp), "running");
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 10, "the VM grew by {grown} KiB");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// What is no VM, or a FIFO instead of a file, holds up no `minivmm ctl`, and makes it no larger.
#[test]
fn ctl_gives_up_on_what_is_no_vm() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let ctl = |arguments: &[&str]| {
        let mut command = minivmm([&["ctl"], arguments].concat());
        Session::start(command.current_dir(directory.path()))
    };
    let silent = UnixListener::bind(directory.path().join("silent")).unwrap();
    let waiting = ctl(&["silent", "status"]);

    let endless = UnixListener::bind(directory.path().join("endless")).unwrap();
    let refused = ctl(&["endless", "status"]);
    let (mut client, _) = endless.accept().unwrap();
    while client.write_all(&[b'x'; 64 << 10]).is_ok() {}
    let ended = refused.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("not the control socket of a VM"), "{ended}");

    drop(endless);
    let ended = ctl(&["endless", "status"]).wait(BOUND).must_be(1);
    let line = "no VM listens there (Connection refused (os error 111)); give the path of a running VM's --qmp unix:PATH";
    assert!(ended.errors.contains(&format!("ctl endless: {line}")), "{ended}");
    let ended = ctl(&["missing", "status"]).wait(BOUND).must_be(1);
    let line = "cannot connect: No such file or directory (os error 2); check the path";
    assert!(ended.errors.contains(&format!("ctl missing: {line}")), "{ended}");

    let (session, mut qmp) = start(directory.path(), Program::Spin);
    mknodat(CWD, directory.path().join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .unwrap();
    let ended = ctl(&[SOCKET, "save", "fifo"]).wait(BOUND).must_be(1);
    assert!(ended.errors.contains("it exists and is no saved machine"), "{ended}");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);

    let ended = waiting.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("ctl silent: no answer within 10 s"), "{ended}");
    drop(silent);
}

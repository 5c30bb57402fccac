//! Saves in the middle of something: an event that ends the machine, output, input, and a limit that holds requests back.

use std::io::Write;

use super::*;

/// Events of vCPUs reach the main loop some time after the guest caused them. A save in between must not lose them: the guest
/// does not cause them again.
#[test]
fn an_end_in_the_moment_of_a_save_is_not_lost() {
    if !kvm_is_usable() {
        return;
    }
    let mut moment = 7;
    let [mut saves, mut ends] = [0, 0];
    for (program, status) in [
        (Program::PowerOff, 4),
        (Program::Panic, 3),
        (Program::TripleFault, 3),
        (Program::Exit, SUCCESS),
    ] {
        for _ in 0..runs(5, 100) {
            let directory = tempdir().unwrap();
            let mut command = guest(directory.path(), program, "");
            let session = Session::start(command.args(["--paused", "--save-directory", "."]));
            let mut qmp = Qmp::connect(&directory.path().join("qmp"));
            qmp.enable_migration_events();
            let saved = directory.path().join("saved");
            qmp.stream().write_all(br#"{ "execute": "cont" }"#).unwrap();
            moment = moment * 75 % 65_537;
            std::thread::sleep(Duration::from_micros(moment % 200));
            let uri = format!("file:{}", saved.display());
            let migrate = json!({ "execute": "migrate", "arguments": { "uri": uri } });
            // The VM may have ended.
            let _ = qmp.stream().write_all(migrate.to_string().as_bytes());
            let over = |message: &serde_json::Value| {
                let status = &message["data"]["status"];
                message["event"] == "MIGRATION" && (status == "completed" || status == "failed")
            };
            let last = loop {
                match qmp.receive() {
                    Some(message) if !over(&message) => {}
                    last => break last,
                }
            };
            if last.is_some_and(|last| last["data"]["status"] == "completed") {
                saves += 1;
                qmp.query("quit");
                // Ended by `quit`, where --debug-exit expects no status.
                session.wait(BOUND).must_be(0);
                Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(status);
            } else {
                ends += 1;
                session.wait(BOUND).must_be(status);
                assert!(!saved.exists(), "the machine ended and was saved");
            }
        }
    }
    println!("{saves} were saved before their end, {ends} ended before they were saved");
}

#[test]
fn no_output_is_lost_or_doubled() {
    if !kvm_is_usable() {
        return;
    }
    let expected = CHATTER.repeat(1024).into_bytes();
    for count in [1, 15, 1000, 9000] {
        let directory = tempdir().unwrap();
        let session = Session::start(&mut guest(directory.path(), Program::Chatter, ""));
        session.output.expect_bytes(count, BOUND).unwrap();
        let saved = ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND);
        let mut output = session.wait(BOUND).output;
        // A guest that was faster than the save has ended.
        if saved.code() == 0 {
            let ended = Session::start(&mut restore(directory.path(), "")).wait(BOUND);
            output.extend(ended.must_be(SUCCESS).output);
        }
        assert!(output == expected, "after {count}: {} bytes", output.len());
    }
}

/// What minivmm has read and not yet given to the serial port is lost with the process, as with any program. What the guest has
/// goes on, and typing works.
#[test]
fn a_guest_that_is_saved_in_a_paste_hears_what_is_typed_later() {
    if !kvm_is_usable() {
        return;
    }
    let paste: String = (0..2000).map(|number| format!("{number:04} ")).collect();
    for count in [6, 100, 3000] {
        let directory = tempdir().unwrap();
        let mut session = Session::start(&mut guest(directory.path(), Program::Echo, ""));
        session.expect("ready\n", BOUND);
        session.send(&paste);
        session.output.expect_bytes(count, BOUND).unwrap();
        ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
        let mut output = session.wait(BOUND).must_be(0).output;
        let mut session = Session::start(&mut restore(directory.path(), ""));
        session.send("typed later\x04");
        output.extend(session.wait(BOUND).must_be(SUCCESS).output);
        let text = String::from_utf8(output).unwrap();
        let echo = text.strip_prefix("ready\n").and_then(|text| text.strip_suffix("typed later"));
        assert!(echo.is_some_and(|echo| paste.starts_with(echo)), "{text}");
    }
}

/// A request that a limit holds back for minutes does not hold up a save. In the restored machine the limit holds for it, too.
#[test]
fn a_save_waits_for_no_limit_and_limits_hold_afterwards() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let limit = ",throttling.bps-total=1";
    let session = Session::start(&mut guest(directory.path(), Program::DiskLoad, limit));
    session.output.expect_bytes(1, BOUND).unwrap();
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let mut command = restore(directory.path(), "");
    let session = Session::start(command.args(["--qmp", "unix:qmp"]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    assert_eq!(qmp.query("query-block")[0]["inserted"]["bps"], 1);
    // In a restored machine nothing is counted yet, so one request starts, or a few. Without the limit, all 4096 are a matter of
    // milliseconds.
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    let dots = session.wait(BOUND).must_be(0).output.len();
    assert!(dots < 10, "{dots} requests in a moment");
}

/// 256 requests wait for a limit of one a second. The restored machine starts those that the limit admits, and not all at once.
#[test]
fn requests_that_wait_for_a_limit_wait_on_in_the_restored_machine() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = guest(directory.path(), Program::Flood, ",throttling.iops-total=1");
    sparse(&directory.path().join("disk.img"), 8 << 30);
    let session = Session::start(&mut command);
    session.expect("ready\n", BOUND);
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let trace = ["--qmp", "unix:qmp", "--trace", "virtio_blk_handle_read,file=trace"];
    let session = Session::start(restore(directory.path(), "").args(trace));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    // Once the machine stands still, its disk has begun what it was to begin.
    qmp.query("stop");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    let started = fs::read_to_string(directory.path().join("trace")).unwrap();
    let started = started.lines().filter(|line| line.contains("virtio_blk_handle")).count();
    assert!((1..20).contains(&started), "{started} requests at once");
}

//! `--gdb`: what a debugger sees, changes and stops, on a confined machine.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use minivmm_tests::gdb::{Debugger, SOCKET_NAME, debugged_guest};
use minivmm_tests::guest::debugger::{
    ALIAS, BREAKS, COUNTER, LOOP, SECOND_COUNTER, SECOND_INSTRUCTION, SECOND_LOOP, STATUS, TRAPS,
};
use minivmm_tests::guest::{BASE, Program, SUCCESS};
use minivmm_tests::qmp::{Qmp, SOCKET};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, has_hardware_virtualization, kvm_is_usable, skip, unexpected_lines};
use rustix::process::Signal;
use serde_json::json;
use tempfile::{TempDir, tempdir};

fn entry() -> u64 {
    BASE + u64::from(Program::Debugged.offset())
}

fn guest_loop() -> u64 {
    entry() + LOOP
}

/// The guest for debuggers, in a directory of its own.
fn guest(options: &[&str]) -> (TempDir, Session) {
    let directory = tempdir().unwrap();
    let session = debugged_guest(directory.path(), options);
    (directory, session)
}

/// A guest that waits for its debugger, which is connected.
fn paused(options: &[&str]) -> (TempDir, Session, Debugger) {
    let (directory, session) = guest(&[options, &["--paused"]].concat());
    let debugger = Debugger::connect(&directory.path().join(SOCKET_NAME));
    (directory, session, debugger)
}

/// Ends the guest with a status of the debugger's, which learns of it.
fn end(session: Session, mut debugger: Debugger) {
    debugger.set_word(STATUS, SUCCESS as u32);
    assert_eq!(debugger.go("vCont;c"), format!("W{SUCCESS:02x}"));
    assert_eq!(debugger.reply(), None);
    let ended = session.wait(BOUND).must_be(SUCCESS);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
}

#[test]
fn a_paused_guest_shows_and_takes_registers_and_memory() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    assert_eq!(debugger.request("?"), "T05thread:01;");
    let registers = debugger.registers();
    assert_eq!((registers[4], registers[16]), (0x7000, entry()));
    // mov $0x1234, %ebx
    assert_eq!(debugger.request(&format!("m{:x},5", entry())), "bb34120000");
    let all = debugger.request("g");
    let changed =
        format!("{}{:016x}{}", &all[..16], 0x1122_3344_5566_7788_u64.swap_bytes(), &all[32..]);
    debugger.ok(&format!("G{changed}"));
    assert_eq!(debugger.registers()[1], 0x1122_3344_5566_7788);
    // The code segment is at 0x8c bytes, behind rip and the flags: no register that a debugger can just write.
    let segment = format!("{}ff{}", &changed[..0x8c * 2], &changed[0x8c * 2 + 2..]);
    assert!(debugger.request(&format!("G{segment}")).starts_with('E'));
    assert_eq!(debugger.request("g"), changed);
    assert!(debugger.request("m4000000000,4").starts_with('E'), "no page there");
    assert!(debugger.request("M4000000000,4:00000000").starts_with('E'), "no page there");
    end(session, debugger);
}

/// The digits of 2048 bytes fill the longest packet. More would be as much memory of the host as the guest has, for one request.
#[test]
fn a_read_is_no_longer_than_its_packet() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    assert_eq!(debugger.request("m100000,800").len(), 4096);
    for length in ["801", "fff", "1000", "1ffffff", "ffffffffffffffff"] {
        assert_eq!(debugger.request(&format!("m0,{length}")), "E79", "{length}");
    }
    // An address that leaves little room in the packet's buffer, so that the memory is read in many small parts.
    let reply = debugger.request(&format!("m{:0>4000},1ffffff", "0"));
    assert!(reply.len() < 4200 && reply.ends_with("E79"), "{} digits", reply.len());
    end(session, debugger);
}

#[test]
fn it_steps_and_breaks() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    for (rip, rbx) in [(5, 0x1234), (8, 0x1235), (11, 0x1236)] {
        assert_eq!(debugger.go("vCont;s:1"), "T05thread:01;");
        let registers = debugger.registers();
        assert_eq!((registers[16], registers[1]), (entry() + rip, rbx));
    }
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    assert_eq!(debugger.go("vCont;c"), "T05thread:01;swbreak:;");
    assert_eq!(debugger.rip(), guest_loop());
    assert_eq!(debugger.word(COUNTER), 0);
    // As gdb does: over the breakpoint by one step of this vCPU alone, and on with the breakpoint back.
    for round in 1..4 {
        debugger.ok(&format!("z0,{:x},1", guest_loop()));
        assert_eq!(debugger.go("vCont;s:1"), "T05thread:01;");
        debugger.ok(&format!("Z0,{:x},1", guest_loop()));
        assert_eq!(debugger.go("vCont;c:-1"), "T05thread:01;swbreak:;");
        assert_eq!(debugger.word(COUNTER), round);
    }
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    end(session, debugger);
}

#[test]
fn addresses_are_the_guests_virtual_ones() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    let instruction = format!("m{:x},8", guest_loop());
    let aliased = format!("m{:x},8", ALIAS + guest_loop());
    assert!(debugger.request(&aliased).starts_with('E'), "nothing is there yet");
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    debugger.go("c");
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    assert_eq!(debugger.request(&aliased), debugger.request(&instruction));
    // Over the border of two pages.
    debugger.ok(&format!("M{:x},8:0102030405060708", ALIAS + 0x1f_0ffc));
    assert_eq!(debugger.word(0x1f_1000), 0x0807_0605);
    end(session, debugger);
}

#[test]
fn hardware_breakpoints() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    debugger.ok(&format!("Z1,{:x},1", guest_loop()));
    assert_eq!(debugger.go("c"), "T05thread:01;hwbreak:;");
    assert_eq!(debugger.rip(), guest_loop());
    // The processor has four debug registers, and no watchpoint for reads alone.
    for address in [8, 16, 24] {
        debugger.ok(&format!("Z4,{:x},8", COUNTER + address));
    }
    assert_eq!(debugger.request(&format!("Z1,{:x},1", entry())), "E16");
    assert_eq!(debugger.request(&format!("Z3,{COUNTER:x},4")), "E16");
    debugger.ok(&format!("z1,{:x},1", guest_loop()));
    for address in [8, 16, 24] {
        debugger.ok(&format!("z4,{:x},8", COUNTER + address));
    }
    end(session, debugger);
}

#[test]
fn watchpoints() {
    if !kvm_is_usable() {
        return;
    }
    if !has_hardware_virtualization() {
        return skip("without hardware virtualization KVM does not look at data breakpoints");
    }
    let (_directory, session, mut debugger) = paused(&[]);
    debugger.ok(&format!("Z2,{COUNTER:x},4"));
    for round in 1..4 {
        assert_eq!(debugger.go("c"), format!("T05thread:01;watch:{COUNTER:x};"));
        let place = guest_loop() + SECOND_INSTRUCTION;
        assert_eq!((debugger.rip(), debugger.word(COUNTER)), (place, round));
    }
    debugger.ok(&format!("z2,{COUNTER:x},4"));
    end(session, debugger);
}

#[test]
fn an_interrupt_stops_a_running_guest() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session, mut debugger) = paused(&["--qmp", &format!("unix:{SOCKET}")]);
    let mut qmp = Qmp::connect(&directory.path().join(SOCKET));
    let mut last = 0;
    for _ in 0..3 {
        debugger.send("c");
        qmp.event("RESUME");
        assert_eq!(qmp.query("query-status")["status"], "running");
        debugger.send_bytes(b"\x03");
        assert_eq!(debugger.reply().as_deref(), Some("T02thread:01;"));
        qmp.event("STOP");
        assert_eq!(qmp.query("query-status")["status"], "debug");
        assert!(debugger.word(COUNTER) >= last);
        last = debugger.word(COUNTER);
    }
    // A stop that another client asks for is one for the debugger, too.
    debugger.send("c");
    qmp.event("RESUME");
    qmp.execute("stop", json!({})).unwrap();
    assert_eq!(debugger.reply().as_deref(), Some("T02thread:01;"));
    end(session, debugger);
}

#[test]
fn vcpus_are_threads() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&["--cpus", "2"]);
    assert_eq!(debugger.request("qfThreadInfo"), "m01,02");
    assert_eq!(debugger.request("qsThreadInfo"), "l");
    debugger.ok("Hg2");
    assert_eq!(debugger.rip(), 0xfff0);
    debugger.ok("Hg1");
    assert_eq!(debugger.rip(), entry());
    assert_eq!(debugger.go("vCont;s:1;c"), "T05thread:01;");
    assert!(debugger.request("T3").starts_with('E'));
    end(session, debugger);
}

#[test]
fn a_vcpu_that_steps_alone_leaves_the_others_where_they_are() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&["--cpus", "2"]);
    let deadline = Instant::now() + BOUND;
    while debugger.word(SECOND_COUNTER) == 0 {
        assert!(Instant::now() < deadline, "the second vCPU does not run");
        debugger.send("vCont;c");
        debugger.send_bytes(b"\x03");
        debugger.reply();
    }
    let (first, second) = (debugger.word(COUNTER), debugger.word(SECOND_COUNTER));
    debugger.ok("Hg2");
    let mut rounds = 0;
    for _ in 0..20 {
        rounds += u32::from(debugger.rip() == SECOND_LOOP % 0x1000);
        assert_eq!(debugger.go("vCont;s:2"), "T05thread:02;");
    }
    assert_eq!(rounds, 10);
    assert_eq!((debugger.word(COUNTER), debugger.word(SECOND_COUNTER)), (first, second + rounds));
    debugger.ok("Hg1");
    let rip = debugger.rip();
    assert_eq!(debugger.go("vCont;s:1"), "T05thread:01;");
    assert_ne!(debugger.rip(), rip);
    assert_eq!(debugger.word(SECOND_COUNTER), second + rounds);
    end(session, debugger);
}

#[test]
fn a_breakpoint_names_its_vcpu() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&["--cpus", "2"]);
    debugger.ok(&format!("Z0,{SECOND_LOOP:x},1"));
    for round in 0..3 {
        assert_eq!(debugger.go("vCont;c"), "T05thread:02;swbreak:;");
        assert_eq!(debugger.word(SECOND_COUNTER), round);
        debugger.ok(&format!("z0,{SECOND_LOOP:x},1"));
        assert_eq!(debugger.go("vCont;s:2"), "T05thread:02;");
        debugger.ok(&format!("Z0,{SECOND_LOOP:x},1"));
    }
    // A vCPU that waits for the other one's step does not run into it.
    let first = debugger.word(COUNTER);
    assert_eq!(debugger.go("vCont;s:2"), "T05thread:02;");
    assert_eq!(debugger.word(COUNTER), first);
    debugger.ok(&format!("z0,{SECOND_LOOP:x},1"));
    end(session, debugger);
}

#[test]
fn a_debugger_leaves_nothing_behind() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session, mut debugger) = paused(&[]);
    let path = directory.path().join(SOCKET_NAME);
    let place = format!("m{:x},8", guest_loop());
    let instruction = debugger.request(&place);
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    debugger.ok(&format!("Z1,{:x},1", guest_loop() + SECOND_INSTRUCTION));
    // A connection that is lost leaves the guest stopped.
    drop(debugger);
    session.expect_error("the guest stays stopped until one connects again", BOUND);
    let mut debugger = Debugger::connect(&path);
    assert_eq!(debugger.request(&place), instruction);
    assert_eq!(debugger.rip(), entry());
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    debugger.go("c");
    // Detached, the guest goes on.
    debugger.ok("D");
    assert_eq!(debugger.reply(), None);
    let mut debugger = Debugger::connect(&path);
    assert_eq!(debugger.request(&place), instruction);
    // A guest that runs when its debugger goes away runs on, without its breakpoints.
    debugger.ok(&format!("Z1,{COUNTER:x},1"));
    debugger.send("c");
    debugger.close();
    let mut debugger = Debugger::connect(&path);
    let counter = debugger.word(COUNTER);
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    debugger.go("c");
    assert!(debugger.word(COUNTER) >= counter);
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    debugger.set_word(STATUS, SUCCESS as u32);
    debugger.ok("D");
    session.wait(BOUND).must_be(SUCCESS);
    assert!(!path.exists());
}

#[test]
fn a_second_debugger_is_turned_away() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session, mut debugger) = paused(&[]);
    assert_eq!(debugger.rip(), entry());
    let mut second = UnixStream::connect(directory.path().join(SOCKET_NAME)).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    session.expect_error("a second debugger was turned away", BOUND);
    assert_eq!(debugger.rip(), entry());
    debugger.send("k");
    // As with `quit` of the control socket, but there is no status.
    session.wait(BOUND).must_be(0);
}

#[test]
fn what_is_no_protocol_ends_the_connection_alone() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session) = guest(&["--paused"]);
    let path = directory.path().join(SOCKET_NAME);
    let overlong = [&b"$"[..], &[b'm'; 10_000]].concat();
    for garbage in [
        &b"$vCont;s#b8"[..],
        b"$Hgffffffffffffffff#00+$vCont;c:7fffffff#00",
        b"$m0,ffffffffffffffff#00$M0,1:zz#00$Z0,,,#00$G00#00$p#00$vCont;;;#00",
        b"\xff\xfe\x00GET / HTTP/1.1\r\n\r\n",
        &overlong,
    ] {
        let mut debugger = Debugger::connect(&path);
        debugger.send_bytes(garbage);
        debugger.close();
    }
    let mut debugger = Debugger::connect(&path);
    // A packet that was damaged on its way is asked for again.
    debugger.send_bytes(b"$?#00");
    assert_eq!(debugger.read(1), b"-");
    // GDB asks for a reply again that has taken long.
    debugger.send_bytes(b"-");
    assert_eq!(debugger.request("?"), "T05thread:01;");
    debugger.send_bytes(b"--");
    debugger.set_word(STATUS, SUCCESS as u32);
    assert_eq!(debugger.go("c"), format!("W{SUCCESS:02x}"));
    session.wait(BOUND).must_be(SUCCESS);
}

/// Any user of the host can connect to a port: what they send fills no log.
#[test]
fn debuggers_that_come_and_go_leave_a_few_lines() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session) = guest(&["--paused"]);
    let path = directory.path().join(SOCKET_NAME);
    let began = Instant::now();
    for _ in 0..100 {
        let mut debugger = Debugger::connect(&path);
        let mut second = UnixStream::connect(&path).unwrap();
        assert_eq!(second.read(&mut [0]).unwrap(), 0, "it is turned away");
        debugger.send("Z9,0,1");
        debugger.send_bytes(b"$?#00");
        debugger.close();
    }
    // Each of three kinds at once, and then once a second.
    let lines = 3 * (began.elapsed().as_secs() as usize + 2);
    session.signal(Signal::TERM);
    let ended = session.wait(BOUND).must_be(4);
    let found = unexpected_lines(&ended.errors).len();
    assert!(found <= lines, "{found} lines: {ended}");
}

/// INT3 in guest memory, behind the four debug registers.
#[test]
fn more_breakpoints_than_debug_registers() {
    if !kvm_is_usable() {
        return;
    }
    let (_directory, session, mut debugger) = paused(&[]);
    let place = format!("m{:x},1", guest_loop());
    let original = debugger.request(&place);
    for address in [guest_loop(), entry() + 0x80, entry() + 0x84, entry() + 0x88] {
        debugger.ok(&format!("Z0,{address:x},1"));
    }
    assert_eq!(debugger.request(&place), original);
    // What has to have a register gets the one of a breakpoint that has not.
    debugger.ok(&format!("Z1,{:x},1", guest_loop() + SECOND_INSTRUCTION));
    assert_eq!(debugger.request(&place), "cc");
    debugger.ok(&format!("Z0,{:x},1", entry() + 0x8c));
    assert_eq!(debugger.go("c"), "T05thread:01;swbreak:;");
    assert_eq!((debugger.rip(), debugger.word(COUNTER)), (guest_loop(), 0));
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    assert_eq!(debugger.request(&place), original);
    assert_eq!(debugger.go("c"), "T05thread:01;hwbreak:;");
    assert_eq!(debugger.word(COUNTER), 1);
    for address in [0x80, 0x84, 0x88, 0x8c] {
        debugger.ok(&format!("z0,{:x},1", entry() + address));
    }
    debugger.ok(&format!("z1,{:x},1", guest_loop() + SECOND_INSTRUCTION));
    end(session, debugger);
}

#[test]
fn the_guests_own_breakpoints_are_the_guests() {
    if !kvm_is_usable() {
        return;
    }
    if !has_hardware_virtualization() {
        return skip("without hardware virtualization KVM does not execute INT3");
    }
    let (_directory, session, mut debugger) = paused(&[]);
    debugger.set_word(BREAKS, 1);
    // The fifth is INT3 in memory, so that KVM gives all of them to the debugger.
    for address in [0x80, 0x84, 0x88, 0x8c] {
        debugger.ok(&format!("Z1,{:x},1", entry() + address));
    }
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    for round in 0..3 {
        assert_eq!(debugger.go("c"), "T05thread:01;swbreak:;");
        assert_eq!((debugger.word(COUNTER), debugger.word(TRAPS)), (round, round));
        debugger.ok(&format!("z0,{:x},1", guest_loop()));
        assert_eq!(debugger.go("vCont;s:1"), "T05thread:01;");
        debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    }
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    end(session, debugger);
}

#[test]
fn what_kvm_cannot_emulate_stops_the_guest_for_its_debugger() {
    if !kvm_is_usable() {
        return;
    }
    if has_hardware_virtualization() {
        return skip("this KVM executes INT3");
    }
    let (_directory, session, mut debugger) = paused(&[]);
    debugger.set_word(BREAKS, 1);
    assert_eq!(debugger.go("c"), "T04thread:01;");
    let place = format!("m{:x},1", debugger.rip());
    assert_eq!(debugger.request(&place), "cc");
    assert_eq!(debugger.go("c"), "T04thread:01;");
    // Without its debugger it ends as ever.
    debugger.ok("D");
    let ended = session.wait(BOUND).must_be(1);
    assert!(ended.errors.contains("KVM cannot emulate the instruction at 0x"), "{ended}");
}

#[test]
fn a_reset_takes_the_breakpoints_of_memory_with_it() {
    if !kvm_is_usable() {
        return;
    }
    let (directory, session, mut debugger) = paused(&["--qmp", &format!("unix:{SOCKET}")]);
    let mut qmp = Qmp::connect(&directory.path().join(SOCKET));
    let place = format!("m{:x},8", guest_loop());
    let instruction = debugger.request(&place);
    debugger.ok(&format!("Z0,{:x},1", guest_loop()));
    debugger.go("c");
    qmp.execute("system_reset", json!({})).unwrap();
    assert_eq!(debugger.request(&place), instruction);
    assert_eq!(debugger.rip(), entry());
    debugger.ok(&format!("z0,{:x},1", guest_loop()));
    assert_eq!(debugger.request(&place), instruction);
    end(session, debugger);
}

#[test]
fn a_port_of_the_loopback_interface_does_as_well() {
    if !kvm_is_usable() {
        return;
    }
    // Free a moment ago: the kernel gives ports out in turn.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("tcp:127.0.0.1:{port}");
    let (_directory, session) = guest(&["--gdb", &address, "--paused"]);
    let mut debugger = Debugger::connect_tcp(port);
    assert_eq!(debugger.rip(), entry());
    end(session, debugger);
}

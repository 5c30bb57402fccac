//! Debian's gdb as the debugger of `--gdb`, with the commands of the chapter `vmm/docs/step-through-a-boot.md`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use minivmm_tests::gdb::{
    SOCKET_NAME, chapter, debugged_guest, gdb, in_start_kernel, small_kernel,
};
use minivmm_tests::guest::debugger::{COUNTER, LOOP, SECOND_INSTRUCTION, STATUS};
use minivmm_tests::guest::{BASE, Program, SUCCESS};
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, kvm_is_usable, minivmm};
use tempfile::tempdir;

#[test]
fn gdb_itself_is_content() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = debugged_guest(directory.path(), &["--paused", "--cpus", "2"]);
    let guest_loop = BASE + u64::from(Program::Debugged.offset()) + LOOP;
    let at = |address: u64| format!("*{address:#x}");
    let commands = [
        "set architecture i386:x86-64".to_owned(),
        format!("target remote {SOCKET_NAME}"),
        "info threads".to_owned(),
        "stepi".to_owned(),
        "print/x $rbx".to_owned(),
        format!("break {}", at(guest_loop)),
        "continue".to_owned(),
        "continue".to_owned(),
        format!("print *(int*){COUNTER:#x}"),
        format!("hbreak {}", at(guest_loop + SECOND_INSTRUCTION)),
        "continue".to_owned(),
        "delete".to_owned(),
        format!("set *(int*){STATUS:#x} = {SUCCESS}"),
        "continue".to_owned(),
    ];
    let commands = commands.iter().map(String::as_str);
    let Some(text) = gdb(directory.path(), None, commands, BOUND) else { return };
    for line in [
        "Thread 1.2",
        "$1 = 0x1234",
        "Thread 1 hit Breakpoint 1",
        "$2 = 1",
        "Thread 1 hit Breakpoint 2",
        "exited with code 052",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    session.wait(BOUND).must_be(SUCCESS);
}

/// The chapter's first block. Where KVM has no hardware, Linux comes as far as this, and no further.
#[test]
fn gdb_breaks_in_start_kernel() {
    if !kvm_is_usable() {
        return;
    }
    let Some([kernel, symbols]) = small_kernel() else { return };
    let directory = tempdir().unwrap();
    let mut command = minivmm(["--gdb", &format!("unix:{SOCKET_NAME}"), "--paused", "--kernel"]);
    command.arg(kernel).args(["--cmdline", "nokaslr", "--console", "none", "--cpus", "2"]);
    let session = Session::start(command.current_dir(directory.path()));
    let [block, _] = chapter();
    let commands = block.into_iter().chain(["kill"]);
    let Some(text) = gdb(directory.path(), Some(&symbols), commands, BOUND) else { return };
    in_start_kernel(&text);
    session.wait(BOUND).must_be(0);
}

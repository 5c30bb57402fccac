//! `--dump-on-panic`: the guest's memory and registers in a file, when it panics.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn crash(directory: &Path, program: Program, keys: &str) -> Command {
    let mut command = guest(directory, program, keys);
    command.args(["--dump-on-panic", "dump"]);
    command
}

#[test]
fn a_guest_that_panics_leaves_its_memory() {
    if !kvm_is_usable() {
        return;
    }
    for (program, keys, how) in [
        (Program::Panic, "", "it said so at the pvpanic port"),
        (Program::TripleFault, ",snapshot=on", "triple fault"),
    ] {
        let directory = tempdir().unwrap();
        let session = Session::start(&mut crash(directory.path(), program, keys));
        let ended = session.wait(BOUND).must_be(3);
        let lines = unexpected_lines(&ended.errors);
        assert!(lines[0].contains("--dump-on-panic dump: the guest panicked"), "{ended}");
        let last = format!("minivmm: the guest panicked ({how})");
        assert_eq!(lines.last(), Some(&&last[..]), "{ended}");
        let dump = fs::read(directory.path().join("dump")).unwrap();
        let memory = dump.windows(Program::code().len()).position(|bytes| bytes == Program::code());
        assert!(memory.is_some(), "the guest's code is not in its dump");
        let mode = fs::metadata(directory.path().join("dump")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let check = minivmm(["check", "dump"]).current_dir(directory.path()).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        // Another one takes its place.
        let session = Session::start(&mut crash(directory.path(), program, keys));
        session.wait(BOUND).must_be(3);
        if !keys.is_empty() {
            let mut restore = minivmm(["--incoming", "file:dump,paths=saved"]);
            let refused = Session::start(restore.current_dir(directory.path())).wait(BOUND);
            assert_refused(&refused, "it is a dump that cannot be restored (disk vda: snapshot=on");
        }
    }
}

#[test]
fn a_debugger_shows_where_the_guest_panicked() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    Session::start(&mut crash(directory.path(), Program::Panic, "")).wait(BOUND).must_be(3);
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-c", "dump", "-ex", "p/x $rip"]).current_dir(directory.path());
    let Ok(output) = gdb.output() else { return skip("gdb is not installed") };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let rip = text.split("$1 = 0x").nth(1).map(|rip| u64::from_str_radix(rip.trim(), 16).unwrap());
    let code = 0x10_0000..0x10_0000 + Program::code().len() as u64;
    assert!(rip.is_some_and(|rip| code.contains(&rip)), "{text}");
}

#[test]
fn a_guest_that_does_not_panic_leaves_the_dump_of_before() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let run = |program| {
        let ended = Session::start(&mut crash(directory.path(), program, "")).wait(BOUND);
        (ended.code(), fs::read(at("dump")).unwrap())
    };
    assert_eq!(run(Program::Exit), (SUCCESS, vec![]));
    let (status, dump) = run(Program::Panic);
    assert_eq!((status, &dump[..4]), (3, &b"\x7fELF"[..]));
    assert!(run(Program::Exit) == (SUCCESS, dump));
    fs::write(at("dump"), "something else").unwrap();
    let refused = Session::start(&mut crash(directory.path(), Program::Panic, "")).wait(BOUND);
    assert_refused(&refused, "--dump-on-panic dump: it exists and is no dump; give another path");
    let mut command = guest(directory.path(), Program::Panic, "");
    let refused = Session::start(command.args(["--dump-on-panic", "disk.img"])).wait(BOUND);
    assert_refused(&refused, "--dump-on-panic disk.img is the same file as --disk disk.img");
}

#[test]
fn a_host_without_space_costs_the_dump_and_nothing_else() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let command = crash(directory.path(), Program::Panic, "");
    let ended = Session::start(&mut limited(&command, directory.path())).wait(BOUND).must_be(3);
    assert!(ended.errors.contains("the dump could not be written: "), "{ended}");
    assert!(ended.errors.contains("File too large"), "{ended}");
}

/// A guest panics after a save was asked for, and before it stands still: the main thread is held in between, where it looks at the
/// save's file.
#[test]
fn a_panic_in_the_moment_of_a_save_is_dumped() {
    if !kvm_is_usable() {
        return;
    }
    let Some(target) = HostDisk::mount(0) else { return };
    let directory = tempdir().unwrap();
    let mut command = crash(directory.path(), Program::PanicLoad, "");
    let session = Session::start(command.arg("--paused"));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    qmp.enable_migration_events();
    let file = fs::File::options().read(true).write(true).open(target.path()).unwrap();
    qmp.hand_over("held", &file);
    target.hold_attributes();
    // At once: the main loop looks for the guest's panic only after both.
    let commands = [
        json!({ "execute": "cont" }),
        json!({ "execute": "migrate", "arguments": { "uri": "fd:held" } }),
    ];
    qmp.stream()
        .write_all(commands.map(|command| command.to_string()).concat().as_bytes())
        .unwrap();
    target.wait_until_held();
    // A guest that writes to its disk has panicked before.
    let deadline = std::time::Instant::now() + BOUND;
    while fs::read(directory.path().join("disk.img")).unwrap()[4] == 0 {
        assert!(std::time::Instant::now() < deadline, "the guest does not write");
        std::thread::yield_now();
    }
    target.serve();
    let messages: Vec<_> = std::iter::from_fn(|| qmp.receive()).collect();
    let statuses = messages.iter().filter_map(|message| message["data"]["status"].as_str());
    assert_eq!(statuses.collect::<Vec<_>>(), ["setup", "active", "failed"], "{messages:?}");
    let ended = session.wait(BOUND).must_be(3);
    assert!(ended.errors.contains("this file has its memory"), "{ended}");
    let check = minivmm(["check", "dump"]).current_dir(directory.path()).output().unwrap();
    assert!(check.status.success(), "{check:?}");
}

//! Increments: a saved machine that has only what changed since another one.

use minivmm_tests::image;

use super::*;

/// A machine without disks, saved as `base` after it has run for a moment.
fn base(program: Program, options: &[&str]) -> Option<TempDir> {
    if !kvm_is_usable() {
        return None;
    }
    let directory = tempdir().unwrap();
    fs::write(directory.path().join("guest.elf"), image::pvh(program)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--qmp", "unix:qmp"]);
    let session = Session::start(command.args(options).current_dir(directory.path()));
    session.output.expect_bytes(3, BOUND).unwrap();
    ctl(directory.path(), &["save", "base", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    Some(directory)
}

fn start(directory: &Path, file: &str, options: &[&str]) -> Session {
    let mut command = minivmm(["--incoming", &format!("file:{file}"), "--qmp", "unix:qmp"]);
    Session::start(command.args(options).current_dir(directory))
}

/// Runs the machine of that file for a moment, and saves what changed to another one.
fn next(directory: &Path, from: &str, to: &str) {
    let session = start(directory, &format!("{from},map=on"), &[]);
    session.output.expect_bytes(3, BOUND).unwrap();
    save_and_quit(directory, session, to);
}

fn save_and_quit(directory: &Path, session: Session, to: &str) {
    ctl(directory, &["save", to, "--incremental", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
}

fn run(directory: &Path, word: &str, file: &str) -> Ended {
    Session::start(minivmm([word, file]).current_dir(directory)).wait(BOUND)
}

/// The last cause of a refused save.
#[track_caller]
fn refused(directory: &Path, target: &str, expected: &str) {
    let before = names(directory);
    let ended = ctl(directory, &["save", target, "--incremental"]).wait(BOUND).must_be(1);
    assert!(ended.errors.lines().count() == 1 && ended.errors.contains(expected), "{ended}");
    assert_eq!(names(directory), before, "something is left of the save");
    let state = Qmp::connect(&directory.join("qmp")).query("query-status");
    assert!(
        ["running", "paused", "prelaunch"].contains(&state["status"].as_str().unwrap()),
        "{state}"
    );
}

/// RAM of a saved machine that is no increment, without the page of its VM generation ID.
fn memory(path: &Path) -> Vec<u8> {
    let file = fs::read(path).unwrap();
    let offset = u64::from_le_bytes(file[64 + 56 + 8..][..8].try_into().unwrap());
    let mut memory = file[usize::try_from(offset).unwrap()..].to_vec();
    memory[0xff000..0x10_0000].fill(0);
    memory
}

#[test]
fn an_increment_has_only_what_changed() {
    let Some(directory) = base(Program::Fill, &["--memory", "256M"]) else { return };
    next(directory.path(), "base", "increment");
    let [base, increment] =
        ["base", "increment"].map(|name| allocated(&directory.path().join(name)));
    // The guest counts the lines that it prints; the description has some 20 KiB, the set of pages 8 KiB.
    assert!(base > 128 << 20 && increment < 256 << 10, "{base} and {increment} bytes");
    let shown = run(directory.path(), "show", "increment").must_be(0);
    let text = String::from_utf8_lossy(&shown.output).into_owned();
    let path = directory.path().join("base").canonicalize().unwrap();
    assert!(text.contains("increment of ") && text.contains(path.to_str().unwrap()), "{text}");
    run(directory.path(), "check", "increment").must_be(0);
    if let Ok(notes) = Command::new("readelf")
        .args(["-n", "-l", "increment"])
        .current_dir(directory.path())
        .output()
    {
        assert!(notes.status.success() && notes.stderr.is_empty(), "{notes:?}");
    }
    // Of the base, the last byte is a hole.
    let file = fs::File::options().write(true).open(directory.path().join("base")).unwrap();
    file.write_all_at(&[1], file.metadata().unwrap().len() - 1).unwrap();
    run(directory.path(), "show", "increment").must_be(0);
    let ended = run(directory.path(), "check", "increment");
    assert_refused(&ended, "base: it is damaged: memory differs from its checksum");
}

/// What is restored from a chain of files is what a save of all of the machine has at the same moment.
#[test]
fn generations_have_the_memory_of_a_whole_save() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let at = |name: &str| directory.path().join(name);
    next(directory.path(), "base", "second");
    let session = start(directory.path(), "second,map=on", &[]);
    session.output.expect_bytes(3, BOUND).unwrap();
    ctl(directory.path(), &["stop"]).wait(BOUND).must_be(0);
    for (name, option) in [("third", "--incremental"), ("whole", "--quit")] {
        ctl(directory.path(), &["save", name, option]).wait(BOUND).must_be(0);
    }
    session.wait(BOUND).must_be(0);
    assert_ne!(memory(&at("base")), memory(&at("whole")));
    for map in ["on", "off"] {
        let session = start(directory.path(), &format!("third,map={map}"), &["--paused"]);
        Qmp::connect(&at("qmp"));
        ctl(directory.path(), &["save", "again", "--quit"]).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);
        assert!(memory(&at("again")) == memory(&at("whole")), "map={map}");
    }
}

#[test]
fn a_guest_with_a_disk_goes_on_from_increments() {
    let Some(directory) = saved_machine() else { return };
    let at = |name: &str| directory.path().join(name);
    fs::rename(at("saved"), at("0")).unwrap();
    for generation in 0..5 {
        let incoming = format!("{generation},paths=saved,map=on");
        let session = start(directory.path(), &incoming, &["--save-directory", "."]);
        session.output.expect_bytes(10, BOUND).unwrap();
        // By a client that gives a path, and by one that gives a file.
        if generation % 2 == 0 {
            let mut qmp = Qmp::connect(&at("qmp"));
            let on = |name: &str| json!({ "capability": name, "state": true });
            let capabilities = json!([on("events"), on("x-minivmm-incremental")]);
            let capabilities = json!({ "capabilities": capabilities });
            qmp.execute("migrate-set-capabilities", capabilities).unwrap();
            let uri =
                |name: u32| json!({ "uri": format!("file:{}", at(&name.to_string()).display()) });
            let (_, why) = qmp.execute("migrate", uri(generation)).unwrap_err();
            assert!(why.contains("the machine uses it"), "{why}");
            qmp.execute("migrate", uri(generation + 1)).unwrap();
            assert_eq!(statuses(&mut qmp).last().unwrap(), "completed");
            qmp.query("quit");
        } else {
            let next = (generation + 1).to_string();
            ctl(directory.path(), &["save", &next, "--incremental", "--quit"])
                .wait(BOUND)
                .must_be(0);
        }
        session.wait(BOUND).must_be(0);
    }
    // A save of all of the machine may take a base's name.
    let session = start(directory.path(), "5,paths=saved,map=on", &["--save-directory", "."]);
    let mut qmp = Qmp::connect(&at("qmp"));
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": events })).unwrap();
    qmp.execute("migrate", json!({ "uri": format!("file:{}", at("0").display()) })).unwrap();
    assert_eq!(statuses(&mut qmp).last().unwrap(), "completed");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    start(directory.path(), "0,paths=saved", &[]).wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

#[test]
fn an_increment_is_saved_in_the_background() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let allowed = ["--sandbox", "on,spawn=allow"];
    let session = start(directory.path(), "base,map=on", &allowed);
    session.output.expect_bytes(3, BOUND).unwrap();
    for name in ["increment", "later"] {
        ctl(directory.path(), &["save", name, "--incremental", "--background"])
            .wait(BOUND)
            .must_be(0);
    }
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    assert_eq!(qmp.query("query-status")["status"], "running");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    for name in ["increment", "later"] {
        assert!(allocated(&directory.path().join(name)) < 256 << 10);
        let session = start(directory.path(), name, &[]);
        session.output.expect_bytes(3, BOUND).unwrap();
    }
}

/// A reset leaves nothing of the base, and the machine's record of changes says so.
#[test]
fn an_increment_after_a_reset_has_all_of_the_memory() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let at = |name: &str| directory.path().join(name);
    let session = start(directory.path(), "base,map=on", &["--kernel", "guest.elf"]);
    session.output.expect_bytes(3, BOUND).unwrap();
    for command in [&["stop"][..], &["reset"], &["save", "increment", "--incremental"]] {
        ctl(directory.path(), command).wait(BOUND).must_be(0);
    }
    ctl(directory.path(), &["save", "whole", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let session = start(directory.path(), "increment,map=on", &["--paused"]);
    Qmp::connect(&at("qmp"));
    ctl(directory.path(), &["save", "again", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    assert!(memory(&at("again")) == memory(&at("whole")));
}

#[test]
fn a_machine_without_a_base_is_saved_whole_only() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let at = |name: &str| directory.path().join(name);
    let nothing = "the machine has no base: its memory is not mapped from a saved machine";
    for options in [&["--kernel", "guest.elf"][..], &["--incoming", "file:base,map=off"]] {
        let mut command = minivmm(options.iter().copied());
        let mut command = command.args(["--qmp", "unix:qmp"]);
        command = command.current_dir(directory.path());
        let session = Session::start(command);
        session.output.expect_bytes(3, BOUND).unwrap();
        refused(directory.path(), "increment", nothing);
        ctl(directory.path(), &["save", "whole", "--quit"]).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);
    }
    // The base is renamed, comes back, is in the way, and is changed.
    let session = start(directory.path(), "base,map=on", &[]);
    session.output.expect_bytes(3, BOUND).unwrap();
    fs::rename(at("base"), at("moved")).unwrap();
    refused(directory.path(), "increment", "has been renamed or replaced since");
    fs::rename(at("moved"), at("base")).unwrap();
    refused(directory.path(), "base", "base is a base of the increment; give another path");
    ctl(directory.path(), &["save", "increment", "--incremental"]).wait(BOUND).must_be(0);
    // This waits until the machine has copied its memory.
    drop(fs::File::options().write(true).open(at("base")).unwrap());
    refused(directory.path(), "later", nothing);
    ctl(directory.path(), &["quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
}

#[test]
fn a_base_that_is_gone_or_another_one_is_refused() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let at = |name: &str| directory.path().join(name);
    let incoming = |options: &str| {
        start(directory.path(), options, &["--paused", "--timeout", "1ms"]).wait(BOUND)
    };
    next(directory.path(), "base", "second");
    next(directory.path(), "second", "third");
    fs::rename(at("base"), at("kept")).unwrap();
    assert_refused(&incoming("third"), "its base base is not beside it; put it there, or add");
    assert_refused(&incoming("third,paths=saved"), "is not beside it, and there is no /");
    assert_refused(&run(directory.path(), "check", "third"), "is not beside it, and there is no /");
    run(directory.path(), "show", "third").must_be(0);
    fs::write(at("base"), "something else").unwrap();
    assert_refused(&incoming("third"), "base: it is not a saved machine");
    fs::copy(at("second"), at("base")).unwrap();
    assert_refused(
        &incoming("third"),
        "base: it is not the file on which the increment was saved; put that one there",
    );
    // A copy of the base is as good as the base.
    fs::remove_file(at("base")).unwrap();
    fs::copy(at("kept"), at("base")).unwrap();
    incoming("third").must_be(124);
    // Elsewhere, a base is taken from where it was, if the user says so.
    fs::create_dir(at("elsewhere")).unwrap();
    fs::rename(at("third"), at("elsewhere/third")).unwrap();
    assert_refused(
        &incoming("elsewhere/third"),
        "its base second is not beside it; put it there, or add the key paths=saved to take /",
    );
    incoming("elsewhere/third,paths=saved").must_be(124);
    run(directory.path(), "check", "elsewhere/third").must_be(0);
    // A file of that name that is another one does not stand in the way.
    fs::copy(at("kept"), at("elsewhere/second")).unwrap();
    incoming("elsewhere/third,paths=saved").must_be(124);
}

#[test]
fn a_kill_in_an_incremental_save_leaves_base_and_target_as_they_were_or_whole() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let at = |name: &str| directory.path().join(name);
    next(directory.path(), "base", "target");
    let before = fs::read(at("base")).unwrap();
    let mut moment = 7;
    for _ in 0..runs(4, 100) {
        let session = start(directory.path(), "base,map=on", &["--save-directory", "."]);
        session.output.expect_bytes(3, BOUND).unwrap();
        let mut qmp = Qmp::connect(&at("qmp"));
        let on = json!([{ "capability": "x-minivmm-incremental", "state": true }]);
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": on })).unwrap();
        let uri = format!("file:{}", at("target").display());
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        moment = moment * 75 % 65_537;
        std::thread::sleep(Duration::from_micros(moment % 20_000));
        session.signal(Signal::KILL);
        session.wait(BOUND).must_be(128 + 9);
        assert!(fs::read(at("base")).unwrap() == before, "the base was changed");
        run(directory.path(), "check", "target").must_be(0);
    }
}

#[test]
fn increments_have_at_most_16_bases() {
    let Some(directory) = base(Program::Count, &["--memory", "32M"]) else { return };
    let paused = |from: &str| {
        let session = start(directory.path(), &format!("{from},map=on"), &["--paused"]);
        Qmp::connect(&directory.path().join("qmp"));
        session
    };
    let mut from = "base".to_owned();
    for generation in 1..=16 {
        let session = paused(&from);
        from = generation.to_string();
        save_and_quit(directory.path(), session, &from);
    }
    let session = paused(&from);
    refused(directory.path(), "17", "the machine was restored from an increment on 16 other files");
    // A save of all of it begins anew.
    ctl(directory.path(), &["save", "base", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    save_and_quit(directory.path(), paused("base"), "1");
}

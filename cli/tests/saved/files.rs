//! What people and other programs do with the file of a saved machine.

use minivmm_tests::image;

use super::*;

/// A command about a file, such as `show`.
fn about(directory: &Path, word: &str) -> Ended {
    Session::start(minivmm([word, "saved"]).current_dir(directory)).wait(BOUND)
}

#[test]
fn people_look_into_the_file() {
    let Some(directory) = saved_machine() else { return };
    for word in ["show", "check"] {
        let ended = about(directory.path(), word).must_be(0);
        let text = String::from_utf8_lossy(&ended.output).into_owned();
        assert!(text.contains("1 vCPUs, 32 MiB of memory, kernel "), "{text}");
        assert!(text.contains("disk.img, 2097152 bytes, 0 stopped requests"), "{text}");
    }
    // The last byte of memory is a hole.
    let file = fs::File::options().write(true).open(directory.path().join("saved")).unwrap();
    file.write_all_at(&[1], file.metadata().unwrap().len() - 1).unwrap();
    about(directory.path(), "show").must_be(0);
    assert_refused(&about(directory.path(), "check"), "memory differs from its checksum");
}

#[test]
fn debuggers_open_the_file() {
    let Some(directory) = saved_machine() else { return };
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(directory.path()).output();
        let output = output.ok()?;
        assert!(output.status.success(), "{program}: {output:?}");
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let Some(notes) = run("readelf", &["-n", "saved"]) else {
        return skip("readelf is not installed (Debian: binutils)");
    };
    for expected in ["minivmm", "CORE", "NT_PRSTATUS", "QEMU"] {
        assert!(notes.contains(expected), "no {expected}: {notes}");
    }
    let commands = ["-batch", "-nx", "-c", "saved", "-ex", "p/x $rip", "-ex", "x/2wx 0x100000"];
    let Some(text) = run("gdb", &commands) else { return skip("gdb is not installed") };
    // The guest runs in its code, whose first words are a table.
    assert!(text.contains("$1 = 0x100"), "{text}");
    let (words, _) = Program::code().as_chunks::<4>();
    let first = words[..2].iter().map(|word| format!("0x{:08x}", u32::from_le_bytes(*word)));
    assert!(text.contains(&first.collect::<Vec<_>>().join("\t")), "{text}");
}

/// Clones share the pages of the file that they do not write to, and each writes to an overlay of the image.
#[test]
fn clones_go_on_side_by_side() {
    let Some(directory) = saved_machine() else { return };
    let before = [
        fs::read(directory.path().join("disk.img")).unwrap(),
        fs::read(directory.path().join("saved")).unwrap(),
    ];
    let clones: Vec<_> = (0..4)
        .map(|_| {
            let mut command = restore(directory.path(), ",map=on");
            Session::start(command.args(["--disk", "disk.img,snapshot=on"]))
        })
        .collect();
    for clone in clones {
        clone.wait(BOUND).must_be(SUCCESS);
    }
    let after = [
        fs::read(directory.path().join("disk.img")).unwrap(),
        fs::read(directory.path().join("saved")).unwrap(),
    ];
    assert!(before == after, "a clone has written to the image or to the file");
}

/// To read a hole of a mapped file in tmpfs allocates its page there. Holes are therefore not mapped.
#[test]
fn a_file_in_memory_does_not_grow_when_it_is_mapped() {
    if !kvm_is_usable() {
        return;
    }
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        return skip("there is no /dev/shm");
    };
    let session = source(directory.path());
    session.output.expect_bytes(100, BOUND).unwrap();
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let before = allocated(&directory.path().join("saved"));
    for _ in 0..3 {
        let mut command = restore(directory.path(), ",map=on");
        command.args(["--disk", "disk.img,snapshot=on"]);
        Session::start(&mut command).wait(BOUND).must_be(SUCCESS);
        // Another generation looks at all of memory.
        let mut command = restore(directory.path(), ",map=on");
        let session = Session::start(command.args([
            "--paused",
            "--qmp",
            "unix:qmp",
            "--save-directory",
            ".",
        ]));
        Qmp::connect(&directory.path().join("qmp"));
        ctl(directory.path(), &["save", "again", "--quit"]).wait(BOUND).must_be(0);
        session.wait(BOUND).must_be(0);
    }
    assert_eq!(allocated(&directory.path().join("saved")), before);
}

/// Each machine that comes from a file is another generation; a reset is none.
#[test]
fn each_restored_machine_has_a_generation_id_of_its_own() {
    let Some(directory) = saved_machine() else { return };
    let mut ids = BTreeSet::new();
    let mut id = |qmp: &mut Qmp| {
        let id = qmp.query("query-vm-generation-id")["guid"].as_str().unwrap().to_owned();
        let fields: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(fields, [8, 4, 4, 4, 12], "{id}");
        let new = ids.insert(id.clone());
        (id, new)
    };
    for _ in 0..2 {
        let mut command = restore(directory.path(), "");
        command.args(["--disk", "disk.img,snapshot=on", "--paused", "--qmp", "unix:clone"]);
        let session = Session::start(&mut command);
        let mut qmp = Qmp::connect(&directory.path().join("clone"));
        let (restored, new) = id(&mut qmp);
        assert!(new, "{restored} was there before");
        qmp.query("system_reset");
        assert_eq!(id(&mut qmp), (restored, false));
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
    }
}

/// A mistyped path costs no image: neither one that the user named, nor one that an image names, nor a file that is only written.
#[test]
fn a_save_replaces_no_file_that_the_machine_uses() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    for arguments in [&["base", "2M"][..], &["-b", "base", "-F", "qcow2", "overlay"]] {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(arguments).current_dir(&directory);
        assert!(command.status().unwrap().success(), "{command:?}");
    }
    let mut command = small_guest(directory.path(), Program::Spin);
    command.args(["--qmp", "unix:qmp", "--save-directory", ".", "--console", "file:console"]);
    let session =
        Session::start(command.args(["--disk", "overlay,format=qcow2,backing=on,log-writes=log"]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    for name in ["base", "overlay", "log", "console", "guest.elf"] {
        let before = fs::read(directory.path().join(name)).unwrap();
        let uri = format!("file:{}", directory.path().join(name).display());
        let error = qmp.execute("migrate", json!({ "uri": uri })).unwrap_err();
        assert!(error.1.contains("the machine uses it"), "{name}: {error:?}");
        let refused = ctl(directory.path(), &["save", name]).wait(BOUND);
        assert!(refused.must_be(1).errors.contains("it exists and is no saved machine"), "{name}");
        assert!(fs::read(directory.path().join(name)).unwrap() == before, "{name} was changed");
    }
    session.signal(Signal::TERM);
    session.wait(BOUND).must_be(0);
}

/// A process that lives, here or in another PID namespace, has a lock on its file.
#[test]
fn what_a_killed_save_has_left_is_removed_at_the_next_start() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("guest.elf"), image::pvh(Program::Fill)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "256M", "--qmp", "unix:qmp"]);
    command.args(["--save-directory", "."]).current_dir(directory.path());
    let session = Session::start(&mut command);
    session.output.expect_bytes(1, BOUND).unwrap();
    let mut qmp = Qmp::connect(&at("qmp"));
    let uri = format!("file:{}", at("saved").display());
    qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    let hidden = format!(".saved.0.{}.saving", session.id());
    session.signal(Signal::KILL);
    let ended = session.id();
    session.wait(BOUND).must_be(128 + 9);
    // The save may have been faster.
    fs::write(at(&hidden), "unfinished").unwrap();
    let [alive, locked, other] =
        [std::process::id(), ended, ended].map(|pid| format!(".saved.{pid}.saving"));
    let (locked, other) = (locked.replace("saved", "locked"), other.replace(".saving", ""));
    for name in [&alive, &locked, &other] {
        fs::write(at(name), "in use").unwrap();
    }
    let file = fs::File::open(at(&locked)).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    fs::create_dir(at(&hidden.replace("saved", "directory"))).unwrap();
    fs::remove_file(at("qmp")).unwrap();
    let mut expected = names(directory.path());
    expected.remove(std::ffi::OsStr::new(&hidden));
    let session = Session::start(&mut command);
    session.output.expect_bytes(1, BOUND).unwrap();
    ctl(directory.path(), &["quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    assert_eq!(names(directory.path()), expected);
}

/// Not of the one that was named first, and refused.
#[test]
fn a_save_may_replace_the_second_file_that_was_named() {
    let Some(directory) = saved_machine() else { return };
    let at =
        |name: &str| json!({ "uri": format!("file:{}", directory.path().join(name).display()) });
    let mut command = small_guest(directory.path(), Program::Spin);
    let session = Session::start(command.args(["--qmp", "unix:qmp", "--save-directory", "."]));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    ctl(directory.path(), &["save", "other"]).wait(BOUND).must_be(0);
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    let mut command = minivmm(["--incoming", "defer,map=on", "--qmp", "unix:qmp", "--paused"]);
    command.args(["--disk", "disk.img", "--save-directory", "."]).current_dir(directory.path());
    let session = Session::start(&mut command);
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let (_, why) = qmp.execute("migrate-incoming", at("other")).unwrap_err();
    assert!(why.contains("vda"), "{why}");
    qmp.execute("migrate-incoming", at("saved")).unwrap();
    qmp.execute("migrate", at("saved")).unwrap();
    while qmp.query("query-migrate")["status"] == "active" {}
    assert_eq!(qmp.query("query-migrate")["status"], "completed");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
}

/// The file that the machine came from may be replaced by its next save, mapped or not.
#[test]
fn a_save_may_replace_the_file_that_its_machine_came_from() {
    let Some(directory) = saved_machine() else { return };
    for map in ["on", "off", "on"] {
        let mut command = restore(directory.path(), &format!(",map={map}"));
        command.args(["--paused", "--qmp", "unix:qmp", "--save-directory", "."]);
        let session = Session::start(&mut command);
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        let uri = format!("file:{}", directory.path().join("saved").display());
        qmp.enable_migration_events();
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        assert_eq!(statuses(&mut qmp).last().unwrap(), "completed");
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
    }
    Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(SUCCESS);
}

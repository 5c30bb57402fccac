//! Where a machine is restored: with other engines, other processors, an image in use, or without what it needs.

use super::*;

#[test]
fn the_host_may_serve_the_disks_in_another_way() {
    for keys in ["aio=threads", "aio=io_uring", "cache=writethrough", "cache=unsafe,discard=unmap"]
    {
        let Some(directory) = saved_machine() else { return };
        let mut command = restore(directory.path(), "");
        command.args(["--disk", &format!("disk.img,{keys}")]);
        Session::start(&mut command).wait(BOUND).must_be(SUCCESS);
        assert_complete(directory.path());
    }
}

/// The author of the file could have named any file of this user.
#[test]
fn paths_in_a_file_are_opened_only_if_the_user_says_so() {
    let Some(directory) = saved_machine() else { return };
    let restore = |more: &[&str]| {
        let arguments = [&["--incoming", "file:saved"], more].concat();
        let mut command = minivmm(arguments);
        command.current_dir(directory.path());
        Session::start(&mut command)
    };
    let add = format!("add --disk {}/disk.img,id=vda, or", directory.path().display());
    assert_refused(&restore(&[]).wait(BOUND), &add);
    let other = restore(&["--disk", "disk.img,id=root"]).wait(BOUND);
    assert_refused(&other, &add);
    let defer = ["--incoming", "defer", "--qmp", "unix:qmp"];
    let session = Session::start(minivmm(defer).current_dir(directory.path()));
    let uri = format!("file:{}", directory.path().join("saved").display());
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let (_, why) = qmp.execute("migrate-incoming", json!({ "uri": uri })).unwrap_err();
    assert!(why.contains(&add), "{why}");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);

    // The kernel is not opened either: nothing but a reset misses it.
    let given = ["--disk", "disk.img", "--qmp", "unix:qmp", "--paused"];
    let session = restore(&given);
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let (_, why) = qmp.execute("system_reset", json!({})).unwrap_err();
    assert!(why.contains("restore it again with --kernel FILE"), "{why}");
    // Nor does the file name one when this machine is saved again.
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    let ended = session.wait(BOUND).must_be(0);
    assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    let shown = Session::start(minivmm(["show", "saved"]).current_dir(directory.path()));
    let shown = shown.wait(BOUND).must_be(0);
    assert!(String::from_utf8_lossy(&shown.output).contains("memory, kernel \n"), "{shown}");

    let session = restore(&[&given[..], &["--kernel", "guest.elf"]].concat());
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    qmp.query("system_reset");
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// Before there is a machine, too.
#[test]
fn a_silent_client_keeps_no_other_from_naming_the_file() {
    let Some(directory) = saved_machine() else { return };
    let defer = ["--incoming", "defer", "--qmp", "unix:qmp", "--disk", "disk.img"];
    let session = Session::start(minivmm(defer).current_dir(directory.path()));
    let path = directory.path().join("qmp");
    let mut silent: Vec<Qmp> = (0..20).map(|_| Qmp::greeted(&path)).collect();
    let mut first = Qmp::connect(&path);
    let mut second = Qmp::connect(&path);
    assert_eq!(first.query("query-status")["status"], "inmigrate");
    let uri = format!("file:{}", directory.path().join("saved").display());
    second.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
    // The machine has all clients, of which the silent ones have to say what they can do.
    assert_ne!(first.query("query-status")["status"], "inmigrate");
    silent.pop().unwrap().execute("qmp_capabilities", json!({})).unwrap();
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// Confinement takes time: the client does not wait for it.
#[test]
fn the_first_threads_are_started_while_the_process_waits() {
    let Some(directory) = saved_machine() else { return };
    let defer = ["--incoming", "defer", "--qmp", "unix:qmp", "--disk", "disk.img", "--paused"];
    let session = Session::start(minivmm(defer).current_dir(directory.path()));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    qmp.query("query-status");
    let tasks = Path::new("/proc").join(session.id().to_string()).join("task");
    let threads = fs::read_dir(&tasks).unwrap().map(|task| task.unwrap().path());
    let main = tasks.join(session.id().to_string());
    let early: Vec<_> = threads.filter(|task| *task != main).collect();
    let uri = format!("file:{}", directory.path().join("saved").display());
    qmp.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
    // Answered when all threads are confined.
    qmp.query("query-block");
    let name = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap();
    let names: BTreeSet<_> = early.iter().map(name).collect();
    assert_eq!(names, ["console\n", "machine-job\n", "vcpu-0\n"].map(str::to_owned).into());
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

/// As taskset(1), renice(1) and ionice(1) change a process: its main thread.
#[test]
fn all_threads_have_what_the_process_was_given_while_it_waited() {
    let Some(directory) = saved_machine() else { return };
    let defer = ["--incoming", "defer", "--qmp", "unix:qmp", "--disk", "disk.img", "--paused"];
    let session = Session::start(minivmm(defer).current_dir(directory.path()));
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    qmp.query("query-status");
    let id = session.id().to_string();
    for program in
        [&["taskset", "-pc", "0"][..], &["renice", "-n", "5", "-p"], &["ionice", "-c3", "-p"]]
    {
        let changed = Command::new(program[0]).args(&program[1..]).arg(&id).output().unwrap();
        assert!(changed.status.success(), "{changed:?}");
    }
    let uri = format!("file:{}", directory.path().join("saved").display());
    qmp.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
    // Answered when all threads are confined.
    qmp.query("query-block");
    let mut names = BTreeSet::new();
    for task in fs::read_dir(Path::new("/proc").join(&id).join("task")).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        // It ends by itself.
        if ["", "registers\n"].contains(&name.as_str()) {
            continue;
        }
        let status = fs::read_to_string(task.join("status")).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{name}: {status}");
        // `pid (name) state` and then fields, of which the 16th is the nice value (proc_pid_stat(5)).
        let stat = fs::read_to_string(task.join("stat")).unwrap();
        let nice = stat.rsplit(") ").next().unwrap().split(' ').nth(16).unwrap();
        assert_eq!(nice, "5", "{name}");
        let io = Command::new("ionice").arg("-p").arg(task.file_name().unwrap()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&io.stdout), "idle\n", "{name}");
        names.insert(name);
    }
    for name in ["console\n", "machine-job\n", "vcpu-0\n", "disk-vda-0\n"] {
        assert!(names.contains(name), "{names:?}");
    }
    qmp.query("cont");
    session.wait(BOUND).must_be(SUCCESS);
}

/// Landlock's rules are about directories, not paths.
#[test]
fn a_directory_that_is_made_while_the_process_waits_is_a_sockets() {
    let Some(directory) = saved_machine() else { return };
    let late = directory.path().join("late");
    // What a rule allows in a directory, it allows below it.
    fs::create_dir(directory.path().join("sockets")).unwrap();
    for is_replaced in [false, true] {
        if is_replaced {
            fs::create_dir(&late).unwrap();
        }
        let mut command = minivmm(["--incoming", "defer", "--qmp", "unix:sockets/qmp", "--paused"]);
        command.args(["--disk", "disk.img", "--console", "unix:late/console"]);
        let session = Session::start(command.current_dir(directory.path()));
        let mut qmp = Qmp::connect(&directory.path().join("sockets/qmp"));
        qmp.query("query-status");
        if is_replaced {
            fs::remove_dir(&late).unwrap();
        }
        fs::create_dir(&late).unwrap();
        let uri = format!("file:{}", directory.path().join("saved").display());
        qmp.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
        qmp.query("query-block");
        assert!(late.join("console").exists());
        qmp.query("quit");
        session.wait(BOUND).must_be(0);
        fs::remove_dir(&late).expect("nothing but the socket was in it");
    }
}

#[test]
fn the_time_limit_covers_the_wait_for_the_file() {
    let directory = tempdir().unwrap();
    let mut command = minivmm(["--incoming", "defer", "--qmp", "unix:qmp", "--timeout", "50ms"]);
    let ended = Session::start(command.current_dir(directory.path())).wait(BOUND);
    let ended = ended.must_be(124);
    assert!(ended.errors.contains("--timeout: the time is up"), "{ended}");
}

/// There is a thread for each queue, but for no more than the host has processors.
#[test]
fn the_host_may_have_fewer_processors() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = Session::start(&mut guest(directory.path(), Program::DiskLoad, ",num-queues=4"));
    session.output.expect_bytes(100, BOUND).unwrap();
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let command = restore(directory.path(), "");
    let mut pinned = Command::new("taskset");
    pinned.args(["--cpu-list", "0"]).arg(command.get_program()).args(command.get_args());
    Session::start(pinned.current_dir(directory.path())).wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

#[test]
fn a_disk_whose_writes_end_with_the_process_is_not_saved() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = guest(directory.path(), Program::DiskLoad, ",snapshot=on");
    let session = Session::start(&mut command);
    session.output.expect_bytes(3, BOUND).unwrap();
    let refused = ctl(directory.path(), &["save", "saved"]).wait(BOUND).must_be(1);
    assert!(refused.errors.contains("disk vda: snapshot=on writes to a file that"), "{refused}");
    assert!(!directory.path().join("saved").exists());
    session.wait(BOUND).must_be(SUCCESS);
}

/// A machine holds its images for as long as its process lives, also after it was saved.
#[test]
fn source_and_copy_never_have_the_disk_at_the_same_time() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let session = source(directory.path());
    session.output.expect_bytes(100, BOUND).unwrap();
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    let saved = format!("file:{}", directory.path().join("saved").display());
    qmp.enable_migration_events();
    qmp.execute("migrate", json!({ "uri": saved })).unwrap();
    assert_eq!(statuses(&mut qmp), ["setup", "active", "completed"]);
    for options in ["", ",disks=unchecked"] {
        let copy = Session::start(&mut restore(directory.path(), options)).wait(BOUND);
        assert_refused(&copy, "disk.img: is in use by another program");
    }
    session.signal(Signal::KILL);
    session.wait(BOUND).must_be(128 + 9);
    // Paused, the copy does not end by itself.
    let mut command = restore(directory.path(), "");
    let copy = Session::start(command.args(["--paused", "--qmp", "unix:copy"]));
    Qmp::connect(&directory.path().join("copy"));
    let second = Session::start(&mut restore(directory.path(), "")).wait(BOUND);
    assert_refused(&second, "disk.img: is in use by another program");
    copy.signal(Signal::KILL);
    copy.wait(BOUND).must_be(128 + 9);
    Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

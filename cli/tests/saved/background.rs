//! Background saves: what is written is of one moment, while the guest and its machine go on.
//!
//! The file is on a [`HostDisk`], which holds the writes of the child process for as long as a test wants.

use minivmm_tests::guest::COUNTERS;
use minivmm_tests::image;
use minivmm_tests::refusal::{Call, refuse};
use rustix::process::{Pid, kill_process};

use super::*;

const ALLOWED: [&str; 2] = ["--sandbox", "on,spawn=allow"];

/// A guest that counts, and a file to save it to.
struct Counting {
    directory: TempDir,
    disk: HostDisk,
    session: Session,
    qmp: Qmp,
}

impl Counting {
    fn start(options: &[&str]) -> Option<Self> {
        Self::start_as(options, |_| {})
    }

    fn start_as(options: &[&str], prepare: impl FnOnce(&mut Command)) -> Option<Self> {
        if !kvm_is_usable() {
            return None;
        }
        let disk = HostDisk::mount(0)?;
        let directory = tempdir().unwrap();
        let mut command = small_guest(directory.path(), Program::Count);
        prepare(command.args(options));
        Some(Self::run(directory, disk, command))
    }

    fn run(directory: TempDir, disk: HostDisk, mut command: Command) -> Self {
        command.args(["--qmp", "unix:qmp"]);
        let session = Session::start(&mut command);
        session.output.expect_bytes(3, BOUND).unwrap();
        let mut qmp = Qmp::connect(&directory.path().join("qmp"));
        in_background(&mut qmp);
        Self { directory, disk, session, qmp }
    }

    /// Begins a save, none of which is written yet, although the guest goes on.
    fn begin(&mut self) {
        self.disk.hang();
        let file = fs::File::options().read(true).write(true).open(self.disk.path()).unwrap();
        self.qmp.hand_over("held", &file);
        self.qmp.execute("migrate", json!({ "uri": "fd:held" })).unwrap();
        assert_eq!(statuses_until(&mut self.qmp, "active"), ["setup", "active"]);
        self.disk.wait_until_held();
        self.goes_on();
    }

    fn goes_on(&mut self) {
        assert_eq!(self.qmp.query("query-status")["status"], "running");
        let dots = self.session.output.expect_bytes(0, BOUND).unwrap().len();
        self.session.output.expect_bytes(dots + 3, BOUND).unwrap();
    }

    fn child(&self) -> Pid {
        let children = children(self.session.id());
        assert_eq!(children.len(), 1, "{children:?}");
        children[0]
    }

    fn why(&mut self) -> String {
        self.qmp.query("query-migrate")["error-desc"].as_str().unwrap().to_owned()
    }

    fn quit(mut self) {
        assert_eq!(children(self.session.id()), [], "a child process is left");
        self.qmp.query("quit");
        let ended = self.session.wait(BOUND).must_be(0);
        assert!(unexpected_lines(&ended.errors).is_empty(), "{ended}");
    }
}

fn in_background(qmp: &mut Qmp) {
    let capabilities = json!([
        { "capability": "events", "state": true },
        { "capability": "background-snapshot", "state": true },
    ]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).unwrap();
}

/// The processes that have this parent.
fn children(parent: u32) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap();
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_child = |process: &i32| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // `pid (name) state parent`
        let parent_of = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parent_of.and_then(|number| number.parse().ok()) == Some(parent)
    };
    numbers.filter(is_child).filter_map(Pid::from_raw).collect()
}

/// The 32 bits at a guest-physical address, from a saved machine.
fn word_at(saved: &[u8], address: u64) -> u32 {
    let field = |at: usize| u64::from_le_bytes(saved[at..at + 8].try_into().unwrap());
    let headers = (64..).step_by(56).take(usize::from(saved[56]));
    let place = headers.filter(|header| saved[*header] == 1).find_map(|header| {
        let [offset, physical, length] = [8, 24, 32].map(|at| field(header + at));
        let inside = address.checked_sub(physical).filter(|inside| *inside < length)?;
        Some((offset + inside) as usize)
    });
    let place = place.unwrap();
    u32::from_le_bytes(saved[place..place + 4].try_into().unwrap())
}

/// The guest counts at one place and then at the other, thousands of times while the writes are held. A reset clears its memory.
#[test]
fn memory_is_of_one_moment_although_the_guest_goes_on() {
    for meanwhile in ["query-status", "system_reset"] {
        let Some(mut guest) = Counting::start(&ALLOWED) else { return };
        guest.begin();
        guest.qmp.query(meanwhile);
        guest.goes_on();
        guest.disk.serve();
        assert_eq!(statuses_until(&mut guest.qmp, "completed"), ["completed"]);
        let saved = fs::read(guest.disk.path()).unwrap();
        let [low, high] = COUNTERS.map(|address| word_at(&saved, address));
        assert!(low - high <= 1 && high > 0, "{meanwhile}: {low} and {high}");
        fs::write(guest.directory.path().join("saved"), saved).unwrap();
        let directory = guest.directory.path().to_owned();
        guest.goes_on();
        let session = Session::start(&mut restore(&directory, ",map=off"));
        session.output.expect_bytes(3, BOUND).unwrap();
        drop(session);
        guest.quit();
    }
}

#[test]
fn a_canceled_background_save_leaves_nothing() {
    let Some(mut guest) = Counting::start(&ALLOWED) else { return };
    for _ in 0..3 {
        guest.begin();
        guest.qmp.query("migrate_cancel");
        guest.disk.serve();
        let statuses = statuses_until(&mut guest.qmp, "cancelled");
        assert_eq!(statuses, ["cancelling", "cancelled"]);
        guest.goes_on();
    }
    guest.quit();
}

/// The child is in a write that no signal ends. The next save finds it ended.
#[test]
fn a_save_to_a_disk_that_does_not_answer_is_canceled_nevertheless() {
    let Some(mut guest) = Counting::start(&ALLOWED) else { return };
    guest.begin();
    let child = guest.child();
    guest.qmp.query("migrate_cancel");
    assert_eq!(statuses_until(&mut guest.qmp, "cancelled"), ["cancelling", "cancelled"]);
    guest.goes_on();
    guest.disk.serve();
    // `pid (name) state parent`: a zombie.
    let path = format!("/proc/{}/stat", child.as_raw_pid());
    let deadline = std::time::Instant::now() + BOUND;
    while fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(std::time::Instant::now() < deadline, "the child lives on");
        std::thread::yield_now();
    }
    guest.begin();
    let refused = ctl(guest.directory.path(), &["save", "other"]).wait(BOUND).must_be(1);
    let line = "ctl qmp: save: another save is under way; wait until it is done";
    assert!(refused.errors.contains(line), "{refused}");
    guest.disk.serve();
    assert_eq!(statuses_until(&mut guest.qmp, "completed"), ["completed"]);
    guest.quit();
}

/// The child has the file's pages as they are then, until it reads them.
#[test]
fn a_writer_of_the_file_behind_memory_ends_a_background_save() {
    let Some(source) = Counting::start(&[]) else { return };
    let Counting { directory, disk, session, .. } = source;
    ctl(directory.path(), &["save", "saved", "--quit"]).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);
    let mut command = restore(directory.path(), ",map=on");
    command.args(ALLOWED);
    let saved = directory.path().join("saved");
    let mut guest = Counting::run(directory, disk, command);
    guest.begin();
    // Waits until the machine has given up its lease.
    fs::File::options().write(true).truncate(true).open(saved).unwrap();
    guest.goes_on();
    guest.disk.serve();
    assert_eq!(statuses_until(&mut guest.qmp, "failed"), ["failed"]);
    assert!(guest.why().ends_with("it was canceled"), "{}", guest.why());
    guest.goes_on();
    guest.quit();
}

#[test]
fn an_error_of_the_file_fails_a_background_save_and_the_guest_goes_on() {
    let Some(mut guest) = Counting::start(&ALLOWED) else { return };
    guest.begin();
    guest.disk.fail(libc::ENOSPC);
    guest.disk.serve();
    assert_eq!(statuses_until(&mut guest.qmp, "failed"), ["failed"]);
    assert_eq!(
        guest.why(),
        "cannot save the machine: fd:held: No space left on device (os error 28)"
    );
    guest.goes_on();
    guest.quit();
}

#[test]
fn a_killed_child_fails_a_background_save_and_the_guest_goes_on() {
    let Some(mut guest) = Counting::start(&ALLOWED) else { return };
    guest.begin();
    kill_process(guest.child(), Signal::KILL).unwrap();
    guest.disk.serve();
    assert_eq!(statuses_until(&mut guest.qmp, "failed"), ["failed"]);
    assert!(
        guest.why().ends_with("the process that writes it was killed; save again"),
        "{}",
        guest.why()
    );
    guest.goes_on();
    guest.quit();
}

/// The file has a name beside the target's while the process is confined.
#[test]
fn a_machine_that_ends_in_a_background_save_leaves_no_file() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    fs::write(directory.path().join("guest.elf"), image::pvh(Program::Fill)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "256M", "--qmp", "unix:qmp"]);
    command.args(ALLOWED).args(["--save-directory", "."]).current_dir(directory.path());
    let session = Session::start(&mut command);
    session.output.expect_bytes(1, BOUND).unwrap();
    let before = names(directory.path());
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    in_background(&mut qmp);
    let uri = format!("file:{}", directory.path().join("saved").display());
    qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    statuses_until(&mut qmp, "active");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    let mut after = names(directory.path());
    // A save may have been faster.
    after.remove(std::ffi::OsStr::new("saved"));
    after.insert("qmp".into());
    assert_eq!(after, before);
}

/// The child has nothing but the file and the pipe, may call as little as its thread, and dies with its parent.
#[test]
fn the_child_has_the_file_only_and_dies_with_its_parent() {
    let Some(mut guest) = Counting::start(&ALLOWED) else { return };
    guest.begin();
    let child = guest.child();
    let path = |name: &str| format!("/proc/{}/{name}", child.as_raw_pid());
    let status = fs::read_to_string(path("status")).unwrap();
    for right in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        assert!(status.contains(right), "{status}");
    }
    if let Ok(descriptors) = fs::read_dir(path("fd")) {
        assert_eq!(descriptors.count(), 2);
    }
    guest.session.signal(Signal::KILL);
    guest.session.wait(BOUND).must_be(128 + 9);
    guest.disk.serve();
    let deadline = std::time::Instant::now() + BOUND;
    while fs::exists(path("status")).unwrap() {
        assert!(std::time::Instant::now() < deadline, "the child lives on");
        std::thread::yield_now();
    }
}

/// A host may be short of memory for the child's page tables, or count its memory twice (vm.overcommit_memory=2).
#[test]
fn a_host_that_refuses_a_child_fails_a_background_save_and_the_guest_goes_on() {
    // Threads are started by clone3(2).
    let fork = Call { number: libc::SYS_clone as u32, request: None };
    let start = |command: &mut Command| {
        refuse(command, fork, libc::ENOMEM);
    };
    let Some(mut guest) = Counting::start_as(&ALLOWED, start) else { return };
    let file = fs::File::options().read(true).write(true).open(guest.disk.path()).unwrap();
    guest.qmp.hand_over("held", &file);
    guest.qmp.execute("migrate", json!({ "uri": "fd:held" })).unwrap();
    assert_eq!(statuses_until(&mut guest.qmp, "failed"), ["setup", "failed"]);
    let why = guest.why();
    let expected = "the host makes no child process: Cannot allocate memory (os error 12); save without --background (QMP: background-snapshot)";
    assert!(why.ends_with(expected), "{why}");
    guest.goes_on();
    guest.quit();
}

#[test]
fn a_vm_that_may_start_no_child_refuses_a_background_save() {
    let Some(mut guest) = Counting::start(&[]) else { return };
    let refused = guest.qmp.execute("migrate", json!({ "uri": "file:saved" })).unwrap_err();
    assert!(refused.1.contains("start it with --sandbox on,spawn=allow"), "{refused:?}");
    guest.goes_on();
    guest.quit();
}

/// The recipe for a guest that writes to its disk: it stands still while the image is copied, and no longer.
#[test]
fn a_copy_of_the_disk_goes_with_a_background_save() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut command = guest(directory.path(), Program::DiskLoad, "");
    let session = Session::start(command.args(ALLOWED).args(["--save-directory", "."]));
    let mut qmp = Qmp::connect(&at("qmp"));
    in_background(&mut qmp);
    session.output.expect_bytes(100, BOUND).unwrap();
    let migrate = json!({ "uri": format!("file:{}", at("saved").display()) });
    let refused = qmp.execute("migrate", migrate.clone()).unwrap_err();
    assert!(refused.1.contains("disk vda: the guest would go on writing"), "{refused:?}");
    qmp.query("stop");
    qmp.execute("migrate", migrate).unwrap();
    statuses_until(&mut qmp, "active");
    assert_eq!(qmp.query("query-status")["status"], "paused");
    let copied = Command::new("cp")
        .args(["-p", "disk.img", "copy.img"])
        .current_dir(directory.path())
        .status();
    assert!(copied.unwrap().success());
    qmp.query("cont");
    let text = statuses_until(&mut qmp, "completed");
    assert_eq!(text, ["completed"]);
    session.wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
    // The image that went on is refused; its copy is not.
    let refused = Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(2);
    assert!(refused.errors.contains("was changed after the machine was saved"), "{refused}");
    fs::rename(at("copy.img"), at("disk.img")).unwrap();
    Session::start(&mut restore(directory.path(), "")).wait(BOUND).must_be(SUCCESS);
    assert_complete(directory.path());
}

#[test]
fn ctl_saves_in_the_background() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut command = small_guest(directory.path(), Program::Count);
    let session = Session::start(command.args(["--qmp", "unix:qmp"]).args(ALLOWED));
    session.output.expect_bytes(3, BOUND).unwrap();
    ctl(directory.path(), &["save", "saved", "--background"]).wait(BOUND).must_be(0);
    // The next one is not.
    ctl(directory.path(), &["save", "later"]).wait(BOUND).must_be(0);
    let mut qmp = Qmp::connect(&directory.path().join("qmp"));
    assert_eq!(qmp.query("query-status")["status"], "running");
    qmp.query("quit");
    session.wait(BOUND).must_be(0);
    let words = ["saved", "later"].map(|name| {
        let saved = fs::read(directory.path().join(name)).unwrap();
        COUNTERS.map(|address| word_at(&saved, address))
    });
    assert!(words.iter().all(|[low, high]| low - high <= 1) && words[0] < words[1], "{words:?}");
}

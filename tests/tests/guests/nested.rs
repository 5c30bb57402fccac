//! A machine whose guest runs a guest of its own.

use minivmm_tests::guest::{NO_SVM, Program, SUCCESS};
use minivmm_tests::qmp::Qmp;
use minivmm_tests::session::Session;
use minivmm_tests::{BOUND, minivmm, skip, small_guest};
use tempfile::tempdir;

/// It is saved while that guest runs, and reset: the processor then enters the guest's guest again, or leaves it.
#[test]
fn a_machine_in_its_guests_guest_is_saved_and_reset() {
    let directory = tempdir().unwrap();
    let path = directory.path();
    let mut command = small_guest(path, Program::Nested);
    command.args(["--nested", "on", "--debug-exit", "--qmp", "unix:qmp"]);
    let mut session = Session::start(&mut command);
    if session.output.expect("ready\n", BOUND).is_err() {
        session.wait(BOUND).must_be(NO_SVM);
        return skip("KVM has no SVM for its guests");
    }
    session.send("a");
    session.expect("a", BOUND);
    let save = ["ctl", "qmp", "save", "saved", "--quit"];
    Session::start(minivmm(save).current_dir(path)).wait(BOUND).must_be(0);
    session.wait(BOUND).must_be(0);

    let mut command = minivmm(["--incoming", "file:saved,paths=saved", "--nested", "on"]);
    let mut session = Session::start(command.args(["--qmp", "unix:qmp"]).current_dir(path));
    session.send("b");
    session.expect("b", BOUND);
    Qmp::connect(&path.join("qmp")).query("system_reset");
    session.expect("ready\n", BOUND);
    session.send("c");
    session.expect("c", BOUND);
    session.send([4]);
    session.wait(BOUND).must_be(SUCCESS);
}

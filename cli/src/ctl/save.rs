//! `minivmm ctl SOCKET save PATH`: sends QEMU's `migrate`, waits for its end, and names the file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Value, json};
use vmm::NewFile;

use super::client::Client;
use super::error::CtlError;

/// Refuses to replace a file that is no saved machine: the user may have mistyped the path.
fn check_target(path: &Path) -> io::Result<()> {
    let mut start = [0; 18];
    // A FIFO without a writer does not hold it up.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    match opened.and_then(|mut file| file.read_exact(&mut start)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // ELF's magic number and e_type ET_CORE.
        Ok(()) if start.starts_with(b"\x7fELF") && start[16..] == [4, 0] => Ok(()),
        _ => Err(io::Error::other("it exists and is no saved machine; give another path")),
    }
}

/// Saves the VM and waits until that is done. A VM that ran goes on, `in_background` at once, unless it is to `quit` and is saved. An
/// increment (`is_incremental`) does not replace its base.
///
/// The VM is confined and opens no file: this opens it and passes it. It gets its name when it is whole.
pub(super) fn save(
    vm: &mut Client,
    path: &Path,
    quit: bool,
    in_background: bool,
    is_incremental: bool,
) -> Result<(), CtlError> {
    let before = vm.execute("query-status", json!({}))?;
    let capability = |name, state| json!({ "capability": name, "state": state });
    let capabilities = [
        capability("events", true),
        capability("background-snapshot", in_background),
        capability("x-minivmm-incremental", is_incremental),
    ];
    vm.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
    let fails = |source| CtlError::Target(path.to_owned(), source);
    let file = check_target(path).and_then(|()| NewFile::create(path)).map_err(fails)?;
    vm.hand_over(file.file())?;
    vm.execute("migrate", json!({ "uri": "fd:ctl" })).map_err(|error| match error {
        // QEMU's words, in which a save is a migration.
        CtlError::Refused(why) if why.starts_with("There's a migration process") => {
            CtlError::Save("another save is under way; wait until it is done".to_owned())
        }
        error => error,
    })?;
    loop {
        let state = vm.execute("query-migrate", json!({}))?;
        match state["status"].as_str().unwrap_or_default() {
            "completed" => break,
            "failed" | "cancelled" => {
                let why = state["error-desc"].as_str().unwrap_or("it failed");
                return Err(CtlError::Save(why.to_owned()));
            }
            _ => {}
        }
        // Each change of the status is an event.
        vm.receive()?.ok_or(CtlError::Ended)?;
    }
    let refused = |error| CtlError::Save(vmm::WithCauses(&error).to_string());
    let checked =
        if is_incremental { vmm::check_new_increment(&file).map_err(refused) } else { Ok(()) };
    let published = checked.and_then(|()| file.publish().map_err(fails));
    if quit && published.is_ok() {
        vm.execute("quit", json!({}))?;
    } else if before["running"] == Value::Bool(true) && !in_background {
        vm.execute("cont", json!({}))?;
    }
    published
}

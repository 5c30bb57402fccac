//! Consoles other than standard input and output: standard error, a file, a pseudo-terminal, a socket.
//!
//! A capability: `open` plugs each kind in. All other code sees only [`ConsoleEnds`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::ends::{Clients, ConsoleEnds, refused};
use super::input::Input;
use crate::error::Error;
use crate::listener::Listener;
use crate::output_files::OutputFiles;

/// Output only, to minivmm's standard error.
pub(super) fn stderr() -> Result<ConsoleEnds, Error> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(refused("stderr".to_owned()))?;
    Ok(ConsoleEnds::new(Some(stderr), false, None, Input::new(None, false)))
}

/// Output only, into a file that takes no more than `max` bytes.
pub(super) fn file(
    path: &Path,
    max: Option<u64>,
    outputs: &mut OutputFiles,
) -> Result<ConsoleEnds, Error> {
    let file = outputs.append("--console", format!("file:{}", path.display()), path)?;
    Ok(ConsoleEnds::new(Some(file.into()), false, max, Input::new(None, false)))
}

/// A new pseudo-terminal, whose name is printed.
pub(super) fn pty() -> Result<ConsoleEnds, Error> {
    let failed = || refused("pty".to_owned());
    let (master, slave, name) = open_pty().map_err(failed())?;
    // Fails only when standard error is closed.
    let _ = writeln!(io::stderr(), "minivmm: the console is at {name}");
    let input = Input::new(Some(master.try_clone().map_err(failed())?), false);
    let ends = ConsoleEnds::new(Some(master.into()), false, None, input);
    // Otherwise the pseudo-terminal hangs up when a user closes it.
    Ok(ConsoleEnds { _kept_open: Some(slave), ..ends })
}

/// A raw pseudo-terminal: its master, its slave, and the slave's name.
fn open_pty() -> io::Result<(File, File, String)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let slave =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name)?;
    let mut attributes = tcgetattr(&slave)?;
    attributes.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &attributes)?;
    Ok((File::from(master), slave, name))
}

/// A Unix socket, with one client at a time.
pub(super) fn socket(path: &Path) -> Result<ConsoleEnds, Error> {
    let listener = Listener::bind(path).map_err(refused(format!("unix:{}", path.display())))?;
    let ends = ConsoleEnds::new(None, true, None, Input::new(None, false));
    Ok(ConsoleEnds { clients: Some(Box::new(listener)), ..ends })
}

impl Clients for Listener {
    fn accept(&self) -> Option<OwnedFd> {
        self.accept().map(OwnedFd::from)
    }
}

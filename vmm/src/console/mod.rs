//! The serial console's host end.
//!
//! Output: the vCPU puts bytes into a bounded buffer and never waits; the thread `console` moves them to the host.
//! Input: the main loop reads the host when the UART's FIFO has room, and no more than that.

mod escape;
mod input;
mod output;

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

pub(crate) use escape::HELP;
pub(crate) use input::{Input, Typed};
pub(crate) use output::{Output, OutputWriter};

use crate::config::ConsoleConfig;
use crate::error::Error;
use crate::listener::Listener;

/// The console's ends: `output` feeds the UART's transmitter, `input` its receiver.
pub(crate) struct Console {
    /// Where the guest's output goes.
    pub output: Output,
    /// Where the guest's input comes from.
    pub input: Input,
    /// Connections for `--console unix:PATH`.
    pub listener: Option<Listener>,
    /// Kept so that the pseudo-terminal never looks hung up while nobody has it open.
    _pty: Option<File>,
}

impl Console {
    /// Opens the console where the user wants it.
    ///
    /// # Errors
    /// When it cannot be there; the file system is unchanged then.
    pub(crate) fn open(config: &ConsoleConfig) -> Result<Self, Error> {
        let failed = |what: String| move |source: io::Error| Error::Console { what, source };
        match config {
            ConsoleConfig::Stdio => {
                let failed = || failed("stdio".to_owned());
                let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(failed())?;
                let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed())?;
                let escapes = io::stdin().is_terminal();
                Self::new(Some(stdout), false, Input::new(Some(File::from(stdin)), escapes))
            }
            ConsoleConfig::File(path) => {
                let file = open_file(path).map_err(failed(format!("file:{}", path.display())))?;
                Self::new(Some(file.into()), false, Input::new(None, false))
            }
            ConsoleConfig::Pty => {
                let (master, slave, name) = open_pty().map_err(failed("pty".to_owned()))?;
                // Fails only when nobody reads it.
                let _ = writeln!(io::stderr(), "minivmm: the console is at {name}");
                let input = Input::new(Some(master.try_clone().map_err(failed("pty".to_owned()))?), false);
                Ok(Self { _pty: Some(slave), ..Self::new(Some(master.into()), false, input)? })
            }
            ConsoleConfig::Unix(path) => {
                let listener = Listener::bind(path).map_err(failed(format!("unix:{}", path.display())))?;
                Ok(Self { listener: Some(listener), ..Self::new(None, true, Input::new(None, false))? })
            }
            ConsoleConfig::None => {
                let null = File::options().write(true).open("/dev/null").map_err(failed("none".to_owned()))?;
                Self::new(Some(null.into()), false, Input::new(None, false))
            }
        }
    }

    fn new(sink: Option<OwnedFd>, reconnects: bool, input: Input) -> Result<Self, Error> {
        let output = Output::spawn(sink, reconnects).map_err(Error::host("start the console thread"))?;
        Ok(Self { output, input, listener: None, _pty: None })
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    // A fifo without a reader refuses a non-blocking open instead of hanging us; a regular file ignores the flag.
    let file = OpenOptions::new().write(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_block_device() {
        return Err(io::Error::other("it is a block device; the console will not overwrite it"));
    }
    if kind.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}

/// A raw pseudo-terminal: its master, its slave held open, and the slave's name.
fn open_pty() -> io::Result<(File, File, String)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let slave = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name)?;
    let mut attributes = tcgetattr(&slave)?;
    attributes.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &attributes)?;
    Ok((File::from(master), slave, name))
}

//! The console's two directions on the host. They hide which kind of console the user has chosen.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::input::Input;
use super::output::Output;
use crate::error::Error;

/// A source of clients for the console, one at a time. Its descriptor is readable when one waits.
pub(crate) trait Clients: AsRawFd {
    /// Accepts a client. `None`: it has disconnected already.
    fn accept(&self) -> Option<OwnedFd>;
}

/// The console's two directions on the host.
pub(crate) struct ConsoleEnds {
    pub output: Output,
    pub input: Input,
    pub clients: Option<Box<dyn Clients>>,
    /// Held open for as long as the console is used.
    pub _kept_open: Option<File>,
}

impl ConsoleEnds {
    /// minivmm's standard input and output.
    ///
    /// # Errors
    /// When the host refuses.
    pub(super) fn stdio() -> Result<Self, Error> {
        let failed = || refused("stdio".to_owned());
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(failed())?;
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed())?;
        let input = Input::new(Some(File::from(stdin)), io::stdin().is_terminal());
        Ok(Self::new(Some(stdout), false, None, input))
    }

    /// Ends whose output goes to `sink`, or waits for clients, who may come and go if it `reconnects`. No more than `limit`
    /// bytes are written.
    pub(super) fn new(
        sink: Option<OwnedFd>,
        reconnects: bool,
        limit: Option<u64>,
        input: Input,
    ) -> Self {
        let output = Output::new(sink, reconnects, limit);
        Self { output, input, clients: None, _kept_open: None }
    }
}

/// Makes the error for a `--console` that the host refuses.
pub(super) fn refused(value: String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Argument { option: "--console", value, source }
}

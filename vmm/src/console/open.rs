//! Opens the host side of the console as `--console` says: the place where kinds of console are plugged in.
//!
//! The builder comes here last of what the host may refuse, because it can create or empty a file.

use super::backends;
use super::ends::ConsoleEnds;
use super::input::Input;
use crate::config::ConsoleConfig;
use crate::error::Error;

/// Opens both directions.
///
/// # Errors
/// When the host refuses; the file system is unchanged then.
pub(super) fn open(config: &ConsoleConfig) -> Result<ConsoleEnds, Error> {
    match config {
        ConsoleConfig::Stdio => ConsoleEnds::stdio(),
        ConsoleConfig::Stderr => backends::stderr(),
        ConsoleConfig::File { path, max } => backends::file(path, *max),
        ConsoleConfig::Pty => backends::pty(),
        ConsoleConfig::Unix(path) => backends::socket(path),
        ConsoleConfig::None => Ok(ConsoleEnds::new(None, false, None, Input::new(None, false))),
    }
}

//! Opens the host side of the console as `--console` says. All kinds of console are plugged in here.
//!
//! A file is opened here, and emptied when the run begins (`OutputFiles`).

use super::backends;
use super::ends::ConsoleEnds;
use super::input::Input;
use crate::config::ConsoleConfig;
use crate::error::Error;
use crate::output_files::OutputFiles;

/// Opens both directions.
///
/// # Errors
/// When the host refuses; the file system is unchanged then.
pub(super) fn open(
    config: &ConsoleConfig,
    outputs: &mut OutputFiles,
) -> Result<ConsoleEnds, Error> {
    match config {
        ConsoleConfig::Stdio => ConsoleEnds::stdio(),
        ConsoleConfig::Stderr => backends::stderr(),
        ConsoleConfig::File { path, max } => backends::file(path, *max, outputs),
        ConsoleConfig::Pty => backends::pty(),
        ConsoleConfig::Unix(path) => backends::socket(path),
        ConsoleConfig::None => Ok(ConsoleEnds::new(None, false, None, Input::new(None, false))),
    }
}

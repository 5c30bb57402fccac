//! Why `minivmm powercut` cannot do what it is asked for.

use std::io;
use std::path::{Path, PathBuf};

/// Everything but a state that fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum PowercutError {
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: it is no log of writes; make one by --disk IMAGE,log-writes=FILE", .0.display())]
    NoLog(PathBuf),
    #[error("{}: it is not a log of version 1 with 512-byte sectors; make one by --disk IMAGE,log-writes=FILE", .0.display())]
    Version(PathBuf),
    #[error("the command is missing; write -- COMMAND {{}}, or --state and --output")]
    NoCommand,
    #[error(
        "no word of the command has {{}}, which stands for the state's file; write -- COMMAND {{}}"
    )]
    NoPlace,
    #[error("command {command}")]
    Command { command: String, source: io::Error },
    #[error("--state {name}: {reason}; take the name from a report on the same log")]
    State { name: String, reason: String },
    #[error("cannot start a thread; run fewer at once with --jobs")]
    Thread { source: io::Error },
    #[error("cannot keep states in {} (set TMPDIR to a directory with space)", directory.display())]
    Space { directory: PathBuf, source: io::Error },
}

impl PowercutError {
    pub(super) fn file(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { what, path: path.to_owned(), source }
    }

    /// Whether the arguments are at fault.
    pub(super) fn is_usage(&self) -> bool {
        !matches!(self, Self::Space { .. } | Self::Thread { .. })
    }
}

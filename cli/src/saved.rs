//! `minivmm show FILE` and `minivmm check FILE`: what a saved machine has, and whether its file is whole.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vmm::{Incoming, WithCauses};

use crate::arguments::parse_as;
use crate::exit_codes::{EXIT_CLEAN, EXIT_HOST, EXIT_USAGE};
use crate::messages::{print_message, print_text};

/// Print what a saved machine has; `check` also compares all of its memory with the checksums.
#[derive(Debug, Parser)]
#[command(name = "minivmm show", max_term_width = 120)]
struct Arguments {
    /// The file that `minivmm ctl SOCKET save` wrote.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs the command `word` with the arguments behind it.
pub(crate) fn main(word: &str, arguments: Vec<OsString>) -> ExitCode {
    let Arguments { file } = match parse_as(&format!("minivmm {word}"), arguments) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    match Incoming::describe(&file, word == "check") {
        Ok(text) => ExitCode::from(if print_text(&text) { EXIT_CLEAN } else { EXIT_HOST }),
        Err(error) => {
            let line = match &error {
                // Of the file, or of one that it builds on.
                vmm::Error::Incoming { path, source } => {
                    format!("{word} {}: {}", path.display(), WithCauses(&**source))
                }
                error => WithCauses(error).to_string(),
            };
            print_message(&line);
            ExitCode::from(if error.is_usage() { EXIT_USAGE } else { EXIT_HOST })
        }
    }
}

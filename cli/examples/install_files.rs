//! Writes the man pages and the shells' completions into a directory, from the definition of the command line: `make install`
//! runs this. The program itself stays free of what generates them.
//!
//! ```text
//! cargo run -p minivmm --example install_files -- DIRECTORY
//! ```
#![allow(
    dead_code,
    missing_docs,
    clippy::expect_used,
    reason = "a build tool that takes the program's modules for their command line alone"
)]

#[path = "../src/arguments/mod.rs"]
mod arguments;
#[path = "../src/boot_timing.rs"]
mod boot_timing;
#[path = "../src/ctl/mod.rs"]
mod ctl;
#[path = "../src/exit_codes.rs"]
mod exit_codes;
#[path = "../src/messages.rs"]
mod messages;
#[path = "../src/powercut/mod.rs"]
mod powercut;
#[path = "../src/replay/mod.rs"]
mod replay;
#[path = "../src/svg.rs"]
mod svg;
#[path = "../src/trace/mod.rs"]
mod trace;
#[path = "../src/trace_view/mod.rs"]
mod trace_view;

use std::fs::{self, File};
use std::path::PathBuf;

use clap_complete::Shell;

fn main() {
    let directory =
        PathBuf::from(std::env::args_os().nth(1).expect("usage: install_files DIRECTORY"));
    fs::create_dir_all(&directory).expect("the directory can be made");
    let commands = [
        ("minivmm", arguments::command()),
        ("minivmm-ctl", ctl::command()),
        ("minivmm-powercut", powercut::command()),
        ("minivmm-replay", replay::command()),
        ("minivmm-trace-view", trace_view::command()),
    ];
    for (name, command) in commands {
        let command = command.name(name).disable_help_subcommand(true);
        let mut page =
            File::create(directory.join(format!("{name}.1"))).expect("a page can be made");
        clap_mangen::Man::new(command).render(&mut page).expect("a page can be written");
    }
    // The shells complete these as commands of `minivmm`.
    let mut command = arguments::command()
        .subcommand(ctl::command().name("ctl"))
        .subcommand(powercut::command().name("powercut"))
        .subcommand(replay::command().name("replay"))
        .subcommand(trace_view::command().name("trace-view"));
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "minivmm", &directory)
            .expect("a completion can be written");
    }
}

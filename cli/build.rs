//! Names the commit in `minivmm --version`. A source tree without git has none.
#![allow(clippy::print_stdout, missing_docs, reason = "cargo reads what a build script prints")]

use std::process::Command;

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn main() {
    // Changes with each commit, and with each change of branch.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    let commit = git(&["rev-parse", "--short=10", "HEAD"]);
    let commit = commit.map_or_else(String::new, |commit| format!(" (commit {commit})"));
    println!("cargo::rustc-env=MINIVMM_COMMIT={commit}");
}

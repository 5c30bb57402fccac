//! README.md's tables say what the binary does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;

use minivmm_tests::minivmm;

const README: &str = include_str!("../../README.md");

fn help(arguments: &[&str]) -> String {
    String::from_utf8(minivmm(arguments).output().unwrap().stdout).unwrap()
}

/// The first cells of the README's rows that begin with `start`.
fn cells(start: &str) -> BTreeSet<&str> {
    let rows = README.lines().filter_map(|line| line.strip_prefix("| "));
    rows.filter(|row| row.starts_with(start)).map(|row| row.split(" | ").next().unwrap()).collect()
}

#[test]
fn its_options_are_those_of_the_help() {
    let help = help(&["--help"]);
    let lines = help.lines().map(str::trim_start);
    let options =
        lines.filter_map(|line| line.split_once("--").filter(|(short, _)| short.len() < 5));
    let in_help: BTreeSet<_> = options
        .map(|(_, option)| format!("`--{}`", option.replace(['<', '>'], "")))
        .filter(|option| !["`--help`", "`--version`"].contains(&option.as_str()))
        .collect();
    let in_readme: BTreeSet<_> =
        cells("`--").into_iter().map(|cell| cell.replace("\\|", "|")).collect();
    assert!(in_help.len() > 15, "{help}");
    assert_eq!(in_readme, in_help);
}

#[test]
fn its_exit_statuses_are_those_of_the_help() {
    let help = help(&["-h"]);
    let statuses: BTreeSet<_> = ["0", "1", "2", "3", "4", "124"].into();
    let table = README.split("| exit status |").nth(1).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let rows: Vec<_> = rows.map(|row| row.split(' ').nth(1).unwrap()).collect();
    assert_eq!(
        rows.iter().copied().filter(|row| *row != "other").collect::<BTreeSet<_>>(),
        statuses
    );
    let summary = help.split("Exit status: ").nth(1).unwrap();
    for status in statuses {
        assert!(summary.contains(&format!("{status} ")), "{status} is not in {summary}");
    }
}

#[test]
fn its_control_commands_are_those_of_the_help() {
    let help = help(&["ctl", "--help"]);
    let commands = help.split("Commands:").nth(1).unwrap().split("Arguments:").next().unwrap();
    let sentence = README.split("`minivmm ctl SOCKET COMMAND`").nth(1).unwrap();
    let sentence = sentence.split("`minivmm ctl --help`").next().unwrap();
    for named in sentence.split('`').skip(3).step_by(2).filter(|word| !word.starts_with("--")) {
        assert!(commands.contains(named), "{named} is not in {commands}");
    }
}

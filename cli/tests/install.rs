//! What `make install` installs beside the binary comes from the definition of the command line.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::process::Command;

use minivmm_tests::minivmm;
use tempfile::tempdir;

#[test]
fn man_pages_and_completions_have_every_option() {
    let directory = tempdir().unwrap();
    // cargo builds examples with the tests, beside them.
    let test = std::env::current_exe().unwrap();
    let generator = test.ancestors().nth(2).unwrap().join("examples/install_files");
    assert!(Command::new(generator).arg(directory.path()).status().unwrap().success());
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();

    let help = String::from_utf8(minivmm(["--help"]).output().unwrap().stdout).unwrap();
    let options: Vec<_> =
        help.lines().filter_map(|line| line.trim_start().strip_prefix("--")).collect();
    assert!(options.len() > 15, "{help}");
    let (page, bash, zsh, fish) =
        (read("minivmm.1"), read("minivmm.bash"), read("_minivmm"), read("minivmm.fish"));
    for option in options {
        let name = option.split([' ', ',', '[']).next().unwrap();
        assert!(
            page.contains(&format!("\\-\\-{}", name.replace('-', "\\-"))),
            "{name} in the page"
        );
        assert!(bash.contains(&format!("--{name}")), "{name} in bash's completion");
        assert!(zsh.contains(&format!("--{name}")), "{name} in zsh's completion");
        assert!(fish.contains(&format!("-l {name}")), "{name} in fish's completion");
    }
    assert!(read("minivmm-ctl.1").contains("throttle"));
    assert!(read("minivmm-powercut.1").contains("EPOCH:BITS"));
    assert!(read("minivmm-replay.1").contains("no\\-stall") && bash.contains("replay"));
    let page = read("minivmm-trace-view.1");
    assert!(page.contains("\\-\\-requests") && bash.contains("trace-view"), "{page}");

    let completed = format!(
        "source {}/minivmm.bash; COMP_WORDS=(minivmm --cons); COMP_CWORD=1; _minivmm minivmm --cons minivmm; echo $COMPREPLY",
        directory.path().display()
    );
    let completed = Command::new("bash").args(["-c", &completed]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&completed.stdout), "--console\n", "{completed:?}");
}

#[test]
fn the_version_names_the_commit() {
    let output = String::from_utf8(minivmm(["--version"]).output().unwrap().stdout).unwrap();
    let version = output.trim_end().strip_prefix("minivmm ").unwrap();
    let (number, commit) = version.split_once(" (commit ").unwrap_or((version, ")"));
    assert_eq!(number, env!("CARGO_PKG_VERSION"));
    assert!(
        commit.trim_end_matches(')').chars().all(|digit| digit.is_ascii_hexdigit()),
        "{output}"
    );
}

/// systemd replaces `$NAME` only where it is a word of its own; inside a word it has to be `${NAME}` (systemd.service(5)).
#[test]
fn systemd_expands_the_variables_of_the_unit() {
    let unit = include_str!("../../resources/install/minivmm@.service");
    let commands = unit.lines().filter(|line| line.starts_with("Exec"));
    let words: Vec<_> = commands.flat_map(|line| line.split_whitespace()).collect();
    assert!(words.iter().any(|word| word.contains("MAINPID")), "{words:?}");
    for word in words {
        let inside = word.split('$').skip(1).filter(|_| !word.starts_with('$'));
        assert!(inside.into_iter().all(|variable| variable.starts_with('{')), "{word}");
    }
}

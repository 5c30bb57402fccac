//! The clause table names only tests, files and functions that exist.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

/// All Rust files below `directory`.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Whether the file has a function of that name.
fn has_function(file: &Path, name: &str) -> bool {
    let text = fs::read_to_string(file).unwrap();
    text.contains(&format!("fn {name}(")) || text.contains(&format!("fn {name}<"))
}

/// What is wrong with the names of code in one row. Between each pair of backquotes there is one.
fn mistakes(row: &str, root: &Path, files: &[PathBuf]) -> Vec<String> {
    let mut mistakes = Vec::new();
    let mut file = None;
    for (column, cell) in row.split('|').skip(1).enumerate() {
        for word in cell.split('`').skip(1).step_by(2) {
            let known = if let Some((file, test)) = word.split_once("::") {
                let names = [format!("{file}.rs"), format!("{file}/mod.rs")];
                let named = |path: &&PathBuf| names.iter().any(|name| path.ends_with(name));
                files.iter().filter(named).any(|path| has_function(path, test))
            } else if word.ends_with(".rs") {
                file = Some(root.join("src").join(word)).filter(|path| path.is_file());
                file.is_some()
            } else {
                // In the column of code, a function of the file before it.
                column != 1 || file.as_ref().is_some_and(|file| has_function(file, word))
            };
            if !known {
                mistakes.push(format!("`{word}` in:{row}"));
            }
        }
    }
    mistakes
}

#[test]
fn what_the_clause_table_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("tests"), &mut files);
    let table = fs::read_to_string(root.join("docs/virtio-blk.md")).unwrap();
    let rows = || table.lines().filter(|line| line.starts_with('|'));
    let mistakes: Vec<_> = rows().flat_map(|row| mistakes(row, root, &files)).collect();
    assert!(mistakes.is_empty(), "not found:\n{}", mistakes.join("\n"));
    let tests = rows().flat_map(|row| row.split('`')).filter(|word| word.contains("::")).count();
    assert!(tests > 80, "{tests} tests found in the table: has its form changed?");
}

#[test]
fn a_name_that_does_not_exist_is_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [root.join("src/bus.rs")];
    for (row, count) in [
        (
            "| behavior of `anything` | `bus.rs` `insert`, `write` | `bus::overlaps_are_refused_on_every_side` |",
            0,
        ),
        ("| behavior | `bus.rs` `no_such_function` | |", 1),
        ("| behavior | `no_such_file.rs` `insert` | `bus::no_such_test`, `other::overlaps` |", 4),
        ("| behavior | `insert` | |", 1),
    ] {
        assert_eq!(mistakes(row, root, &files).len(), count, "{row}");
    }
}

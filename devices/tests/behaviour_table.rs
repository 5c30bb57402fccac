//! The behaviour table names only tests and files that exist.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::{Path, PathBuf};

/// All Rust files below `directory`.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn what_the_behaviour_table_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("tests"), &mut files);
    let is_test = |file: &str, test: &str| {
        files
            .iter()
            .filter(|path| path.ends_with(format!("{file}.rs")))
            .any(|path| std::fs::read_to_string(path).unwrap().contains(&format!("fn {test}(")))
    };
    let table = std::fs::read_to_string(root.join("docs/virtio-blk.md")).unwrap();
    let mut checked = 0;
    // Between each pair of backquotes there is a word of code.
    for word in table.lines().filter(|line| line.starts_with('|')).flat_map(|line| line.split('`').skip(1).step_by(2)) {
        if let Some((file, test)) = word.split_once("::") {
            assert!(is_test(file, test), "no test `{word}`");
            checked += 1;
        } else if word.ends_with(".rs") {
            assert!(root.join("src").join(word).is_file(), "no file `{word}`");
        }
    }
    assert!(checked > 80, "{checked} tests found in the table: has its form changed?");
}

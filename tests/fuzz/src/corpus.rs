//! The corpora: `tests/fuzz/corpus/CRATE/TARGET.txt`, one input a line in hexadecimal digits, empty lines and lines with `#`
//! being comments. As text, so that a change can be read and one file holds a whole corpus.
//!
//! An input behind a comment is kept for ever: it is a finding. The others are what a minimized run of the fuzzer left, and
//! `resources/fuzz --pack` replaces them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Bytes of a corpus: what is beyond it, the longest inputs, is left to the next run to find again.
const SIZE_MAX: usize = 24 << 10;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("corpus/{name}.txt"))
}

/// Each input of a target with the number of its line.
pub(crate) fn inputs(name: &str) -> Vec<(usize, Vec<u8>)> {
    let path = path(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines =
        (1..).zip(text.lines()).filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
    let inputs: Vec<_> = lines.map(|(number, line)| (number, decode(line))).collect();
    assert!(!inputs.is_empty(), "{} has no input", path.display());
    inputs
}

fn decode(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16);
    digits
        .map(|pair| byte(pair).unwrap_or_else(|_| panic!("no hexadecimal digits: {line}")))
        .collect()
}

fn encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut line, byte| {
        let _ = write!(line, "{byte:02x}");
        line
    })
}

/// Makes a corpus of the files in `directory`, behind the findings that it has.
pub(crate) fn pack(name: &str, directory: &Path) {
    let path = path(name);
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let mut kept = String::new();
    let mut lines = old.lines().peekable();
    while let Some(line) = lines.next() {
        let finding = lines.peek().filter(|next| line.starts_with('#') && !next.is_empty());
        if line.starts_with('#') {
            kept += &format!("{line}\n");
        }
        if finding.is_some_and(|next| !next.starts_with('#')) {
            kept += &format!("{}\n", lines.next().unwrap());
        }
    }
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let inputs: BTreeSet<_> =
        files.map(|file| std::fs::read(file).unwrap()).filter(|bytes| !bytes.is_empty()).collect();
    let mut inputs: Vec<_> = inputs.iter().map(|bytes| encode(bytes)).collect();
    inputs.sort_by_key(|line| (line.len(), line.clone()));
    let mut size = 0;
    inputs.retain(|line| {
        size += line.len() + 1;
        size <= SIZE_MAX
    });
    let separator = if kept.is_empty() { "" } else { "\n" };
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, format!("{kept}{separator}{}\n", inputs.join("\n"))).unwrap();
}

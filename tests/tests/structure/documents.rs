//! The documents name only files and tests that exist.

use std::fs;
use std::path::Path;

use crate::source::{root, texts};

const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "resources/README.md",
    "tests/docs/faults.md",
    "tests/docs/fuzzing.md",
    "tests/docs/ten-line-guests.md",
    "tests/docs/what-a-vm-exit-costs.md",
    "devices/docs/cut-the-power.md",
    "devices/docs/disk-engines.md",
    "devices/docs/follow-one-reset.md",
    "devices/docs/follow-one-write.md",
    "devices/docs/network-storage.md",
    "devices/docs/speed.md",
    "devices/docs/virtio-blk.md",
    "devices/docs/virtio-in-one-page.md",
    "vmm/docs/a-kernel-boots.md",
    "vmm/docs/control.md",
    "vmm/docs/kvm-in-one-page.md",
    "vmm/docs/many-machines.md",
    "vmm/docs/minivmm-in-ci.md",
    "vmm/docs/refused-system-calls.md",
    "vmm/docs/sandbox.md",
    "vmm/docs/step-through-a-boot.md",
    "vmm/docs/stop-reset-save.md",
    "vmm/docs/threat-model.md",
    "vmm/docs/tracing.md",
];

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What stands between backquotes, outside of code blocks.
fn code_words(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// The targets of links, without their anchors and without links to elsewhere.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .map(|target| target.split('#').next().unwrap())
        .filter(|target| !target.is_empty() && !target.contains(':'))
        .collect()
}

/// The paths that `a/{b,c}/d` stands for.
fn expand(word: &str) -> Vec<String> {
    let Some((before, rest)) = word.split_once('{') else { return vec![word.to_owned()] };
    let (choices, after) = rest.split_once('}').unwrap_or_else(|| panic!("no }} in `{word}`"));
    choices.split(',').flat_map(|choice| expand(&format!("{before}{choice}{after}"))).collect()
}

/// Whether a word in backquotes is meant as a path in this repository: it starts at a name of the top level, or it is a source
/// file with a directory, which a chapter of a crate names from the crate's directory or from its `src`.
fn is_path(word: &str) -> bool {
    let plain =
        word.chars().all(|letter| letter.is_ascii_alphanumeric() || "._-/{},".contains(letter));
    let first = word.split('/').next().unwrap();
    // What is built is not there in a fresh checkout.
    plain
        && word.contains('/')
        && !["", "target"].contains(&first)
        && (root().join(first).exists() || word.ends_with(".rs"))
}

/// Whether `path` in `document` exists from the repository's directory, the document's crate, or the crate's `src`.
fn path_exists(document: &Path, path: &str) -> bool {
    let exists = |directory: &Path| directory.join(path).exists();
    let in_crate = |krate: &Path| exists(krate) || exists(&krate.join("src"));
    exists(root()) || document.parent().and_then(Path::parent).is_some_and(in_crate)
}

#[test]
fn paths_and_links_that_the_documents_name_exist() {
    let mut missing = Vec::new();
    for name in DOCUMENTS {
        let document = root().join(name);
        let text = read(&document);
        for word in code_words(&text).into_iter().filter(|word| is_path(word)) {
            missing.extend(
                expand(word)
                    .into_iter()
                    .filter(|path| !path_exists(&document, path))
                    .map(|path| format!("{name}: `{path}`")),
            );
        }
        let directory = document.parent().unwrap();
        missing.extend(
            links(&text)
                .into_iter()
                .filter(|target| !directory.join(target).exists())
                .map(|target| format!("{name}: a link to {target}")),
        );
    }
    assert!(missing.is_empty(), "these do not exist:\n{}", missing.join("\n"));
}

/// What the heading is called in a link, on GitHub and in the book: small letters and digits, and a hyphen for each space.
fn anchor(heading: &str) -> String {
    let kept = |letter: &char| letter.is_alphanumeric() || " -_".contains(*letter);
    heading.trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}

#[test]
fn links_to_headings_lead_to_one() {
    let mut missing = Vec::new();
    for name in DOCUMENTS {
        let document = root().join(name);
        let text = read(&document);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for (path, heading) in targets.filter_map(|target| target.split_once('#')) {
            if path.contains(':') {
                continue;
            }
            let target = if path.is_empty() {
                document.clone()
            } else {
                document.with_file_name("").join(path)
            };
            let page = read(&target);
            let prose = page.split("```").step_by(2).collect::<String>();
            let mut headings = prose.lines().filter(|line| line.starts_with('#'));
            if !headings.any(|line| anchor(line.trim_start_matches('#')) == heading) {
                missing.push(format!("{name}: {path}#{heading}"));
            }
        }
    }
    assert!(missing.is_empty(), "these headings do not exist:\n{}", missing.join("\n"));
}

#[test]
fn the_book_has_each_document_once() {
    let summary = read(&root().join("resources/book/SUMMARY.md"));
    let mut pages = links(&summary);
    pages.sort_unstable();
    let mut documents = [DOCUMENTS, &["CHANGELOG.md"]].concat();
    documents.sort_unstable();
    assert_eq!(pages, documents);
}

/// Tests are functions, functions of a script, or rows of the boot matrix.
fn defines(source: &str, test: &str) -> bool {
    source.contains(&format!("fn {test}("))
        || source.contains(&format!("\ntest_{test}()"))
        || source.lines().any(|line| line.trim_start().starts_with(&format!("{test}:")))
}

#[test]
fn tests_that_the_documents_name_exist() {
    let files = texts(&["rs", ""]);
    let exists = |file: &str, test: &str| {
        files
            .iter()
            .filter(|(path, _)| path.file_stem().is_some_and(|stem| stem == file))
            .any(|(_, text)| defines(text, test))
    };
    let mut missing = Vec::new();
    let mut checked = 0;
    for name in DOCUMENTS {
        let text = read(&root().join(name));
        for word in code_words(&text) {
            let Some((file, test)) = word.split_once("::") else { continue };
            let is_name = |name: &str| {
                let allowed =
                    |letter: char| letter.is_ascii_alphanumeric() || "_-".contains(letter);
                !name.is_empty() && name.chars().all(allowed)
            };
            if is_name(file) && is_name(test) && test.contains('_') {
                checked += 1;
                if !exists(file, test) {
                    missing.push(format!("{name}: `{word}`"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "these tests do not exist:\n{}", missing.join("\n"));
    assert!(checked > 8, "only {checked} tests are named: has the form changed?");
}

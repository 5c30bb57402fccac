//! The language of names, comments, messages and pages: standard terms, and documentation that explains.

use std::path::Path;

use crate::source;

/// Words a documentation block has on average. Blocks that repeat a name pull it down, explanations lift it.
const DOC_WORDS_MIN: f64 = 20.0;

/// Terms that this project does not use, with the term of the field that it uses instead.
const TERMS: &[(&str, &str)] = &[
    ("popped", "descriptor chain token"),
    ("agreement", "negotiated"),
    ("penance", "a name for what it bounds"),
    ("parked", "stopped requests"),
    ("keptrequest", "stopped requests"),
    ("nobody", "a subject in the field's terms"),
    ("somebody", "a subject in the field's terms"),
    ("whoever", "a subject in the field's terms"),
    ("lends", "supports, allows"),
    ("lend", "support, allow"),
    ("let_go", "release"),
    ("surroundings", "context"),
    ("appetite", "wanted"),
    ("waits awake", "busy polling"),
    ("wait awake", "busy polling"),
    ("waiting awake", "busy polling"),
    ("moderation", "interrupt coalescing"),
    ("virtualisation", "virtualization"),
    ("virtualises", "virtualizes"),
    ("virtualise", "virtualize"),
    ("initialise", "initialize"),
    ("licence", "license"),
    ("licences", "licenses"),
    ("behaviours", "behaviors"),
    ("behaviour", "behavior"),
    ("honoured", "honored"),
    ("neighbours", "neighbors"),
    ("recognised", "recognized"),
    ("synchronisation", "synchronization"),
    ("began anew", "resync"),
    ("unasked", "unsolicited"),
    ("such a", "a concrete noun"),
    ("a debt", "descriptor chain token"),
    ("the debt", "descriptor chain token"),
    ("kept requests", "stopped requests"),
    ("the news", "pending events"),
];

/// Whether `text` has `term` as whole words.
fn has(text: &str, term: &str) -> bool {
    let is_word = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric());
    text.match_indices(term).any(|(start, _)| {
        !is_word(text[..start].chars().next_back())
            && !is_word(text[start + term.len()..].chars().next())
    })
}

/// Release notes and this list name old words; the license is as its authors wrote it.
fn is_exempt(path: &Path) -> bool {
    path.ends_with("structure/language.rs")
        || path.ends_with("CHANGELOG.md")
        || path.starts_with("LICENSE-APACHE")
}

#[test]
fn the_old_words_are_gone() {
    let mut found = Vec::new();
    let extensions = ["rs", "md", "sh", "toml", "yml", "yaml", "config", "c", ""];
    for (path, text) in source::texts(&extensions) {
        if is_exempt(&path) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let line = line.to_lowercase();
            for (term, instead) in TERMS.iter().filter(|(term, _)| has(&line, term)) {
                let place = format!("{}:{}", path.display(), number + 1);
                found.push(format!("{place}: \"{term}\": use {instead}"));
            }
        }
    }
    assert!(found.is_empty(), "{} places:\n{}", found.len(), found.join("\n"));
}

/// The number of documentation blocks in `text`, and of words in them.
fn doc_blocks(text: &str) -> (usize, usize) {
    let (mut blocks, mut words, mut inside) = (0, 0, false);
    for line in text.lines().map(str::trim_start) {
        let doc = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        match doc {
            Some(doc) => {
                blocks += usize::from(!inside);
                words += doc.split_whitespace().count();
                inside = true;
            }
            None => inside = false,
        }
    }
    (blocks, words)
}

#[test]
fn documentation_explains() {
    let (mut blocks, mut words) = (0, 0);
    let mut crates = std::collections::BTreeMap::<&str, (usize, usize)>::new();
    for file in source::files() {
        let (more_blocks, more_words) = doc_blocks(&file.text);
        blocks += more_blocks;
        words += more_words;
        let sum = crates.entry(file.krate).or_default();
        *sum = (sum.0 + more_blocks, sum.1 + more_words);
    }
    for (name, (blocks, words)) in crates {
        println!("{name}: {blocks} doc blocks, {:.1} words each", words as f64 / blocks as f64);
    }
    let average = words as f64 / blocks as f64;
    assert!(average >= DOC_WORDS_MIN, "{average:.1} words in a doc block on average");
}

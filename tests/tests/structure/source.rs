//! The production source of the four crates, parsed: what every structure test looks at.
//!
//! Files are found as the compiler finds them, along the `mod` declarations from each crate's root. Modules and items
//! behind `#[cfg(test)]`, or `#[cfg(loom)]` of the models, are left out, so that no test code is counted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned;

/// The repository's root directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a crate of the workspace")
}

/// One production source file.
pub(crate) struct File {
    /// Path from the repository's root, such as `devices/src/block/worker.rs`.
    pub(crate) path: String,
    /// Its crate: `arch`, `devices`, `vmm` or `cli`.
    pub(crate) krate: &'static str,
    /// Its module path inside the crate; empty for the root.
    pub(crate) module: Vec<String>,
    /// The whole text.
    pub(crate) text: String,
    /// The items that are compiled without `cfg(test)`.
    pub(crate) items: Vec<syn::Item>,
    /// Lines (from 1) that only tests compile.
    test_lines: Vec<std::ops::RangeInclusive<usize>>,
}

impl File {
    /// Lines that hold code: no blank lines, no comments, no tests.
    pub(crate) fn code_lines(&self) -> usize {
        let is_code = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
        let is_test = |number: usize| self.test_lines.iter().any(|range| range.contains(&number));
        let lines = self.text.lines().enumerate();
        lines.filter(|(index, line)| is_code(line) && !is_test(index + 1)).count()
    }
}

/// Every production file of the workspace's four crates.
pub(crate) fn files() -> Vec<File> {
    let mut found = Vec::new();
    for (krate, entry) in
        [("arch", "lib.rs"), ("devices", "lib.rs"), ("vmm", "lib.rs"), ("cli", "main.rs")]
    {
        let source = root().join(krate).join("src");
        read(krate, &source.join(entry), &source, Vec::new(), &mut found);
    }
    assert!(found.len() > 80, "only {} source files found", found.len());
    found
}

/// Reads one file and, through its `mod` declarations, those below it. `below` is where its child modules are.
fn read(
    krate: &'static str,
    path: &Path,
    below: &Path,
    module: Vec<String>,
    found: &mut Vec<File>,
) {
    let text = std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let syntax = syn::parse_file(&text)
        .unwrap_or_else(|error| panic!("cannot parse {}: {error}", path.display()));
    let (tests, items): (Vec<_>, Vec<_>) = syntax.items.into_iter().partition(is_test_only);
    let test_lines =
        tests.iter().map(|item| item.span().start().line..=item.span().end().line).collect();
    for item in &items {
        if let syn::Item::Mod(child) = item
            && child.content.is_none()
        {
            let name = child.ident.to_string();
            let flat = below.join(format!("{name}.rs"));
            let path = if flat.is_file() { flat } else { below.join(&name).join("mod.rs") };
            let module = module.iter().cloned().chain([name.clone()]).collect();
            read(krate, &path, &below.join(&name), module, found);
        }
    }
    let path = path.strip_prefix(root()).expect("below the root").display().to_string();
    found.push(File { path, krate, module, text, items, test_lines });
}

fn is_test_only(item: &syn::Item) -> bool {
    let attributes = match item {
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Const(item) => &item.attrs,
        _ => return false,
    };
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|condition| condition == "test" || condition == "loom")
    })
}

/// Every file of the repository with one of these extensions that git tracks or would track.
pub(crate) fn texts(extensions: &[&str]) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root().to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).expect("a directory can be read") {
            let path = entry.expect("a directory can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && name != ".git" {
                    directories.push(path);
                }
                continue;
            }
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if extensions.contains(&extension.as_str())
                && let Ok(text) = std::fs::read_to_string(&path)
            {
                found.insert(path.strip_prefix(root()).expect("below the root").into(), text);
            }
        }
    }
    found
}

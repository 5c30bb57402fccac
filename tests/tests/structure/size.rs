//! The budget: how many lines of code the core and each capability have, and how long a file and a function may be.

use std::collections::BTreeMap;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::{capability, source};

/// Code lines of the core: what a reader has to know to follow the two walks. The limit only goes down. 8,500 was the
/// aim.
const CORE_MAX: usize = 7_973;
/// Code lines of one capability.
const CAPABILITY_MAX: usize = 1_200;
/// Lines of a file, comments and tests included.
const FILE_MAX: usize = 500;
/// Lines of a function: what fits on a screen.
const FUNCTION_MAX: usize = 60;

/// Longer functions, each with the reason why it is not cut.
const LONG_FUNCTIONS: &[(&str, &str)] = &[(
    "vmm/src/builder.rs::build",
    "the recipe in numbered steps, which is read from top to bottom",
)];

#[test]
fn the_core_and_each_capability_keep_their_budget() {
    let mut lines: BTreeMap<&str, usize> = BTreeMap::new();
    for file in source::files() {
        let part = capability(&file.path).unwrap_or("core");
        *lines.entry(part).or_default() += file.code_lines();
        if part == "core" {
            println!("{:6} code lines of the core: {}", file.code_lines(), file.path);
        }
    }
    for (part, count) in &lines {
        println!("{count:6} code lines: {part}");
    }
    for (part, count) in lines {
        let max = if part == "core" { CORE_MAX } else { CAPABILITY_MAX };
        assert!(count <= max, "{part} has {count} code lines, more than {max}");
    }
}

#[test]
fn no_source_file_is_long() {
    let texts = source::texts(&["rs"]);
    let long: Vec<_> = texts
        .iter()
        .map(|(path, text)| (text.lines().count(), path))
        .filter(|(lines, _)| *lines > FILE_MAX)
        .collect();
    assert!(long.is_empty(), "files over {FILE_MAX} lines: {long:?}");
}

#[test]
fn no_function_is_long_without_a_reason() {
    struct Functions(Vec<(String, usize)>);
    impl<'ast> Visit<'ast> for Functions {
        fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
            self.measure(&item.sig, &item.block);
            visit::visit_item_fn(self, item);
        }

        fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
            self.measure(&item.sig, &item.block);
            visit::visit_impl_item_fn(self, item);
        }
    }
    impl Functions {
        fn measure(&mut self, signature: &syn::Signature, block: &syn::Block) {
            let lines = block.span().end().line - signature.span().start().line + 1;
            self.0.push((signature.ident.to_string(), lines));
        }
    }
    let mut long = Vec::new();
    for file in source::files() {
        let mut functions = Functions(Vec::new());
        file.items.iter().for_each(|item| functions.visit_item(item));
        for (name, lines) in functions.0 {
            let name = format!("{}::{name}", file.path);
            if lines > FUNCTION_MAX && !LONG_FUNCTIONS.iter().any(|(allowed, _)| *allowed == name) {
                long.push(format!("{name}: {lines} lines"));
            }
        }
    }
    assert!(long.is_empty(), "functions over {FUNCTION_MAX} lines:\n{}", long.join("\n"));
}

//! Which file uses which: resolves `use` declarations and qualified paths to the file that defines the item.
//!
//! A re-export (`pub use child::Item`) is not a dependency of the parent on the child. A path that goes through one
//! leads to the child.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use crate::source::File;

/// For each file, the files that it uses, by path.
pub(crate) type Imports = BTreeMap<String, BTreeSet<String>>;

struct Module<'a> {
    file: &'a File,
    /// Names that this module re-exports, with the path they stand for. `*` stands for all of that path.
    exports: Vec<(String, Vec<String>)>,
}

type Modules<'a> = BTreeMap<Vec<String>, Module<'a>>;

/// Resolves every import of `files`. Crates of the registry are left out.
pub(crate) fn resolve(files: &[File]) -> Imports {
    let mut modules: Modules<'_> = BTreeMap::new();
    for file in files {
        let path = absolute(file);
        let mut exports = Vec::new();
        for item in &file.items {
            if let syn::Item::Use(item) = item
                && !matches!(item.vis, syn::Visibility::Inherited)
            {
                leaves(&item.tree, &mut Vec::new(), &mut |path, name| {
                    exports.push((name, path));
                });
            }
        }
        modules.insert(path, Module { file, exports });
    }
    let mut imports = Imports::new();
    for file in files {
        let mut paths = Paths::default();
        file.items.iter().for_each(|item| paths.visit_item(item));
        let used = imports.entry(file.path.clone()).or_default();
        for path in paths.found {
            if let Some(target) = target(&modules, &absolute(file), &path, 0)
                && target != file.path
            {
                used.insert(target);
            }
        }
    }
    imports
}

/// A file's module path with its crate's name first.
fn absolute(file: &File) -> Vec<String> {
    std::iter::once(file.krate.to_owned()).chain(file.module.iter().cloned()).collect()
}

/// The file that defines what `path`, written in module `from`, names.
fn target(modules: &Modules<'_>, from: &[String], path: &[String], depth: usize) -> Option<String> {
    if depth > 8 {
        return None;
    }
    let mut at: Vec<String> = from.to_vec();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" => (at, rest) = (vec![from[0].clone()], &path[1..]),
        "self" => rest = &path[1..],
        "super" => {
            while rest.first().is_some_and(|word| word == "super") {
                at.pop();
                rest = &rest[1..];
            }
        }
        name if modules.contains_key(&[name.to_owned()][..]) => {
            (at, rest) = (vec![name.to_owned()], &path[1..]);
        }
        // A child module, or an extern crate.
        name => {
            let child: Vec<String> = at.iter().cloned().chain([name.to_owned()]).collect();
            modules.get(&child)?;
        }
    }
    while let Some(name) = rest.first() {
        let child: Vec<String> = at.iter().cloned().chain([name.clone()]).collect();
        if !modules.contains_key(&child) {
            break;
        }
        (at, rest) = (child, &rest[1..]);
    }
    let module = modules.get(&at)?;
    if let Some(item) = rest.first() {
        for (name, exported) in &module.exports {
            if name == item {
                return target(modules, &at, exported, depth + 1);
            }
        }
        let declares =
            module.file.items.iter().any(|declared| name_of(declared) == Some(item.clone()));
        if !declares && item != "*" {
            for (_, exported) in module.exports.iter().filter(|(name, _)| name == "*") {
                let through: Vec<String> =
                    exported.iter().filter(|word| *word != "*").chain([item]).cloned().collect();
                if let Some(found) = target(modules, &at, &through, depth + 1) {
                    return Some(found);
                }
            }
        }
    }
    Some(module.file.path.clone())
}

fn name_of(item: &syn::Item) -> Option<String> {
    Some(match item {
        syn::Item::Const(item) => item.ident.to_string(),
        syn::Item::Enum(item) => item.ident.to_string(),
        syn::Item::Fn(item) => item.sig.ident.to_string(),
        syn::Item::Static(item) => item.ident.to_string(),
        syn::Item::Struct(item) => item.ident.to_string(),
        syn::Item::Trait(item) => item.ident.to_string(),
        syn::Item::Type(item) => item.ident.to_string(),
        _ => return None,
    })
}

/// Calls `found` with each path of a use tree, and the name that it gets.
fn leaves(
    tree: &syn::UseTree,
    prefix: &mut Vec<String>,
    found: &mut impl FnMut(Vec<String>, String),
) {
    let mut leaf = |name: String, renamed: String| {
        let mut path = prefix.clone();
        if name != "self" {
            path.push(name);
        }
        found(path, renamed);
    };
    match tree {
        syn::UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            leaves(&path.tree, prefix, found);
            prefix.pop();
        }
        syn::UseTree::Name(name) => leaf(name.ident.to_string(), name.ident.to_string()),
        syn::UseTree::Rename(name) => leaf(name.ident.to_string(), name.rename.to_string()),
        syn::UseTree::Glob(_) => leaf("*".to_owned(), "*".to_owned()),
        syn::UseTree::Group(group) => {
            group.items.iter().for_each(|tree| leaves(tree, prefix, found));
        }
    }
}

/// Collects what a file uses: its private `use` declarations and every qualified path in its code.
#[derive(Default)]
struct Paths {
    found: Vec<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if matches!(item.vis, syn::Visibility::Inherited) {
            leaves(&item.tree, &mut Vec::new(), &mut |path, _| self.found.push(path));
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<String> =
            path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        // Without `crate` or `super` the path begins with a child module, or with what a `use` has brought in.
        if words.len() > 1 {
            self.found.push(words);
        }
        visit::visit_path(self, path);
    }

    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}
}

/// Groups of files that use each other, directly or in a circle, inside one crate.
pub(crate) fn circles(imports: &Imports) -> Vec<Vec<String>> {
    let reaches = |from: &String| {
        let mut seen = BTreeSet::new();
        let mut left = vec![from.clone()];
        while let Some(file) = left.pop() {
            for next in imports.get(&file).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    left.push(next.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&String, BTreeSet<String>> =
        imports.keys().map(|file| (file, reaches(file))).collect();
    let mut groups: BTreeSet<Vec<String>> = BTreeSet::new();
    for (file, seen) in &reached {
        if seen.contains(*file) {
            let mutual = seen
                .iter()
                .filter(|other| reached.get(other).is_some_and(|theirs| theirs.contains(*file)));
            groups.insert(mutual.cloned().collect());
        }
    }
    groups.into_iter().collect()
}

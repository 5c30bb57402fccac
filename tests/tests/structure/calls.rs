//! Which methods a file defines and calls, which functions it names, and which addresses it writes as numbers. Names are
//! compared as they are written: types are not resolved.

use std::collections::BTreeSet;

use syn::visit::{self, Visit};

use crate::source::File;

/// The names of the methods that a file defines, its traits' methods included.
pub(crate) fn methods(file: &File) -> BTreeSet<String> {
    let mut methods = Methods::default();
    file.items.iter().for_each(|item| methods.visit_item(item));
    methods.0
}

/// The names of the methods that a file adds to types of other files, outside of traits.
pub(crate) fn added_methods(file: &File) -> BTreeSet<String> {
    let own: BTreeSet<_> = file.items.iter().filter_map(type_name).collect();
    let mut methods = Methods::default();
    for item in &file.items {
        if let syn::Item::Impl(item) = item
            && item.trait_.is_none()
            && let syn::Type::Path(of) = &*item.self_ty
            && let Some(last) = of.path.segments.last()
            && !own.contains(&last.ident.to_string())
        {
            methods.visit_item_impl(item);
        }
    }
    methods.0
}

/// The names of the methods that a file calls: `x.name(...)`.
pub(crate) fn called(file: &File) -> BTreeSet<String> {
    struct Calls(BTreeSet<String>);
    impl<'ast> Visit<'ast> for Calls {
        fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
            self.0.insert(call.method.to_string());
            visit::visit_expr_method_call(self, call);
        }
    }
    let mut calls = Calls(BTreeSet::new());
    file.items.iter().for_each(|item| calls.visit_item(item));
    calls.0
}

/// The paths that a file names in expressions, such as calls of functions, with at most two segments: `layout::e820` and `e820`.
pub(crate) fn named(file: &File) -> BTreeSet<String> {
    struct Paths(BTreeSet<String>);
    impl<'ast> Visit<'ast> for Paths {
        fn visit_expr_path(&mut self, path: &'ast syn::ExprPath) {
            let names: Vec<_> =
                path.path.segments.iter().map(|part| part.ident.to_string()).collect();
            self.0.extend(names.last().cloned());
            self.0
                .extend(names.last_chunk::<2>().map(|[module, name]| format!("{module}::{name}")));
            visit::visit_expr_path(self, path);
        }
    }
    let mut paths = Paths(BTreeSet::new());
    file.items.iter().for_each(|item| paths.visit_item(item));
    paths.0
}

/// The guest-physical addresses other than 0 that a file writes as numbers: `GuestAddress(0x1000)`.
pub(crate) fn literal_addresses(file: &File) -> Vec<String> {
    struct Addresses(Vec<String>);
    impl<'ast> Visit<'ast> for Addresses {
        fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
            if let syn::Expr::Path(path) = &*call.func
                && path.path.segments.last().is_some_and(|last| last.ident == "GuestAddress")
                && let Some(syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Int(number), .. })) =
                    call.args.first()
                && number.base10_digits() != "0"
            {
                self.0.push(number.to_string());
            }
            visit::visit_expr_call(self, call);
        }
    }
    let mut addresses = Addresses(Vec::new());
    file.items.iter().for_each(|item| addresses.visit_item(item));
    addresses.0
}

#[derive(Default)]
struct Methods(BTreeSet<String>);

impl<'ast> Visit<'ast> for Methods {
    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.0.insert(item.sig.ident.to_string());
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.0.insert(item.sig.ident.to_string());
    }
}

fn type_name(item: &syn::Item) -> Option<String> {
    Some(match item {
        syn::Item::Enum(item) => item.ident.to_string(),
        syn::Item::Struct(item) => item.ident.to_string(),
        syn::Item::Trait(item) => item.ident.to_string(),
        syn::Item::Type(item) => item.ident.to_string(),
        _ => return None,
    })
}

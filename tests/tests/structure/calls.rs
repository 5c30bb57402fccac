//! Which methods a file defines and calls, by their names: types are not resolved.

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

//! The page about KVM lists the ioctls that the sources use.

use std::collections::BTreeSet;
use std::fs;

use syn::visit::{self, Visit};

use crate::source::{self, root};

/// Methods of kvm-ioctls and the macros of ioctls that it lacks, with the names that api.rst has for them. A method whose name says
/// the ioctl is not here: `get_regs` is KVM_GET_REGS.
const NAMES: &[(&str, &str)] = &[
    ("check_extension_int", "KVM_CHECK_EXTENSION"),
    ("check_extension_raw", "KVM_CHECK_EXTENSION"),
    ("create_irq_chip", "KVM_CREATE_IRQCHIP"),
    ("get_debug_regs", "KVM_GET_DEBUGREGS"),
    ("get_max_vcpus", "KVM_CHECK_EXTENSION"),
    ("nested_state", "KVM_GET_NESTED_STATE"),
    ("register_ioevent", "KVM_IOEVENTFD"),
    ("set_debug_regs", "KVM_SET_DEBUGREGS"),
    ("set_identity_map_address", "KVM_SET_IDENTITY_MAP_ADDR"),
    ("set_irq_line", "KVM_IRQ_LINE"),
    ("set_tss_address", "KVM_SET_TSS_ADDR"),
    ("translate_gva", "KVM_TRANSLATE"),
];

/// What descriptors of KVM are called in the sources.
const DESCRIPTORS: &[&str] = &["fd", "kvm", "kvm_fd", "vm", "vcpu"];

/// Methods of these values that make no ioctl.
const OTHERS: &[&str] = &[
    "as_raw_fd",
    "clone",
    "exits",
    "get_kvm_run",
    "has_left",
    "id",
    "is_some",
    "reset",
    "revents",
    "set_kvm_immediate_exit",
    "set_boot_registers",
    "try_clone",
    "with_paused",
];

#[derive(Default)]
struct Ioctls(BTreeSet<String>);

impl<'ast> Visit<'ast> for Ioctls {
    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        let receiver = match &*call.receiver {
            syn::Expr::Path(path) => path.path.get_ident().map(ToString::to_string),
            syn::Expr::Field(field) => match &field.member {
                syn::Member::Named(name) => Some(name.to_string()),
                syn::Member::Unnamed(_) => None,
            },
            _ => None,
        };
        let method = call.method.to_string();
        if receiver.is_some_and(|name| DESCRIPTORS.contains(&name.as_str()))
            && !OTHERS.contains(&method.as_str())
        {
            let named = NAMES.iter().find(|(name, _)| *name == method);
            self.0.insert(named.map_or_else(
                || format!("KVM_{}", method.to_uppercase()),
                |(_, ioctl)| (*ioctl).to_owned(),
            ));
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        if call.path.get_ident().is_some_and(|name| name.to_string().starts_with("ioctl_io")) {
            let name = call.tokens.clone().into_iter().next();
            self.0.extend(name.map(|name| name.to_string()));
        }
    }
}

#[test]
fn the_page_about_kvm_lists_the_ioctls_that_the_sources_use() {
    let mut used = Ioctls::default();
    for file in source::files().iter().filter(|file| file.krate == "vmm") {
        file.items.iter().for_each(|item| used.visit_item(item));
    }
    let page = fs::read_to_string(root().join("vmm/docs/kvm-in-one-page.md")).unwrap();
    let first_cells = page.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
    let listed: BTreeSet<String> = first_cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    let only = |one: &BTreeSet<String>, other| one.difference(other).cloned().collect::<Vec<_>>();
    assert_eq!(only(&used.0, &listed), [""; 0], "used, but not on the page");
    assert_eq!(only(&listed, &used.0), [""; 0], "on the page, but not used");
}

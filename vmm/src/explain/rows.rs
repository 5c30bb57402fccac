//! The two forms of a row below a heading.

use std::fmt::Display;

pub(super) fn item(name: &str, value: impl Display) -> String {
    format!("  {name:<22} {value}")
}

/// `length` bytes of guest-physical addresses.
pub(super) fn range(start: u64, length: u64, what: impl Display) -> String {
    format!("  {start:#014x}-{:#014x}  {what}", start.saturating_add(length).saturating_sub(1))
}

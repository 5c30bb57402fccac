//! The form of most rows below a heading.

use std::fmt::Display;

pub(super) fn item(name: &str, value: impl Display) -> String {
    format!("  {name:<22} {value}")
}

//! The arguments of commands: how the tables describe them, and the check of a request's arguments against that description.

use serde_json::{Map, Value};

use super::protocol::Failure;

pub(super) struct Argument {
    pub(super) name: &'static str,
    pub(super) kind: ArgumentKind,
    pub(super) required: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArgumentKind {
    Text,
    /// Not negative.
    Integer,
    Boolean,
    Integers,
    /// Of any type; the command checks it.
    Any,
}

impl ArgumentKind {
    fn matches(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Text, value) => value.is_string(),
            (Self::Integer, value) => value.is_u64(),
            (Self::Boolean, value) => value.is_boolean(),
            (Self::Integers, Value::Array(items)) => items.iter().all(Value::is_u64),
            (Self::Integers, _) => false,
            (Self::Any, _) => true,
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Text => "string",
            Self::Integer => "integer",
            Self::Boolean => "boolean",
            Self::Integers => "array of non-negative integers",
            Self::Any => "value",
        }
    }
}

pub(super) const fn required(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, required: true }
}

pub(super) const fn optional(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, required: false }
}

/// The arguments of a request, which were checked against the command's table.
pub(super) struct Arguments<'a>(&'a Map<String, Value>);

impl<'a> Arguments<'a> {
    /// Checks the arguments `given` against those that the command knows.
    ///
    /// # Errors
    /// An argument is unknown, missing, or of another type. The message has QEMU's words.
    pub(super) fn check(
        known: &[Argument],
        given: &'a Map<String, Value>,
    ) -> Result<Self, Failure> {
        let fail = |description: String| Err(Failure::generic(description));
        let is_known = |name: &String| known.iter().any(|argument| argument.name == name);
        if let Some(name) = given.keys().find(|name| !is_known(name)) {
            return fail(format!("Parameter '{name}' is unexpected"));
        }
        for Argument { name, kind, required } in known {
            match given.get(*name) {
                None if *required => return fail(format!("Parameter '{name}' is missing")),
                None => {}
                Some(value) if kind.matches(value) => {}
                Some(value) if *kind == ArgumentKind::Integer && value.is_i64() => {
                    return fail(format!("Parameter '{name}' expects a non-negative integer"));
                }
                Some(_) => {
                    let expected = kind.expected();
                    return fail(format!(
                        "Invalid parameter type for '{name}', expected: {expected}"
                    ));
                }
            }
        }
        Ok(Self(given))
    }

    pub(super) fn any(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name)
    }

    pub(super) fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name)?.as_str()
    }

    pub(super) fn integer(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }

    pub(super) fn boolean(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    pub(super) fn integers(&self, name: &str) -> Option<Vec<u64>> {
        self.0.get(name)?.as_array().map(|items| items.iter().filter_map(Value::as_u64).collect())
    }
}

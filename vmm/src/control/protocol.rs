//! QMP's messages (QEMU, docs/interop/qmp-spec.rst): the greeting, requests and answers.

use std::error::Error;

use serde_json::{Map, Value, json};

use crate::error::WithCauses;

/// The version of QEMU whose schema the commands follow. Clients decide by it which commands they send.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 9, "minor": 0, "micro": 0 },
        "package": concat!("minivmm-", env!("CARGO_PKG_VERSION")),
    })
}

/// The first message to a client.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// Why a command failed: QMP's error class, and a description for people. Clients may rely on the class alone;
/// descriptions change between versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    class: &'static str,
    description: String,
}

impl Failure {
    /// Any reason that has no class of its own.
    pub(super) fn generic(description: impl Into<String>) -> Self {
        Self { class: "GenericError", description: description.into() }
    }

    /// An error of the machine, with its causes.
    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        Self::generic(WithCauses(error).to_string())
    }

    pub(super) fn command_not_found(description: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", description: description.into() }
    }

    pub(super) fn device_not_found(device: &str) -> Self {
        Self { class: "DeviceNotFound", description: format!("Device '{device}' not found") }
    }
}

/// The answer to a command that did not fail: at once, or when the job that it began is done. Until then the client's next
/// commands wait, but not those of other clients.
#[derive(Debug)]
pub(super) enum Answer {
    Now(Value),
    /// Is answered when the machine reports that this job is done.
    WhenDone(u64),
}

impl Answer {
    /// For a command without a result.
    pub(super) fn empty() -> Self {
        Self::Now(json!({}))
    }
}

#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    /// The answer has the same `id`.
    pub(super) id: Option<Value>,
}

impl Request {
    /// Parses a request. The error has the request's `id`, if it could be read, for the answer.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, (Option<Value>, Failure)> {
        let value = super::json::parse(bytes)
            .map_err(|error| (None, Failure::generic(format!("JSON parse error, {error}"))))?;
        let Value::Object(mut members) = value else {
            return Err((None, Failure::generic("QMP input must be a JSON object")));
        };
        let id = members.remove("id");
        let fail = |id, description: String| Err((id, Failure::generic(description)));
        let command = match members.remove("execute") {
            Some(Value::String(command)) => command,
            Some(_) => return fail(id, "QMP input member 'execute' must be a string".to_owned()),
            None if members.keys().all(|member| member == "arguments") => {
                return fail(id, "QMP input lacks member 'execute'".to_owned());
            }
            // For example `exec-oob`. The error below names this member, which helps more than that `execute` is missing.
            None => String::new(),
        };
        let arguments = match members.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                return fail(id, "QMP input member 'arguments' must be an object".to_owned());
            }
            None => Map::new(),
        };
        match members.keys().next() {
            Some(unknown) => fail(id, format!("QMP input member '{unknown}' is unexpected")),
            None => Ok(Self { command, arguments, id }),
        }
    }
}

/// The answer to the request with this `id`.
pub(super) fn answer(id: Option<Value>, result: Result<Value, Failure>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(Failure { class, description }) => {
            json!({ "error": { "class": class, "desc": description } })
        }
    };
    if let (Some(id), Value::Object(members)) = (id, &mut answer) {
        members.insert("id".to_owned(), id);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Request, Value> {
        Request::parse(text.as_bytes()).map_err(|(id, failure)| answer(id, Err(failure)))
    }

    #[test]
    fn requests() {
        let request =
            parse(r#"{"execute": "stop", "id": {"a": [1, null]}, "arguments": {"x": 1}}"#).unwrap();
        assert_eq!((request.command.as_str(), request.id), ("stop", Some(json!({"a": [1, null]}))));
        assert_eq!(request.arguments["x"], 1);
        for (bad, says) in [
            ("{]", "JSON parse error"),
            ("{\"execute\": \"a\" \"b\"}", "JSON parse error"),
            ("{\"execute\": \"\\ud800\"}", "JSON parse error"),
            ("{\"execute\": \"\u{0}\"}", "JSON parse error"),
            ("[]", "must be a JSON object"),
            ("{}", "lacks member 'execute'"),
            (r#"{"execute": 1}"#, "'execute' must be a string"),
            (r#"{"execute": "a", "arguments": []}"#, "'arguments' must be an object"),
            (r#"{"execute": "a", "control": {}}"#, "'control' is unexpected"),
            (r#"{"exec-oob": "a", "arguments": {}}"#, "'exec-oob' is unexpected"),
            (r#"{"execute": "a", "execute": "b"}"#, "duplicate key"),
            (&format!("{}{}", "[".repeat(4000), "]".repeat(4000)), "JSON parse error"),
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error["error"]["class"], "GenericError");
            assert!(error["error"]["desc"].as_str().unwrap().contains(says), "{bad}: {error}");
        }
    }

    #[test]
    fn answers_carry_the_id_that_was_sent() {
        assert_eq!(answer(None, Ok(json!({}))), json!({"return": {}}));
        assert_eq!(answer(Some(Value::Null), Ok(json!(1))), json!({"return": 1, "id": null}));
        let failed = parse(r#"{"execute": 1, "id": 7}"#).unwrap_err();
        assert_eq!(failed["id"], 7);
    }
}

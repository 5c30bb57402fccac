//! QMP's messages (QEMU, docs/interop/qmp-spec.rst): the greeting, requests, answers, events.

use std::time::{SystemTime, UNIX_EPOCH};

use devices::block::{ErrorAction, Kind};
use serde_json::{Map, Value, json};

/// The version of QEMU whose schema the commands follow: what clients decide by.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 9, "minor": 0, "micro": 0 },
        "package": concat!("minivmm-", env!("CARGO_PKG_VERSION")),
    })
}

/// What a client hears first.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// Why a command failed. The classes are the only part that clients may rely on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    class: &'static str,
    description: String,
}

impl Failure {
    /// Any reason that has no class of its own.
    pub(super) fn generic(description: impl Into<String>) -> Self {
        Self { class: "GenericError", description: description.into() }
    }

    /// No such command, or not now.
    pub(super) fn command_not_found(description: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", description: description.into() }
    }

    /// No such disk.
    pub(super) fn device_not_found(device: &str) -> Self {
        Self { class: "DeviceNotFound", description: format!("Device '{device}' not found") }
    }
}

/// A command, as a client sent it.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    /// The command's name.
    pub(super) command: String,
    /// Its arguments.
    pub(super) arguments: Map<String, Value>,
    /// Comes back in the answer.
    pub(super) id: Option<Value>,
}

impl Request {
    /// Makes a request of a JSON value; or gives the `id` that the failure is to be answered with.
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
            // Such as `exec-oob`: the unexpected member says more than the missing one.
            None => String::new(),
        };
        let arguments = match members.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return fail(id, "QMP input member 'arguments' must be an object".to_owned()),
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
        Err(Failure { class, description }) => json!({ "error": { "class": class, "desc": description } }),
    };
    if let (Some(id), Value::Object(members)) = (id, &mut answer) {
        members.insert("id".to_owned(), id);
    }
    answer
}

/// Who is behind a shutdown or reset (QEMU's ShutdownCause).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    guest: bool,
    reason: &'static str,
}

impl Source {
    pub(crate) const GUEST_SHUTDOWN: Self = Self { guest: true, reason: "guest-shutdown" };
    pub(crate) const GUEST_RESET: Self = Self { guest: true, reason: "guest-reset" };
    pub(crate) const GUEST_PANIC: Self = Self { guest: true, reason: "guest-panic" };
    pub(crate) const HOST_ERROR: Self = Self { guest: false, reason: "host-error" };
    pub(crate) const QMP_QUIT: Self = Self { guest: false, reason: "host-qmp-quit" };
    pub(crate) const QMP_RESET: Self = Self { guest: false, reason: "host-qmp-system-reset" };
    pub(crate) const SIGNAL: Self = Self { guest: false, reason: "host-signal" };
    pub(crate) const USER: Self = Self { guest: false, reason: "host-ui" };
    /// Every reason, for the schema.
    pub(super) const REASONS: [&str; 8] = [
        "guest-shutdown",
        "guest-reset",
        "guest-panic",
        "host-error",
        "host-qmp-quit",
        "host-qmp-system-reset",
        "host-signal",
        "host-ui",
    ];
}

/// What clients are told unasked.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The machine stopped.
    Stop,
    /// It runs again.
    Resume,
    /// The power button was pressed.
    Powerdown,
    /// The machine is about to end.
    Shutdown(Source),
    /// The machine was reset. When the guest did it, that ends it.
    Reset(Source),
    /// The guest's kernel panicked; that ends the machine.
    GuestPanicked,
    /// The guest's kernel panicked; its crash kernel takes over.
    GuestCrashloaded,
    /// The host failed a request of a disk.
    BlockIoError {
        /// The disk's QMP name.
        device: String,
        /// What was asked for.
        operation: Kind,
        /// What the error policy made of it.
        action: ErrorAction,
        /// The host is out of space.
        nospace: bool,
        /// The host's words.
        reason: String,
    },
    /// The guest changed something past the offset that a client set.
    BlockWriteThreshold {
        /// The disk's QMP name.
        device: String,
        /// How far past it, in bytes.
        exceeded: u64,
        /// The offset.
        threshold: u64,
    },
}

impl Event {
    /// The message, with the present time.
    pub(crate) fn message(&self) -> Value {
        let (name, data) = self.parts();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        match data {
            Value::Null => json!({ "event": name, "timestamp": timestamp }),
            data => json!({ "event": name, "data": data, "timestamp": timestamp }),
        }
    }

    fn parts(&self) -> (&'static str, Value) {
        let source = |Source { guest, reason }: &Source| json!({ "guest": guest, "reason": reason });
        match self {
            Self::Stop => ("STOP", Value::Null),
            Self::Resume => ("RESUME", Value::Null),
            Self::Powerdown => ("POWERDOWN", Value::Null),
            Self::Shutdown(cause) => ("SHUTDOWN", source(cause)),
            Self::Reset(cause) => ("RESET", source(cause)),
            Self::GuestPanicked => ("GUEST_PANICKED", json!({ "action": "poweroff" })),
            Self::GuestCrashloaded => ("GUEST_CRASHLOADED", json!({ "action": "run" })),
            Self::BlockIoError { device, operation, action, nospace, reason } => (
                "BLOCK_IO_ERROR",
                json!({
                    "device": device,
                    "node-name": device,
                    // All that is no read may change the disk, and is under the policy for writes.
                    "operation": if *operation == Kind::Read { "read" } else { "write" },
                    "action": match action {
                        ErrorAction::Report => "report",
                        ErrorAction::Ignore => "ignore",
                        ErrorAction::Stop => "stop",
                    },
                    "nospace": nospace,
                    "reason": reason,
                }),
            ),
            Self::BlockWriteThreshold { device, exceeded, threshold } => (
                "BLOCK_WRITE_THRESHOLD",
                json!({ "node-name": device, "amount-exceeded": exceeded, "write-threshold": threshold }),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Request, Value> {
        Request::parse(text.as_bytes()).map_err(|(id, failure)| answer(id, Err(failure)))
    }

    #[test]
    fn requests() {
        let request = parse(r#"{"execute": "stop", "id": {"a": [1, null]}, "arguments": {"x": 1}}"#).unwrap();
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

    #[test]
    fn events_have_a_timestamp() {
        let event = Event::Shutdown(Source::QMP_QUIT).message();
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        assert_eq!(Event::Stop.message().get("data"), None);
    }
}

//! The machine's events as QMP messages, with the names and members of QEMU's schema (qapi/run-state.json and
//! qapi/block-core.json). `event_limit` decides which of them are sent, and `schema` describes their types to clients.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use devices::block::{BlockEvent, ErrorAction, Kind};
use devices::disk::{Corruption, DiskError};
use serde_json::{Value, json};

use crate::machine::{MachineEvent, Outcome};

/// QEMU's names for the cause of a shutdown or a reset (`ShutdownCause`).
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

fn reason(outcome: Option<&Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::PowerOff | Outcome::DebugExit(_)) => "guest-shutdown",
        Some(Outcome::Reset) => "guest-reset",
        Some(Outcome::Panicked(_)) => "guest-panic",
        Some(Outcome::ControlQuit) => "host-qmp-quit",
        // The time limit acts as a SIGTERM.
        Some(Outcome::Signal(_) | Outcome::Timeout) => "host-signal",
        Some(Outcome::Quit) => "host-ui",
        None => "host-error",
    }
}

/// The QMP message for an event, with the current time. `None`: there is none for this event.
pub(super) fn message(event: &MachineEvent) -> Option<Value> {
    let (name, data) = name_and_data(event)?;
    Some(stamped(name, data))
}

/// A message for the event `name`, with the current time.
pub(super) fn stamped(name: &str, data: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut message = json!({
        "event": name,
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
    });
    if !data.is_null() {
        message["data"] = data;
    }
    message
}

/// The text of strerror(3) for the nearest errno, as QEMU has it.
fn strerror(error: DiskError) -> String {
    let errno = match error {
        DiskError::Host(errno) => errno,
        DiskError::NoSpace => libc::ENOSPC,
        DiskError::Unsupported => libc::EOPNOTSUPP,
        DiskError::OutOfRange => libc::EINVAL,
    };
    let text = io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn name_and_data(event: &MachineEvent) -> Option<(&'static str, Value)> {
    Some(match event {
        MachineEvent::Stop => ("STOP", Value::Null),
        MachineEvent::Resume => ("RESUME", Value::Null),
        MachineEvent::Powerdown => ("POWERDOWN", Value::Null),
        MachineEvent::Shutdown(outcome) => ("SHUTDOWN", shutdown_data(reason(outcome.as_ref()))),
        MachineEvent::Reset { by_guest: true } => ("RESET", shutdown_data("guest-reset")),
        MachineEvent::Reset { by_guest: false } => {
            ("RESET", shutdown_data("host-qmp-system-reset"))
        }
        MachineEvent::GuestPanicked => ("GUEST_PANICKED", json!({ "action": "poweroff" })),
        MachineEvent::GuestCrashloaded => ("GUEST_CRASHLOADED", json!({ "action": "run" })),
        MachineEvent::Disk(BlockEvent::IoError { device, operation, action, error }) => (
            "BLOCK_IO_ERROR",
            json!({
                "device": device,
                "node-name": device,
                // Every other request may change the disk, and `werror` decides about it.
                "operation": if *operation == Kind::Read { "read" } else { "write" },
                "action": match action {
                    ErrorAction::Report => "report",
                    ErrorAction::Ignore => "ignore",
                    ErrorAction::Stop => "stop",
                },
                "nospace": *error == DiskError::NoSpace,
                "reason": strerror(*error),
            }),
        ),
        MachineEvent::Disk(BlockEvent::WriteThreshold { device, exceeded, threshold }) => (
            "BLOCK_WRITE_THRESHOLD",
            json!({
                "node-name": device,
                "amount-exceeded": exceeded,
                "write-threshold": threshold,
            }),
        ),
        MachineEvent::ImageCorrupted(device, Corruption { message, range }) => (
            "BLOCK_IMAGE_CORRUPTED",
            json!({
                "device": device,
                "node-name": device,
                "msg": message,
                "offset": range.start,
                "size": range.end - range.start,
                // minivmm writes nothing more to the image.
                "fatal": true,
            }),
        ),
        MachineEvent::Disk(_) | MachineEvent::Done(..) | MachineEvent::PanicHeld(_) => return None,
    })
}

fn shutdown_data(reason: &str) -> Value {
    json!({ "guest": reason.starts_with("guest-"), "reason": reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_a_timestamp() {
        let event = message(&MachineEvent::Shutdown(Some(Outcome::ControlQuit))).unwrap();
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        assert_eq!(message(&MachineEvent::Stop).unwrap().get("data"), None);
    }
}

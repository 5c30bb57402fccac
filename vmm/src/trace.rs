//! Trace events (`--trace`): their names, which of them are on, and what an address in one of them means. The chapter is
//! `vmm/docs/tracing.md`.
//!
//! A capability. Places in the code emit ordinary `tracing` events of level TRACE with targets of their own. An event that is off costs
//! one comparison. `cli` has the subscriber: it asks [`is_target_on`] once for each place, records events that are on, and passes the
//! thread that writes the records to the builder ([`set_writer`]). QMP's `trace-event-set-state` turns events on and off while the
//! machine runs.

mod decode;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::spawn::{Body, Spawn};

pub use self::decode::{Decoded, decode};
use crate::error::Error;
use crate::lock;
use crate::output_files::OutputFiles;

/// A trace event, with the name that users see. An event with a name of QEMU's is the same event as in QEMU.
#[derive(Debug)]
pub struct TraceEvent {
    /// The name, which patterns match.
    pub name: &'static str,
    /// The target of the places that emit it.
    target: &'static str,
    /// If several events share a target: the value of the field `kind` for this one. Empty: any other value.
    kind: &'static str,
    /// When it happens, for `--trace help`.
    pub when: &'static str,
}

const fn event(name: &'static str, when: &'static str) -> TraceEvent {
    TraceEvent { name, target: name, kind: "", when }
}

const fn handle(name: &'static str, kind: &'static str, when: &'static str) -> TraceEvent {
    TraceEvent { name, target: "virtio_blk_handle", kind, when }
}

/// All trace events. Among those that share a target, the one with an empty kind comes last.
pub const EVENTS: [TraceEvent; 16] = [
    event("virtio_queue_notify", "a disk's worker wakes up for a kick of the guest"),
    handle("virtio_blk_handle_read", "Read", "a read was taken from its ring"),
    handle("virtio_blk_handle_write", "Write", "a write was taken from its ring"),
    handle("virtio_blk_handle_flush", "Flush", "a flush was taken from its ring"),
    handle("virtio_blk_handle_other", "", "any other request was taken from its ring"),
    event("virtio_blk_submit", "a request is filed for the engine"),
    event("virtio_blk_submit_multireq", "the engine gets a transfer, for one request or several"),
    event("virtio_blk_rw_complete", "the host is done with a request or a piece of it"),
    event("virtio_blk_req_complete", "a request gets its status, and goes into the used ring"),
    event("virtio_notify", "a disk's worker interrupts the driver for what it completed"),
    event("disk_io_begin", "a thread of an engine begins to wait for the host's disk"),
    event("disk_io_end", "the host's disk has answered that thread"),
    event("disk_fault", "a rule of fault= hits a request"),
    event("irq_pulse", "an interrupt line goes up and down"),
    event("kvm_run_exit", "a vCPU left the guest, for an access or a signal"),
    TraceEvent {
        name: "boot_phase",
        target: "boot",
        kind: "",
        when: "a phase of the start is over",
    },
];

/// The state of each event, by its index in [`EVENTS`].
static ON: [AtomicBool; EVENTS.len()] = [const { AtomicBool::new(false) }; EVENTS.len()];
/// Whether there is a subscriber (`--trace`).
static AVAILABLE: AtomicBool = AtomicBool::new(false);
/// The file of a trace, and what makes the body of the thread `trace`.
static WRITER: Mutex<Option<(Option<PathBuf>, MakeBody)>> = Mutex::new(None);

/// Returns what the thread `trace` does. It gets the file that the trace goes to, if there is one.
pub type MakeBody = Box<dyn FnOnce(Option<File>) -> Body + Send>;

/// The state of every event in a process without a subscriber.
pub(crate) const UNAVAILABLE: usize = 0;

/// The state of an event: [`UNAVAILABLE`], 1 for disabled, or 2 for enabled.
pub(crate) fn state(index: usize) -> usize {
    match AVAILABLE.load(Ordering::Relaxed) {
        false => UNAVAILABLE,
        true => 1 + usize::from(is_on(index)),
    }
}

/// Whether the event with this index in [`EVENTS`] is recorded.
pub fn is_on(index: usize) -> bool {
    ON.get(index).is_some_and(|on| on.load(Ordering::Relaxed))
}

/// The index in [`EVENTS`] of an event that the code emits, and whether it is on.
pub fn find(target: &str, kind: Option<&str>) -> Option<usize> {
    let fits = |event: &TraceEvent| {
        event.target == target && (event.kind.is_empty() || Some(event.kind) == kind)
    };
    EVENTS.iter().position(fits)
}

/// Whether any event of this target is on.
pub fn is_target_on(target: &str) -> bool {
    EVENTS.iter().enumerate().any(|(index, event)| event.target == target && is_on(index))
}

/// Whether any event is on.
pub fn is_any_on() -> bool {
    (0..EVENTS.len()).any(is_on)
}

/// The indices in [`EVENTS`] of the events that `pattern` matches. `*` stands for any characters, and `?` for one.
pub fn matching(pattern: &str) -> impl Iterator<Item = usize> {
    let fits =
        |(_, event): &(usize, &TraceEvent)| matches(pattern.as_bytes(), event.name.as_bytes());
    EVENTS.iter().enumerate().filter(fits).map(|(index, _)| index)
}

fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], name) => name.is_empty(),
        ([b'*', rest @ ..], name) => (0..=name.len()).any(|skip| matches(rest, &name[skip..])),
        ([b'?', rest @ ..], [_, name @ ..]) => matches(rest, name),
        ([first, rest @ ..], [same, name @ ..]) if first == same => matches(rest, name),
        _ => false,
    }
}

/// Turns the events that `pattern` matches on or off, if there is a subscriber. `tracing` caches for each place whether its event is wanted,
/// and asks again after this call.
pub fn set(pattern: &str, on: bool) {
    if !AVAILABLE.load(Ordering::Relaxed) {
        return;
    }
    matching(pattern).for_each(|index| ON[index].store(on, Ordering::Relaxed));
    tracing::callsite::rebuild_interest_cache();
}

/// Called by the subscriber. The builder later opens `file`, and starts the thread `trace` with the body that `make_body` returns.
pub fn set_writer(file: Option<PathBuf>, make_body: MakeBody) {
    AVAILABLE.store(true, Ordering::Relaxed);
    *lock(&WRITER) = Some((file, make_body));
}

/// The writer, if it was never started.
pub fn take_writer() -> Option<MakeBody> {
    lock(&WRITER).take().map(|(_, make_body)| make_body)
}

/// Opens the file and starts the thread, if there is a trace. The thread writes to the file only after the run has begun.
///
/// # Errors
/// The file cannot be opened, or the host has no thread left.
pub(crate) fn start(spawn: &Spawn, outputs: &mut OutputFiles) -> Result<(), Error> {
    let Some((file, make_body)) = lock(&WRITER).take() else { return Ok(()) };
    let body = match file {
        None => make_body(None),
        Some(path) => {
            let file = outputs.append("--trace", format!("file={}", path.display()), &path)?;
            outputs.once_begun(make_body(Some(file)))
        }
    };
    let started = spawn("trace".to_owned(), body);
    started.map(drop).map_err(Error::host("start the trace thread"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_qemu() {
        let names = |pattern| matching(pattern).map(|index| EVENTS[index].name).collect::<Vec<_>>();
        assert_eq!(names("irq_pulse"), ["irq_pulse"]);
        assert_eq!(names("virtio_*y"), ["virtio_queue_notify", "virtio_notify"]);
        assert_eq!(names("*_handle_????"), ["virtio_blk_handle_read"]);
        assert_eq!(names("*").len(), EVENTS.len());
        for none in ["", "irq", "IRQ_PULSE", "irq_pulse?", "?"] {
            assert!(names(none).is_empty(), "{none}");
        }
    }

    #[test]
    fn events_that_share_a_place_are_told_apart_by_kind() {
        let name = |kind| find("virtio_blk_handle", Some(kind)).map(|index| EVENTS[index].name);
        assert_eq!(name("Write"), Some("virtio_blk_handle_write"));
        assert_eq!(name("Discard"), Some("virtio_blk_handle_other"));
        assert_eq!(find("boot", None), Some(EVENTS.len() - 1));
        assert_eq!(find("waypoint", None), None);
    }
}

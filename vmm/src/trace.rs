//! Trace events (`--trace`): their names, which of them are on, and what an address in one of them means.
//!
//! A capability. The places in the code are ordinary `tracing` events of level TRACE, each with a target of its own, so that one that
//! is off costs a comparison. `cli` has the subscriber: it asks [`is_target_on`] once for each place, records what is on, and
//! hands the builder the thread that writes the records down ([`set_writer`]). QMP's `trace-event-set-state` changes what is on while the
//! machine runs. The chapter is `vmm/docs/tracing.md`.

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

/// A trace event as users name it. Names that QEMU has mean what they mean there.
#[derive(Debug)]
pub struct TraceEvent {
    /// What patterns match.
    pub name: &'static str,
    /// The target of the places that emit it.
    target: &'static str,
    /// Of the events that share a target: the value of the field `kind` that makes it this one. Empty: any other value.
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

/// Every trace event. Of those with one target, the one for any kind comes last.
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

/// By place in [`EVENTS`].
static ON: [AtomicBool; EVENTS.len()] = [const { AtomicBool::new(false) }; EVENTS.len()];
/// There is a subscriber (`--trace`).
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

/// Whether the event at this place of [`EVENTS`] is recorded.
pub fn is_on(index: usize) -> bool {
    ON.get(index).is_some_and(|on| on.load(Ordering::Relaxed))
}

/// The place in [`EVENTS`] of what a place in the code emits, and whether it is on.
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

/// The places in [`EVENTS`] of the events that `pattern` matches: `*` stands for any characters, `?` for one.
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

/// Switches the events that `pattern` matches on or off, if there is a subscriber. `tracing` remembers for each place whether it is
/// wanted, and asks again.
pub fn set(pattern: &str, on: bool) {
    if !AVAILABLE.load(Ordering::Relaxed) {
        return;
    }
    matching(pattern).for_each(|index| ON[index].store(on, Ordering::Relaxed));
    tracing::callsite::rebuild_interest_cache();
}

/// There is a subscriber. The builder opens `file`, and starts what `make_body` returns as the thread `trace`.
pub fn set_writer(file: Option<PathBuf>, make_body: MakeBody) {
    AVAILABLE.store(true, Ordering::Relaxed);
    *lock(&WRITER) = Some((file, make_body));
}

/// The writer, if it was never started.
pub fn take_writer() -> Option<MakeBody> {
    lock(&WRITER).take().map(|(_, make_body)| make_body)
}

/// Opens the file and starts the thread, if there is a trace. The thread writes to a file only once the run begins.
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

//! The QMP commands about trace events and character devices (QEMU, qapi/trace.json and qapi/char.json).

use serde_json::{Value, json};

use super::arguments::{Argument, ArgumentKind, Arguments, optional, required};
use super::protocol::{Answer, Failure};
use crate::machine::Machine;
use crate::{chardev, trace};

/// `vcpu` is allowed and ignored, as in QEMU 9.0.
pub(super) const GET_STATE: &[Argument] =
    &[required("name", ArgumentKind::Text), optional("vcpu", ArgumentKind::Integer)];
pub(super) const SET_STATE: &[Argument] = &[
    required("name", ArgumentKind::Text),
    required("enable", ArgumentKind::Boolean),
    optional("ignore-unavailable", ArgumentKind::Boolean),
    optional("vcpu", ArgumentKind::Integer),
];

pub(super) const STATES: [&str; 3] = ["unavailable", "disabled", "enabled"];

pub(super) fn query_chardev() -> Value {
    let shown =
        |(label, filename)| json!({ "label": label, "filename": filename, "frontend-open": true });
    chardev::all().into_iter().map(shown).collect()
}

pub(super) fn get_state(_: &mut Machine, arguments: &Arguments<'_>) -> Result<Answer, Failure> {
    let info = |index: usize| {
        let name = trace::EVENTS[index].name;
        json!({ "name": name, "state": STATES[trace::state(index)], "vcpu": false })
    };
    Ok(Answer::Now(find(arguments)?.into_iter().map(info).collect()))
}

pub(super) fn set_state(_: &mut Machine, arguments: &Arguments<'_>) -> Result<Answer, Failure> {
    let found = find(arguments)?;
    let unavailable = |index: &&usize| trace::state(**index) == trace::UNAVAILABLE;
    if arguments.boolean("ignore-unavailable") != Some(true)
        && let Some(index) = found.iter().find(unavailable)
    {
        let name = trace::EVENTS[*index].name;
        let text = format!("event \"{name}\" is disabled; start the VM with --trace file=PATH");
        return Err(Failure::generic(text));
    }
    let name = arguments.text("name").unwrap_or_default();
    trace::set(name, arguments.boolean("enable") == Some(true));
    Ok(Answer::empty())
}

/// The events that the argument `name` matches. It is an error if a name without `*` matches none.
fn find(arguments: &Arguments<'_>) -> Result<Vec<usize>, Failure> {
    let name = arguments.text("name").unwrap_or_default();
    let found: Vec<usize> = trace::matching(name).collect();
    match found.is_empty() && !name.contains('*') {
        true => Err(Failure::generic(format!("unknown event \"{name}\""))),
        false => Ok(found),
    }
}

//! The QMP commands about injected faults (`fault=` of a disk), which QEMU does not have.

use devices::disk::injected_faults::{self, BadFault, CountedRule, FaultRule, Faults, RULES_MAX};
use serde_json::{Value, json};

use super::arguments::{Argument, ArgumentKind, Arguments, optional, required};
use super::disk_commands::find;
use super::protocol::{Answer, Failure};
use crate::machine::Machine;

pub(super) const ADD: &[Argument] =
    &[required("device", ArgumentKind::Text), required("rule", ArgumentKind::Text)];
pub(super) const REMOVE: &[Argument] =
    &[required("device", ArgumentKind::Text), optional("id", ArgumentKind::Integer)];

/// `x-minivmm-fault-add`: adds a rule after the disk's other rules.
pub(super) fn add(machine: &mut Machine, arguments: &Arguments<'_>) -> Result<Answer, Failure> {
    let rule = arguments.text("rule").unwrap_or_default();
    let rule: FaultRule = rule
        .parse()
        .map_err(|error: BadFault| Failure::generic(format!("Parameter 'rule': {error}")))?;
    let Some(id) = faults(machine, arguments)?.add(rule) else {
        return Err(Failure::generic(format!("The disk has {RULES_MAX} rules; remove one first")));
    };
    Ok(Answer::Now(json!({ "id": id })))
}

/// `x-minivmm-fault-remove`: removes one rule of a disk, or all of them. Requests that a removed rule holds back complete.
pub(super) fn remove(machine: &mut Machine, arguments: &Arguments<'_>) -> Result<Answer, Failure> {
    let id = arguments.integer("id");
    if faults(machine, arguments)?.remove(id) {
        return Ok(Answer::empty());
    }
    let id = id.unwrap_or_default();
    Err(Failure::generic(format!(
        "The disk has no rule {id}; `minivmm ctl SOCKET faults` (QMP: x-minivmm-query-faults) lists them"
    )))
}

/// `x-minivmm-query-faults`: the rules of each disk that has `fault=`, with their counts.
pub(super) fn query(machine: &Machine) -> Value {
    let of_rule = |CountedRule { id, rule, seen, hits }| json!({ "id": id, "rule": rule.to_string(), "seen": seen, "hits": hits });
    let disks = machine.hardware.disks.iter().filter_map(|disk| {
        let rules = injected_faults::of(&*disk.image)?.rules();
        let rules: Value = rules.into_iter().map(of_rule).collect();
        Some(json!({ "device": disk.config.id, "rules": rules }))
    });
    disks.collect()
}

fn faults<'a>(machine: &'a Machine, arguments: &Arguments<'_>) -> Result<&'a Faults, Failure> {
    let name = arguments.text("device").unwrap_or_default();
    injected_faults::of(&*find(machine, name)?.image).ok_or_else(|| {
        Failure::generic(format!(
            "Disk '{name}' was started without fault injection; start the VM with fault=none in its --disk"
        ))
    })
}

//! What a guest did to each sector, and what the sector may read as after a power cut.

use std::collections::BTreeMap;

/// What a sector may read as.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// What was there before the load.
    Start,
    Zero,
    Write(u64),
    /// Zeroes, or what was there before.
    Discarded,
}

/// A change of a sector by the guest.
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) value: Value,
    pub(super) begin: u64,
    pub(super) end: u64,
    pub(super) durable: bool,
}

/// What the guest did.
#[derive(Default)]
pub(super) struct History {
    pub(super) sectors: BTreeMap<u64, Vec<Change>>,
    pub(super) flushes: Vec<(u64, u64)>,
}

impl History {
    /// What `sector` may read as after a cut at `moment`, where a flush that covers all until `covered` has completed.
    pub(super) fn allowed(&self, sector: u64, moment: u64, covered: u64) -> Vec<Value> {
        let changes = &self.sectors[&sector];
        let is_covered =
            |change: &Change| change.end < covered || change.durable && change.end < moment;
        let base = changes.iter().rposition(is_covered).map_or(0, |base| base + 1);
        let later = changes[base..].iter().filter(|change| change.begin < moment);
        let mut allowed: Vec<_> = later.map(|change| change.value).collect();
        for change in changes[..base].iter().rev() {
            allowed.push(change.value);
            if change.value != Value::Discarded {
                return allowed;
            }
        }
        allowed.push(Value::Start);
        allowed
    }
}

//! The rules of a disk with their counts. Its workers share them, and a control client adds and removes some.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::rule::{FaultKind, FaultRule, mix};
use crate::clock::Instant;
use crate::disk::{Operation, SECTOR, Transfer};
use crate::lock;
use crate::log_limit::LogLimit;

/// The rules of a disk.
pub struct Faults {
    state: Mutex<State>,
    limit: LogLimit,
}

#[derive(Default)]
struct State {
    rules: Vec<CountedRule>,
    last_id: u64,
    /// The machine stands still or is about to: all delays are over.
    is_hurried: bool,
    /// The eventfd of each worker.
    wakes: Vec<Arc<EventFd>>,
}

/// Most rules of a disk, with those that clients add. Each request is compared with all of them.
pub const RULES_MAX: usize = 64;

/// A rule, and how often it was hit.
#[derive(Clone, Debug)]
pub struct CountedRule {
    /// The rule's number. No other rule of the disk ever gets it.
    pub id: u64,
    /// The rule as the user wrote it.
    pub rule: FaultRule,
    /// Requests that it concerned and that no rule before it had hit.
    pub seen: u64,
    /// Those of them that it has hit.
    pub hits: u64,
}

/// A fault that hits a request.
pub(super) struct Hit {
    pub(super) kind: FaultKind,
    /// The number of this hit among those of its rule, from 1 on.
    pub(super) number: u64,
    pub(super) rule: u64,
}

impl Faults {
    pub(super) fn new(rules: Vec<FaultRule>) -> Self {
        let faults = Self { state: Mutex::default(), limit: LogLimit::default() };
        for rule in rules {
            lock(&faults.state).push(rule);
        }
        faults
    }

    /// Appends a rule, and returns its number. `None`: the disk has [`RULES_MAX`] already.
    pub fn add(&self, rule: FaultRule) -> Option<u64> {
        let mut state = lock(&self.state);
        (state.rules.len() < RULES_MAX).then(|| state.push(rule))
    }

    /// Removes the rule of this number, or all rules. Requests that they held back complete. `false`: no rule has this number.
    pub fn remove(&self, id: Option<u64>) -> bool {
        let mut state = lock(&self.state);
        let before = state.rules.len();
        state.rules.retain(|rule| id.is_some_and(|id| id != rule.id));
        state.wake();
        id.is_none() || state.rules.len() < before
    }

    /// The rules with their counts, in order.
    pub fn rules(&self) -> Vec<CountedRule> {
        lock(&self.state).rules.clone()
    }

    /// Called when the machine begins to stand still (true), so that no delay holds it up, and when it goes on (false).
    pub fn hurry(&self, is_hurried: bool) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.is_hurried, is_hurried) != is_hurried {
            state.wake();
        }
    }

    /// Whether rule `id` still holds back a request: until the time `until`, or as long as the rule exists.
    pub(super) fn holds(&self, id: u64, until: Option<Instant>, now: Instant) -> bool {
        let state = lock(&self.state);
        let is_over = until.is_some_and(|until| until <= now || state.is_hurried);
        !is_over && state.rules.iter().any(|rule| rule.id == id)
    }

    pub(super) fn wake_at_changes(&self, wake: Arc<EventFd>) {
        lock(&self.state).wakes.push(wake);
    }

    /// The fault of the first rule that hits a request.
    pub(super) fn hit(&self, transfer: &Transfer<'_>) -> Option<Hit> {
        let hit = {
            let rules = &mut lock(&self.state).rules;
            let hit = rules.iter_mut().find_map(|rule| rule.hit(transfer));
            let is_done = |hit: &Hit| matches!(hit.kind, FaultKind::Delay(_) | FaultKind::Hang);
            if hit.as_ref().is_none_or(is_done) {
                rules.iter_mut().for_each(|rule| rule.rule.heal(transfer));
            }
            hit?
        };
        let Hit { kind, number, rule: id } = hit;
        let (sector, operation) = (transfer.offset / SECTOR, transfer.operation);
        tracing::trace!(target: "disk_fault", ?kind, number, ?operation, sector);
        let what = match operation {
            Operation::Read => "a read",
            Operation::Write { .. } => "a write",
            Operation::Flush => "a flush",
            Operation::Discard => "a discard",
            Operation::WriteZeroes { .. } => "a write of zeroes",
            Operation::SecureErase => "a secure erasure",
        };
        let rules = lock(&self.state);
        let rule = rules.rules.iter().find(|rule| rule.id == id).map(|rule| &rule.rule);
        if let Some(rule) = rule {
            self.limit.warn(format_args!(
                "fault={rule}: hits {what} at sector {sector}, request {number} of this rule"
            ));
        }
        Some(hit)
    }
}

impl State {
    fn push(&mut self, rule: FaultRule) -> u64 {
        self.last_id += 1;
        self.rules.push(CountedRule { id: self.last_id, rule, seen: 0, hits: 0 });
        self.last_id
    }

    /// Wakes the workers, so that they check which requests they still hold back.
    fn wake(&self) {
        for wake in &self.wakes {
            if let Err(error) = wake.write(1) {
                tracing::error!("cannot wake a disk's worker thread: {error}");
            }
        }
    }
}

impl CountedRule {
    fn hit(&mut self, transfer: &Transfer<'_>) -> Option<Hit> {
        let Self { id, rule, seen, hits } = self;
        if !rule.concerns(transfer) {
            return None;
        }
        *seen += 1;
        let is_chosen = rule.number.is_none_or(|number| number == *seen)
            && mix(rule.seed, *seen).is_multiple_of(rule.one_in);
        if !is_chosen || rule.once && *hits > 0 {
            return None;
        }
        *hits += 1;
        Some(Hit { kind: rule.kind, number: *hits, rule: *id })
    }
}

//! A fault as the user writes it, `KIND[:WORD]...`, and which requests it hits.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{Operation, SECTOR, Transfer};
use crate::log_limit::LogLimit;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// The request fails with an I/O error, and nothing of it is done.
    Error,
    /// The first half of a write's sectors is written, and the write succeeds.
    Torn,
    /// Nothing is done, and the request succeeds.
    Lost,
    /// A read succeeds with one bit wrong.
    Flip,
}

/// A kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Read,
    Write,
    Flush,
    /// Discards and zeroes without data.
    Discard,
}

/// A fault, and the requests that it hits: those of its target that touch its sectors, all of them or as the other words say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    kind: FaultKind,
    target: Target,
    sectors: Option<RangeInclusive<u64>>,
    /// Only this one of those requests, from 1 on.
    number: Option<u64>,
    /// One of so many on average.
    one_in: u64,
    seed: u64,
    once: bool,
}

/// A fault that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFault(&'static str);

const HOW: &str = "write KIND[:WORD]...; KIND is error, torn, lost or flip, WORD is read, write, flush, discard, n=N, sectors=FIRST-LAST, one-in=N, seed=N or once";

impl FromStr for FaultRule {
    type Err = BadFault;

    fn from_str(text: &str) -> Result<Self, BadFault> {
        let mut words = text.split(':');
        let (kind, target) = match words.next() {
            Some("error") => (FaultKind::Error, Target::Write),
            Some("torn") => (FaultKind::Torn, Target::Write),
            Some("lost") => (FaultKind::Lost, Target::Flush),
            Some("flip") => (FaultKind::Flip, Target::Read),
            _ => return Err(BadFault(HOW)),
        };
        let mut rule =
            Self { kind, target, sectors: None, number: None, one_in: 1, seed: 0, once: false };
        for word in words {
            rule.set(word).ok_or(BadFault(HOW))?;
        }
        match (rule.kind, rule.target) {
            (FaultKind::Torn, Target::Read | Target::Flush | Target::Discard) => {
                Err(BadFault("only a write is torn; leave out the other word"))
            }
            (FaultKind::Flip, Target::Write | Target::Flush | Target::Discard) => {
                Err(BadFault("only in a read a bit flips; leave out the other word"))
            }
            (FaultKind::Lost, Target::Read) => {
                Err(BadFault("a read that is lost has no data; write error:read"))
            }
            (_, Target::Flush) if rule.sectors.is_some() => {
                Err(BadFault("a flush has no sectors; leave out sectors="))
            }
            _ => Ok(rule),
        }
    }
}

impl FaultRule {
    /// `None`: no such word, or a number that is none.
    fn set(&mut self, word: &str) -> Option<()> {
        let positive = |value: &str| value.parse().ok().filter(|number| *number > 0);
        match word.split_once('=').unwrap_or((word, "")) {
            ("read", "") => self.target = Target::Read,
            ("write", "") => self.target = Target::Write,
            ("flush", "") => self.target = Target::Flush,
            ("discard", "") => self.target = Target::Discard,
            ("once", "") => self.once = true,
            ("n", value) => self.number = Some(positive(value)?),
            ("one-in", value) => self.one_in = positive(value)?,
            ("seed", value) => self.seed = value.parse().ok()?,
            ("sectors", value) => {
                let (first, last) = value.split_once('-')?;
                let sectors = first.parse().ok()?..=last.parse().ok()?;
                self.sectors = Some(sectors).filter(|sectors| !sectors.is_empty());
                self.sectors.as_ref()?;
            }
            _ => return None,
        }
        Some(())
    }

    fn concerns(&self, transfer: &Transfer<'_>) -> bool {
        let target = match transfer.operation {
            Operation::Read => Target::Read,
            Operation::Write { .. } => Target::Write,
            Operation::Flush => Target::Flush,
            Operation::Discard | Operation::WriteZeroes { .. } | Operation::SecureErase => {
                Target::Discard
            }
        };
        let (first, end) =
            (transfer.offset / SECTOR, (transfer.offset + transfer.length).div_ceil(SECTOR));
        let touches =
            |sectors: &RangeInclusive<u64>| *sectors.start() < end && *sectors.end() >= first;
        target == self.target && self.sectors.as_ref().is_none_or(touches)
    }
}

/// The rules of a disk, which its workers share.
pub(super) struct Faults {
    rules: Vec<Counted>,
    limit: LogLimit,
}

impl Faults {
    pub(super) fn new(rules: Vec<FaultRule>) -> Self {
        let rules = rules.into_iter().map(Counted::new).collect();
        Self { rules, limit: LogLimit::new() }
    }

    /// The fault that hits a request, and its number: the first one.
    pub(super) fn fault(&self, transfer: &Transfer<'_>) -> Option<(FaultKind, u64)> {
        let mut rules = self.rules.iter();
        let hit = rules.find_map(|rule| Some((rule.rule.kind, rule.hits(transfer)?)));
        if let Some((kind, number)) = hit
            && let Some(suppressed) = self.limit.admit()
        {
            let (sector, operation) = (transfer.offset / SECTOR, transfer.operation);
            tracing::warn!(sector, ?operation, suppressed, "fault={kind:?}: number {number}");
        }
        hit
    }
}

/// A rule with its counts. Shared by the workers of a disk.
struct Counted {
    rule: FaultRule,
    /// Requests that it concerned.
    seen: AtomicU64,
    /// Requests that it has hit.
    hit: AtomicU64,
}

impl Counted {
    pub(super) fn new(rule: FaultRule) -> Self {
        Self { rule, seen: AtomicU64::new(0), hit: AtomicU64::new(0) }
    }

    /// The number of the hit, from 1 on, if the rule hits this request.
    pub(super) fn hits(&self, transfer: &Transfer<'_>) -> Option<u64> {
        if !self.rule.concerns(transfer) {
            return None;
        }
        let seen = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        let is_chosen = self.rule.number.is_none_or(|number| number == seen)
            && mix(self.rule.seed, seen).is_multiple_of(self.rule.one_in);
        if !is_chosen {
            return None;
        }
        let count = |hit: u64| (!self.rule.once || hit == 0).then_some(hit + 1);
        let before = self.hit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        before.ok().map(|hit| hit + 1)
    }
}

/// A number that looks random and is the same in every run (the last step of SplitMix64).
pub(super) fn mix(seed: u64, number: u64) -> u64 {
    let mut bits = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

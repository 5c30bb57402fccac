//! Parses a fault as the user writes it, `KIND[:WORD]...`, and decides which requests it concerns.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::str::FromStr;
use std::time::Duration;

use crate::disk::{Operation, SECTOR, Transfer};

/// Most sectors of a rule with `until-written`, which has a list of them: 32 MiB of a disk.
const HEALING_MAX: u64 = 65_536;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// The request fails with this errno, and nothing of it is done.
    Error(i32),
    /// The first half of a write's sectors is written, and the write succeeds.
    Torn,
    /// Nothing is done, and the request succeeds.
    Lost,
    /// A read succeeds with one bit wrong.
    Flip,
    /// The request completes at least this long after it was submitted.
    Delay(Duration),
    /// The request does not complete as long as the rule exists.
    Hang,
    /// A write succeeds, but its data is written to this sector.
    Misdirected(u64),
}

/// The operation of the requests that a rule concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Read,
    Write,
    Flush,
    /// Discards and zeroes without data.
    Discard,
}

/// A fault, and the requests that it hits. It concerns requests of its target that touch its sectors. It hits all of these, or those that
/// the other words select.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// As the user wrote it.
    text: String,
    pub(super) kind: FaultKind,
    target: Target,
    sectors: Option<RangeInclusive<u64>>,
    /// `n=`: it hits only this one of the requests that it concerns, from 1 on.
    pub(super) number: Option<u64>,
    /// `one-in=`: it hits one of this many requests on average.
    pub(super) one_in: u64,
    pub(super) seed: u64,
    pub(super) once: bool,
    until_written: bool,
    /// With `until_written`: the sectors that were not written yet.
    bad: BTreeSet<u64>,
}

/// Why a text is no valid fault, and what to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFault(&'static str);

const HOW: &str = "write KIND[:WORD]...; KIND is error, torn, lost, flip, delay, hang or misdirected, WORD is read, write, flush, discard, n=N, sectors=FIRST-LAST, one-in=N, seed=N, once, nospace, until-written, ms=N or to=SECTOR";

/// What to write instead of a word that is not valid.
fn hint(word: &str) -> &'static str {
    match word.split_once('=').unwrap_or((word, "")).0 {
        "sectors" => "write sectors=FIRST-LAST, two numbers of which the first is not larger",
        "n" => "write n=N, a number from 1 on",
        "one-in" => "write one-in=N, a number from 1 on",
        "seed" => "write seed=N, a number",
        "ms" => "ms= works with delay only; write delay:ms=N, a whole number of milliseconds",
        "to" => "to= works with misdirected only; write misdirected:to=SECTOR, a number",
        "nospace" => "nospace works with error only; write error:nospace",
        _ => HOW,
    }
}

impl FromStr for FaultRule {
    type Err = BadFault;

    fn from_str(text: &str) -> Result<Self, BadFault> {
        let mut words = text.split(':');
        let (kind, target) = match words.next() {
            Some("error") => (FaultKind::Error(libc::EIO), Target::Write),
            Some("torn") => (FaultKind::Torn, Target::Write),
            Some("lost") => (FaultKind::Lost, Target::Flush),
            Some("flip") => (FaultKind::Flip, Target::Read),
            Some("delay") => (FaultKind::Delay(Duration::ZERO), Target::Write),
            Some("hang") => (FaultKind::Hang, Target::Write),
            Some("misdirected") => (FaultKind::Misdirected(u64::MAX), Target::Write),
            _ => return Err(BadFault(HOW)),
        };
        let mut rule = Self {
            text: text.to_owned(),
            kind,
            target,
            sectors: None,
            number: None,
            one_in: 1,
            seed: 0,
            once: false,
            until_written: false,
            bad: BTreeSet::new(),
        };
        for word in words {
            rule.set(word).ok_or_else(|| BadFault(hint(word)))?;
        }
        rule.check().map_err(BadFault)?;
        if rule.until_written {
            rule.bad = rule.sectors.iter().cloned().flatten().collect();
        }
        Ok(rule)
    }
}

impl fmt::Display for FaultRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FaultRule {
    /// Applies one word. `None`: the word is unknown, or its number is not valid.
    fn set(&mut self, word: &str) -> Option<()> {
        let positive = |value: &str| value.parse().ok().filter(|number| *number > 0);
        match word.split_once('=').unwrap_or((word, "")) {
            ("read", "") => self.target = Target::Read,
            ("write", "") => self.target = Target::Write,
            ("flush", "") => self.target = Target::Flush,
            ("discard", "") => self.target = Target::Discard,
            ("once", "") => self.once = true,
            ("until-written", "") => self.until_written = true,
            ("nospace", "") if matches!(self.kind, FaultKind::Error(_)) => {
                self.kind = FaultKind::Error(libc::ENOSPC);
            }
            ("ms", value) if matches!(self.kind, FaultKind::Delay(_)) => {
                self.kind =
                    FaultKind::Delay(Duration::from_millis(value.parse::<u32>().ok()?.into()));
            }
            ("to", value) if matches!(self.kind, FaultKind::Misdirected(_)) => {
                self.kind = FaultKind::Misdirected(value.parse().ok()?);
            }
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

    /// Checks that the words can be combined.
    fn check(&self) -> Result<(), &'static str> {
        let is_short =
            |sectors: &RangeInclusive<u64>| sectors.end() - sectors.start() < HEALING_MAX;
        match (self.kind, self.target) {
            (FaultKind::Torn, Target::Read | Target::Flush | Target::Discard) => {
                Err("torn works with writes only; leave out the other word")
            }
            (FaultKind::Misdirected(_), Target::Read | Target::Flush | Target::Discard) => {
                Err("misdirected works with writes only; leave out the other word")
            }
            (FaultKind::Flip, Target::Write | Target::Flush | Target::Discard) => {
                Err("flip works with reads only; leave out the other word")
            }
            (FaultKind::Lost, Target::Read) => {
                Err("lost does not work with reads; write error:read")
            }
            (FaultKind::Delay(Duration::ZERO), _) => {
                Err("delay needs its length in milliseconds; add ms=N, at least 1")
            }
            (FaultKind::Misdirected(u64::MAX), _) => {
                Err("misdirected needs the sector that is written instead; add to=SECTOR")
            }
            (_, Target::Flush) if self.sectors.is_some() => {
                Err("sectors= does not work with flush; leave it out")
            }
            (FaultKind::Error(_), Target::Read) if self.until_written => match &self.sectors {
                Some(sectors) if is_short(sectors) => Ok(()),
                _ => Err("until-written needs sectors=FIRST-LAST, at most 65536 of them"),
            },
            _ if self.until_written => Err(
                "until-written works with error:read only: the error ends when the sector is written; leave it out",
            ),
            _ => Ok(()),
        }
    }

    /// Whether the rule concerns the transfer.
    pub(super) fn concerns(&self, transfer: &Transfer<'_>) -> bool {
        let target = match transfer.operation {
            Operation::Read => Target::Read,
            Operation::Write { .. } => Target::Write,
            Operation::Flush => Target::Flush,
            Operation::Discard | Operation::WriteZeroes { .. } | Operation::SecureErase => {
                Target::Discard
            }
        };
        let Range { start, end } = sectors(transfer);
        let touches =
            |sectors: &RangeInclusive<u64>| *sectors.start() < end && *sectors.end() >= start;
        target == self.target
            && self.sectors.as_ref().is_none_or(touches)
            && !(self.until_written && self.bad.range(start..end).next().is_none())
    }

    /// Called for a request that is executed: the sectors that it writes are no longer bad.
    pub(super) fn heal(&mut self, transfer: &Transfer<'_>) {
        if let Operation::Write { .. } | Operation::WriteZeroes { .. } = transfer.operation {
            while let Some(sector) = self.bad.range(sectors(transfer)).next().copied() {
                self.bad.remove(&sector);
            }
        }
    }
}

/// The sectors of a transfer.
fn sectors(transfer: &Transfer<'_>) -> Range<u64> {
    transfer.offset / SECTOR..(transfer.offset + transfer.length).div_ceil(SECTOR)
}

/// A pseudo-random number, the same in every run (the last step of SplitMix64).
pub(super) fn mix(seed: u64, number: u64) -> u64 {
    let mut bits = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

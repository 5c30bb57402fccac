//! The power-cut rig: what the medium of an image may hold after a power cut, and whether that is sound.
//!
//! A [`Log`] observes the file of an open image ([`Observer`]) and numbers the moments at which each change begins and ends. Its user
//! notes by the same numbers when a guest's requests begin and end ([`Log::moment`]). Afterwards a [`Replay`](medium::Replay) goes
//! through the moments: at each the medium is in one of many legal [`State`](medium::State)s, which [`choices`] enumerates.
//! [`qcow2::Image`] judges a state of a qcow2 image in memory, and qemu-img a sample. Whether the *data* is right depends on the flushes
//! that had completed: the tests have that model.
//!
//! Each route of an engine is observed: what the worker and the pool's threads write, and what io_uring does, from the submission to the
//! completion that the worker sees.
//!
//! After a kill of the process, every change that has begun is there, or cut short: that is among the states of a power cut.
//!
//! Only tests use this. It hooks in as the [`Observer`] that an image is opened with, so the core does not know it.

pub(super) mod medium;
pub(super) mod qcow2;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use self::medium::{Change, Moment, Recorded, State};
use super::observer::{FileChange, Observer};

/// The changes of one file, in the order in which they began.
#[derive(Debug, Default)]
pub(super) struct Log {
    changes: Mutex<Vec<Recorded>>,
    clock: AtomicU64,
}

impl Log {
    /// This moment: later than all before, earlier than all after.
    pub(super) fn moment(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// The changes so far, and what the clock says.
    pub(super) fn changes(&self) -> (Vec<Recorded>, u64) {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        (changes.clone(), self.moment())
    }
}

impl Observer for Log {
    fn begin(&self, change: FileChange<'_>) -> usize {
        let change = match change {
            FileChange::Write { job, durable } => {
                let mut data = vec![0; job.length as usize];
                job.peek(&mut data);
                Change::Write { offset: job.offset, data, durable }
            }
            FileChange::WriteBytes { offset, data } => {
                Change::Write { offset, data, durable: false }
            }
            FileChange::Zero { offset, length } => Change::Zero { offset, length },
            FileChange::Sync => Change::Sync,
        };
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = std::thread::current().id();
        changes.push(Recorded { change, begin: self.moment(), end: u64::MAX, thread });
        changes.len() - 1
    }

    fn end(&self, name: usize, succeeded: bool) {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes[name].end = self.moment();
        // The host refuses what it cannot do, and something else is done instead. The rig's loads meet no other failure.
        if !succeeded {
            changes[name].change = Change::Zero { offset: 0, length: 0 };
        }
    }
}

/// A generator of numbers that are the same in every run (SplitMix64).
#[derive(Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Calls `judge` with states of one moment: nothing of the open changes, all, each alone, each missing, each torn, and
/// random choices of changes and of sectors. Where there are many open changes, at most `most` states.
pub(super) fn choices(
    moment: &Moment<'_>,
    most: usize,
    random: &mut Random,
    mut judge: impl FnMut(&State<'_>, &str),
) {
    let open = moment.open.len();
    judge(&State::new(moment, |_, _| false), "none");
    if open == 0 {
        return;
    }
    judge(&State::new(moment, |_, _| true), "all");
    for round in 0..most.saturating_sub(2) {
        let one = random.below(open as u64) as usize;
        let mut coins = random.clone();
        let mut coin = || coins.next() & 1 == 0;
        match round % 6 {
            0 => judge(&State::new(moment, |change, _| change == one), "one alone"),
            1 => judge(&State::new(moment, |change, _| change != one), "one missing"),
            2 => judge(&State::new(moment, |change, _| change <= one), "a prefix"),
            3 => judge(&State::new(moment, |_, _| coin()), "random sectors"),
            4 => judge(
                &State::new(moment, |change, _| change < one || change == one && coin()),
                "torn",
            ),
            _ => {
                let chosen: Vec<_> = (0..open).map(|_| coin()).collect();
                judge(&State::new(moment, |change, _| chosen[change]), "random changes");
            }
        }
        random.next();
    }
}

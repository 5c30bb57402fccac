//! Which states are looked at: so many for each epoch, chosen by a seed.
//!
//! At each epoch, the first states have none of the open changes, and all. Others follow in turn: a prefix, one missing, one alone, a
//! pair missing, a prefix whose last write is torn, random changes, and random sectors. An epoch with few open changes has every subset
//! of them. The same log, seed and number give the same states.
//!
//! A write is torn between units that the medium writes at once: a sector, or several that begin at a multiple of their number.

use std::collections::HashSet;
use std::ops::Range;

use super::choice::{Choice, Presence};
use super::history::{Change, History, Walk};

/// Larger changes, such as the discard of a whole disk, are there or not.
const TORN_MAX: u64 = 1 << 16;

/// Numbers that are the same in every run (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % limit.max(1) as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }
}

/// Hands out the states, epoch by epoch.
pub(super) struct Plan<'a> {
    history: &'a History,
    walk: Walk,
    seed: u64,
    /// Sectors that the medium writes at once.
    unit: u64,
    /// How many states each epoch gets.
    shares: Vec<usize>,
    /// Of the epoch of `walk`, from the last on.
    ready: Vec<Choice>,
}

impl<'a> Plan<'a> {
    /// Shares out `states` states, for a medium that writes `unit` sectors at once.
    pub(super) fn new(history: &'a History, states: usize, seed: u64, unit: u64) -> Self {
        let mut walk = Walk::new(history);
        let mut possible = Vec::with_capacity(history.epochs());
        for _ in 0..history.epochs() {
            let open = walk.open(history);
            let units = open.iter().map(|index| units(&history.changes[*index], unit));
            let units = units.map(|units| units.end - units.start).fold(0, u64::saturating_add);
            possible.push(1_usize.checked_shl(units.min(63) as u32).unwrap_or(usize::MAX));
            walk.step(history);
        }
        let shares = share(&possible, states);
        let (walk, ready) = (Walk::new(history), Vec::new());
        let mut plan = Self { history, walk, seed, unit, shares, ready };
        plan.make_ready();
        plan
    }

    /// How many states there will be at most.
    pub(super) fn states(&self) -> usize {
        self.shares.iter().sum()
    }

    fn make_ready(&mut self) {
        let epoch = self.walk.epoch;
        let share = self.shares.get(epoch).copied().unwrap_or(0);
        if share == 0 {
            return;
        }
        let open = self.walk.open(self.history);
        let changes: Vec<_> = open.iter().map(|index| &self.history.changes[*index]).collect();
        let mut random = Random(self.seed ^ (epoch as u64).wrapping_mul(0xd134_2543_de82_ef95));
        self.ready = choose(&changes, self.unit, share, &mut random)
            .into_iter()
            .map(|parts| Choice { epoch, parts })
            .rev()
            .collect();
    }
}

impl Iterator for Plan<'_> {
    type Item = Choice;

    fn next(&mut self) -> Option<Choice> {
        loop {
            if let Some(choice) = self.ready.pop() {
                return Some(choice);
            }
            if self.walk.epoch + 1 >= self.shares.len() {
                return None;
            }
            self.walk.step(self.history);
            self.make_ready();
        }
    }
}

/// The units of `unit` sectors in which a change lies.
fn units(change: &Change, unit: u64) -> Range<u64> {
    change.sector / unit..(change.sector + change.sectors).div_ceil(unit)
}

/// Shares out `states`, to each epoch at most as many as are possible there. With fewer states than epochs, some evenly spaced
/// ones get one.
fn share(possible: &[usize], states: usize) -> Vec<usize> {
    let count = possible.len();
    if states < count {
        let gets_one = |index: usize| (index + 1) * states / count > index * states / count;
        return (0..count).map(|index| usize::from(gets_one(index))).collect();
    }
    let mut shares = vec![0; count];
    let mut left = states;
    loop {
        let wanting: Vec<_> =
            (0..count).filter(|index| shares[*index] < possible[*index]).collect();
        if wanting.is_empty() || left == 0 {
            return shares;
        }
        let each = (left / wanting.len()).max(1);
        for index in wanting {
            let more = each.min(left).min(possible[index] - shares[index]);
            shares[index] += more;
            left -= more;
        }
    }
}

/// At most `count` different choices among changes.
fn choose(changes: &[&Change], unit: u64, count: usize, random: &mut Random) -> Vec<Vec<Presence>> {
    let open = changes.len();
    let mut seen = HashSet::new();
    let mut chosen = Vec::new();
    let mut add = |parts: Vec<Presence>| {
        if chosen.len() < count && seen.insert(parts.clone()) {
            chosen.push(parts);
        }
        chosen.len() == count
    };
    let whole = |is: bool| if is { Presence::Whole } else { Presence::Absent };
    let by =
        |is: &mut dyn FnMut(usize) -> bool| (0..open).map(|at| whole(is(at))).collect::<Vec<_>>();
    add(by(&mut |_| false));
    if add(by(&mut |_| true)) {
        return chosen;
    }
    if open < 20 && 1 << open <= count {
        (0..1_usize << open).for_each(|bits| _ = add(by(&mut |at| bits >> at & 1 == 1)));
    }
    let torn = |at: usize, random: &mut Random| tear(changes[at], unit, random);
    for round in 0..count.saturating_mul(4).saturating_add(64) {
        let (one, other) = (random.below(open), random.below(open));
        let is_full = match round % 7 {
            0 => add(by(&mut |at| at <= one)),
            1 => add(by(&mut |at| at != one)),
            2 => add(by(&mut |at| at == one)),
            3 => add(by(&mut |at| at != one && at != other)),
            4 => {
                let mut parts = by(&mut |at| at < one);
                if let Some(last) = parts.get_mut(one) {
                    *last = torn(one, random);
                }
                add(parts)
            }
            5 => add(by(&mut |_| random.coin())),
            _ => add((0..open).map(|at| torn(at, random)).collect()),
        };
        if is_full {
            break;
        }
    }
    chosen
}

/// A change of which each unit is there or not.
fn tear(change: &Change, unit: u64, random: &mut Random) -> Presence {
    let units = units(change, unit);
    let end = change.sector + change.sectors;
    if units.end - units.start == 1 || change.sectors > TORN_MAX {
        return if random.coin() { Presence::Whole } else { Presence::Absent };
    }
    let mut torn = Vec::new();
    for number in units {
        let (from, to) = ((number * unit).max(change.sector), ((number + 1) * unit).min(end));
        let is_there = random.coin();
        torn.extend((from..to).map(|_| is_there));
    }
    match torn.iter().filter(|is| **is).count() {
        0 => Presence::Absent,
        all if all == torn.len() => Presence::Whole,
        _ => Presence::Torn(torn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_no_larger_than_what_is_possible() {
        assert_eq!(share(&[1, 4, 1 << 20], 30), [1, 4, 25]);
        assert_eq!(share(&[9, 9, 9, 9], 2), [0, 1, 0, 1]);
        assert_eq!(share(&[1, 2], 100), [1, 2]);
        assert_eq!(share(&[], 5), [0; 0]);
    }

    #[test]
    fn few_writes_have_every_subset_and_many_have_each_kind() {
        let all = choose(
            &[&Change::of(0, 1), &Change::of(1, 1), &Change::of(2, 1)],
            1,
            8,
            &mut Random(1),
        );
        assert_eq!(all.len(), 8);
        let change = Change::of(0, 8);
        let many = || choose(&[&change; 50], 1, 200, &mut Random(1));
        assert_eq!(many().iter().collect::<HashSet<_>>().len(), 200);
        let present =
            |parts: &Vec<Presence>| parts.iter().filter(|part| **part == Presence::Whole).count();
        for count in [0, 1, 48, 49, 50] {
            assert!(many().iter().any(|parts| present(parts) == count), "{count}");
        }
        assert!(many().iter().flatten().any(|part| matches!(part, Presence::Torn(_))));
        assert_eq!(many(), many(), "a seed gives the same states");
    }

    #[test]
    fn what_the_medium_writes_at_once_is_not_torn() {
        let change = Change::of(6, 12);
        let mut random = Random(1);
        let mut is_torn = false;
        for _ in 0..100 {
            if let Presence::Torn(sectors) = tear(&change, 8, &mut random) {
                is_torn = true;
                let parts = [&sectors[..2], &sectors[2..10], &sectors[10..]];
                assert!(
                    parts.iter().all(|part| part.iter().all(|is| *is == part[0])),
                    "{sectors:?}"
                );
            }
            assert!(!matches!(tear(&Change::of(2, 2), 8, &mut random), Presence::Torn(_)));
        }
        assert!(is_torn);
    }
}

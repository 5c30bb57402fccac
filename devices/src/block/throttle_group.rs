//! Limits that several disks share: throttle groups (QEMU's `throttling.group`).
//!
//! Each disk has one [`Throttle`]. All workers of the disk ask it before they start a request. A disk with limits is a member
//! of a group, and the members of a group share its buckets. A disk that names no group is the only member of its own. A disk
//! without limits is in no group: a request then costs one atomic load here.
//!
//! Members get equal shares, whatever the number of their waiting requests (start-time fair queueing). A member's *start tag*
//! grows with each request by the seconds that the request takes at the group's rate. A member does not start a request while
//! another one waits and has a start tag that is lower by [`LEAD`] or more. Here only members count that wait in the same
//! direction or, while a limit couples the directions, in either. A tag that is more than [`LEAD`] below the highest one is
//! raised to there, so a member saves nothing up while it has no requests.
//!
//! A member with the lowest start tag may have been paused or reset, and then starts nothing. So the others wait for it for
//! [`ABSENCE`] at most, and then ignore it until it waits again. A member that leaves the group is ignored, too.
//!
//! One lock guards a group, because a request may need tokens of several buckets at once. It is never held during a transfer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::throttle::{Buckets, Direction, Throttling};
use crate::clock::Instant;
use crate::lock;

/// How far a member's start tag may be ahead of that of another one that waits, in seconds of the group's rate. To switch to another
/// thread takes tens of microseconds: in turns after each request, a group would start no more than about 20,000 requests a second.
const LEAD: f64 = 0.002;

/// How long a member that is ahead waits before it compares the start tags again.
const RETRY: Duration = Duration::from_millis(1);

/// How long the others wait for a member that could start a request and does not. Buckets without a burst hold tokens of 100 ms,
/// so this wait costs no throughput.
const ABSENCE: Duration = Duration::from_millis(20);

/// A disk's limits: its membership in a group, shared by its workers.
#[derive(Debug)]
pub(super) struct Throttle {
    /// The disk's name.
    pub(super) disk: String,
    membership: Mutex<Option<Membership>>,
    /// Whether `membership` is `None`, for readers without the lock. It may differ for a moment while the membership changes.
    off: AtomicBool,
}

#[derive(Clone, Debug)]
struct Membership {
    group: Arc<Group>,
    /// Identifies the member. No number is used twice in a group.
    number: u64,
}

#[derive(Debug)]
struct Group {
    name: String,
    state: Mutex<GroupState>,
}

#[derive(Debug)]
struct GroupState {
    buckets: Buckets,
    next_number: u64,
    members: Vec<Member>,
    /// For each direction: the highest start tag at which a request has started.
    latest: [f64; 2],
}

#[derive(Debug)]
struct Member {
    number: u64,
    /// One for each direction. While a limit couples the directions, only the first one is used.
    start_tags: [f64; 2],
    /// For each direction: it has called `wait` since it last started a request.
    waits: [bool; 2],
    /// When another member first waited for it although it could start a request. `None` again when it starts one.
    overdue: Option<Instant>,
}

impl Throttle {
    /// Limits for a disk that is called `disk`. It is the only member of its group until it joins another.
    pub(super) fn new(limits: &Throttling, disk: &str, now: Instant) -> Self {
        let (disk, off) = (disk.to_owned(), AtomicBool::new(true));
        let throttle = Self { disk, membership: Mutex::new(None), off };
        let name = limits.group.clone().unwrap_or_else(|| throttle.disk.clone());
        throttle.set(limits.clone(), &name, now);
        throttle
    }

    /// If the disk is in the group `name`, sets the limits of all its members, and empties the buckets. Otherwise the disk leaves
    /// its group for a new one; the caller then lets it `join` another disk's. If `limits` limits nothing, the disk only leaves its
    /// group, and the other members keep their limits.
    pub(super) fn set(&self, limits: Throttling, name: &str, now: Instant) {
        let membership = self.membership();
        let present = membership.filter(|present| present.group.name == name);
        match present {
            _ if limits.is_off() => self.replace(None),
            Some(present) => lock(&present.group.state).set(limits, now),
            None => self.replace(Some(Group::new(name, limits, now).join())),
        }
    }

    /// Leaves its group and joins that of another disk. If that has no limits, nothing changes.
    pub(super) fn join(&self, other: &Self) {
        let (own, other) = (self.membership(), other.membership());
        if let Some(other) = other
            && own.is_none_or(|own| !Arc::ptr_eq(&own.group, &other.group))
        {
            self.replace(Some(other.group.join()));
        }
    }

    fn replace(&self, membership: Option<Membership>) {
        self.off.store(membership.is_none(), Ordering::Relaxed);
        let left = std::mem::replace(&mut *lock(&self.membership), membership);
        if let Some(Membership { group, number }) = left {
            lock(&group.state).members.retain(|member| member.number != number);
        }
    }

    /// The limits, with the name of the group. Without limits there is no group.
    pub(super) fn limits(&self) -> Throttling {
        let Some(Membership { group, .. }) = self.membership() else {
            return Throttling::default();
        };
        let limits = lock(&group.state).buckets.limits.clone();
        Throttling { group: Some(group.name.clone()), ..limits }
    }

    /// The name of the group.
    pub(super) fn group(&self) -> Option<String> {
        self.membership().map(|membership| membership.group.name.clone())
    }

    /// A copy, so that no lock is held while the group's is taken.
    fn membership(&self) -> Option<Membership> {
        lock(&self.membership).clone()
    }

    /// Whether nothing is limited now.
    pub(super) fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }

    /// Whether reads and writes count for the same limit. Then neither may overtake the other.
    pub(super) fn couples_directions(&self) -> bool {
        self.membership()
            .is_some_and(|Membership { group, .. }| lock(&group.state).buckets.couple_directions())
    }

    /// How long a request has to wait from `now` on before it may start. Zero: it may start.
    pub(super) fn wait(&self, direction: Direction, now: Instant) -> Duration {
        self.membership().map_or(Duration::ZERO, |Membership { group, number }| {
            lock(&group.state).wait(number, direction, now)
        })
    }

    /// Counts a request of so many bytes, which starts now.
    pub(super) fn charge(&self, direction: Direction, bytes: u64) {
        if let Some(Membership { group, number }) = self.membership() {
            lock(&group.state).charge(number, direction, bytes);
        }
    }
}

impl Group {
    fn new(name: &str, limits: Throttling, now: Instant) -> Arc<Self> {
        let buckets = Buckets::new(limits, now);
        let state = GroupState { buckets, next_number: 0, members: Vec::new(), latest: [0.0; 2] };
        Arc::new(Self { name: name.to_owned(), state: Mutex::new(state) })
    }

    fn join(self: &Arc<Self>) -> Membership {
        let mut state = lock(&self.state);
        let number = state.next_number;
        state.next_number += 1;
        state.members.push(Member::new(number));
        Membership { group: Arc::clone(self), number }
    }
}

impl Member {
    fn new(number: u64) -> Self {
        Self { number, start_tags: [0.0; 2], waits: [false; 2], overdue: None }
    }
}

impl GroupState {
    fn set(&mut self, limits: Throttling, now: Instant) {
        self.buckets = Buckets::new(limits, now);
        self.latest = [0.0; 2];
        self.members.iter_mut().for_each(|member| *member = Member::new(member.number));
    }

    /// The index of a direction's start tag.
    fn tag_of(&self, direction: Direction) -> usize {
        if self.buckets.couple_directions() { 0 } else { direction as usize }
    }

    fn find(&mut self, number: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.number == number)
    }

    fn wait(&mut self, number: u64, direction: Direction, now: Instant) -> Duration {
        let wait = self.buckets.wait(direction, now);
        let tag = self.tag_of(direction);
        let least = self.latest[tag] - LEAD;
        // The member has left the group meanwhile.
        let Some(member) = self.find(number) else { return Duration::ZERO };
        member.waits[direction as usize] = true;
        member.start_tags[tag] = member.start_tags[tag].max(least);
        let start_tag = member.start_tags[tag];
        let is_ahead = self.is_ahead(number, start_tag, direction, now, wait.is_zero());
        if is_ahead { wait.saturating_add(RETRY) } else { wait }
    }

    /// Whether another member waits and is behind by [`LEAD`] or more. If `due`, the buckets admit a request in this direction now.
    /// Then another member counts only if it could start a request now, too, and for [`ABSENCE`] at most.
    fn is_ahead(
        &mut self,
        number: u64,
        start_tag: f64,
        direction: Direction,
        now: Instant,
        due: bool,
    ) -> bool {
        if self.members.len() == 1 {
            return false;
        }
        let tag = self.tag_of(direction);
        let counts = Direction::BOTH
            .map(|of| self.tag_of(of) == tag && (!due || self.buckets.wait(of, now).is_zero()));
        let mut ahead = false;
        for other in self.members.iter_mut().filter(|other| other.number != number) {
            let waits = other.waits.iter().zip(counts).any(|(waits, counts)| *waits && counts);
            if !waits || start_tag < other.start_tags[tag] + LEAD {
                continue;
            }
            if due && now - *other.overdue.get_or_insert(now) >= ABSENCE {
                (other.waits, other.overdue) = ([false; 2], None);
            } else {
                ahead = true;
            }
        }
        ahead
    }

    fn charge(&mut self, number: u64, direction: Direction, bytes: u64) {
        let seconds = self.buckets.charge(direction, bytes);
        let tag = self.tag_of(direction);
        let Some(member) = self.find(number) else { return };
        (member.waits, member.overdue) = ([false; 2], None);
        let start_tag = member.start_tags[tag];
        member.start_tags[tag] += seconds;
        self.latest[tag] = self.latest[tag].max(start_tag);
    }
}

#[cfg(test)]
mod tests {
    use super::super::throttle::{Limit, Rate};
    use super::*;

    const ON_TIME: Duration = Duration::ZERO;

    fn limits(rates: &[(Limit, u64)]) -> Throttling {
        let mut limits = Throttling::default();
        for (limit, average) in rates {
            limits.rates[*limit as usize] = Rate { average: *average, ..Rate::default() };
        }
        limits.check().unwrap();
        limits
    }

    fn group<const N: usize>(rates: &[(Limit, u64)], start: Instant) -> [Throttle; N] {
        let members = [(); N].map(|()| Throttle::new(&limits(rates), "vda", start));
        members[1..].iter().for_each(|member| member.join(&members[0]));
        members
    }

    /// Simulates members that always have a request of the given size, for `seconds`. Each wakes up `slack` after the time that `wait`
    /// returned. Returns how many requests each has started.
    fn run(
        members: &[(&Throttle, Direction, u64)],
        start: Instant,
        seconds: u64,
        slack: Duration,
    ) -> Vec<u64> {
        let end = start + Duration::from_secs(seconds);
        let mut started = vec![0; members.len()];
        let mut wake = vec![start; members.len()];
        loop {
            let first = (0..wake.len()).min_by_key(|member| wake[*member]).unwrap();
            let now = wake[first];
            if now > end {
                return started;
            }
            let (throttle, direction, bytes) = members[first];
            match throttle.wait(direction, now) {
                Duration::ZERO => {
                    throttle.charge(direction, bytes);
                    started[first] += 1;
                    // Each request takes some time.
                    wake[first] = now + Duration::from_nanos(100);
                }
                wait => wake[first] = now + wait + slack,
            }
        }
    }

    #[track_caller]
    fn about(actual: u64, expected: u64) {
        assert!(actual.abs_diff(expected) * 20 <= expected, "{actual}, not about {expected}");
    }

    #[test]
    fn members_share_a_limit_evenly_whatever_they_ask_for() {
        let start = Instant::now();
        for rates in [[(Limit::OperationsTotal, 60)], [(Limit::BytesTotal, 60 << 9)]] {
            let [a, b, c] = &group(&rates, start);
            let members =
                [(a, Direction::Read, 512), (b, Direction::Write, 512), (c, Direction::Read, 512)];
            let started = run(&members, start, 60, ON_TIME);
            about(started.iter().sum(), 3606);
            started.iter().for_each(|of_member| about(*of_member, 1202));
        }
        // With a limit on bytes, members share bytes evenly, not requests.
        let [a, b] = &group(&[(Limit::BytesRead, 100 << 20)], start);
        let members = [(a, Direction::Read, 3 << 20), (b, Direction::Read, 1 << 20)];
        let started = run(&members, start, 60, ON_TIME);
        about(started[0] * 3, 3005);
        about(started[1], 3005);
    }

    #[test]
    fn a_group_is_as_fast_as_its_limit_although_its_threads_wake_up_late() {
        let start = Instant::now();
        let [a, b] = &group(&[(Limit::OperationsTotal, 100_000)], start);
        let members = [(a, Direction::Read, 512), (b, Direction::Read, 512)];
        let started = run(&members, start, 1, Duration::from_micros(70));
        about(started.iter().sum(), 110_000);
        started.iter().for_each(|of_member| about(*of_member, 55_000));
    }

    /// An absent member saves nothing up.
    #[test]
    fn a_member_that_comes_back_gets_no_more_than_the_others() {
        let start = Instant::now();
        let [a, b] = &group(&[(Limit::OperationsTotal, 1000)], start);
        run(&[(a, Direction::Read, 512)], start, 60, ON_TIME);
        let later = start + Duration::from_secs(60);
        let members = [(a, Direction::Read, 512), (b, Direction::Read, 512)];
        let started = run(&members, later, 1, ON_TIME);
        started.iter().for_each(|of_member| about(*of_member, 500));
    }

    #[test]
    fn a_member_that_starts_nothing_costs_the_others_nothing() {
        let start = Instant::now();
        let [a, b, absent] = &group(&[(Limit::OperationsTotal, 60)], start);
        (0..7).for_each(|_| a.charge(Direction::Read, 512));
        // It waits once, and is then paused or reset.
        assert!(absent.wait(Direction::Read, start) > Duration::ZERO);
        let members = [(a, Direction::Read, 512), (b, Direction::Read, 512)];
        let started = run(&members, start, 60, ON_TIME);
        about(started.iter().sum(), 3600);
        started.iter().for_each(|of_member| about(*of_member, 1800));
    }

    #[test]
    fn a_member_alone_has_the_whole_limit() {
        let start = Instant::now();
        let [a, _idle] = &group(&[(Limit::OperationsTotal, 60)], start);
        about(run(&[(a, Direction::Write, 512)], start, 60, ON_TIME)[0], 3606);
    }

    #[test]
    fn directions_without_a_common_limit_do_not_wait_for_each_other() {
        let start = Instant::now();
        let [a, b] = &group(&[(Limit::OperationsRead, 1), (Limit::OperationsWrite, 1000)], start);
        a.charge(Direction::Read, 512);
        a.charge(Direction::Read, 512);
        assert!(a.wait(Direction::Read, start) > Duration::ZERO);
        assert_eq!(b.wait(Direction::Write, start), Duration::ZERO);
        // A member that cannot start a request yet does not hold back others.
        let later = start + Duration::from_secs(10);
        let [a, b] = &group(&[(Limit::OperationsTotal, 100), (Limit::BytesRead, 1000)], later);
        a.charge(Direction::Read, 1 << 20);
        assert!(a.wait(Direction::Read, later) > Duration::from_secs(1000));
        assert_eq!(b.wait(Direction::Write, later), Duration::ZERO);
    }

    /// docs/throttle.txt, "Applying I/O limits to groups of disks".
    #[test]
    fn the_last_limits_win_and_a_member_without_limits_leaves() {
        let start = Instant::now();
        let [a, b] = &group(&[(Limit::OperationsTotal, 60)], start);
        assert_eq!((a.group(), b.group()), (Some("vda".to_owned()), Some("vda".to_owned())));
        let faster = limits(&[(Limit::BytesRead, 1000)]);
        b.set(faster.clone(), "vda", start);
        assert_eq!(a.limits(), Throttling { group: Some("vda".to_owned()), ..faster });
        assert!(a.wait(Direction::Write, start).is_zero() && !a.couples_directions());
        a.charge(Direction::Read, 1 << 20);
        assert!(b.wait(Direction::Read, start) > Duration::from_secs(1000));
        b.set(Throttling::default(), "vda", start);
        assert!(b.is_off() && b.wait(Direction::Read, start).is_zero());
        assert_eq!((b.group(), b.limits()), (None, Throttling::default()));
        assert!(a.wait(Direction::Read, start) > Duration::from_secs(1000));
        b.set(limits(&[(Limit::BytesRead, 1)]), "other", start);
        assert_eq!((a.group(), b.group()), (Some("vda".to_owned()), Some("other".to_owned())));
        // To join one's own group, or a disk without limits, changes nothing.
        b.join(b);
        a.join(&Throttle::new(&Throttling::default(), "vdc", start));
        assert!(!a.is_off() && !b.is_off());
    }
}

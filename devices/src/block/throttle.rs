//! How fast a disk may be: leaky buckets, with QEMU's names and rules (docs/throttle.txt).
//!
//! Each limit is a bucket whose level falls at the permitted rate. A request may start while each bucket that concerns it is within its
//! capacity, and then adds its whole size or count. So a large request only makes the next one wait longer. `throttle_group` shares these
//! values between workers and disks, and `throttle_queue` has the requests that wait.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Instant;

/// Reads and writes are limited apart, or together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Read, Self::Write];

    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// The six limits of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Bytes of reads and writes together.
    BytesTotal,
    /// Bytes of reads.
    BytesRead,
    /// Bytes of writes.
    BytesWrite,
    /// Reads and writes together.
    OperationsTotal,
    /// Reads.
    OperationsRead,
    /// Writes.
    OperationsWrite,
}

impl Limit {
    /// Every limit, in the order of [`Throttling::rates`].
    pub const ALL: [Self; 6] = [
        Self::BytesTotal,
        Self::BytesRead,
        Self::BytesWrite,
        Self::OperationsTotal,
        Self::OperationsRead,
        Self::OperationsWrite,
    ];

    /// QEMU's name for it on the command line, after `throttling.`.
    pub fn option(self) -> &'static str {
        ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"]
            [self as usize]
    }

    /// QEMU's name for it in QMP.
    pub fn qmp(self) -> &'static str {
        ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"][self as usize]
    }

    pub(super) fn counts_bytes(self) -> bool {
        matches!(self, Self::BytesTotal | Self::BytesRead | Self::BytesWrite)
    }

    pub(super) fn concerns(self, direction: Direction) -> bool {
        match self {
            Self::BytesTotal | Self::OperationsTotal => true,
            Self::BytesRead | Self::OperationsRead => direction == Direction::Read,
            Self::BytesWrite | Self::OperationsWrite => direction == Direction::Write,
        }
    }
}

/// A rate, in bytes or operations a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// The rate in the long run; 0 for no limit.
    pub average: u64,
    /// The rate of a burst; 0 for none.
    pub max: u64,
    /// How long a burst may last, in seconds. At 1 its `max` may come all at once.
    pub max_length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, max: 0, max_length: 1 }
    }
}

/// The limits of a disk, or of a group of disks together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttling {
    /// In the order of [`Limit::ALL`].
    pub rates: [Rate; 6],
    /// `iops-size`: a request longer than this, in bytes, counts as several operations; 0 for never.
    pub operation_size: u64,
    /// `group`: disks with the same name here share one set of limits. `None`: the disk's own name.
    #[serde(default)]
    pub group: Option<String>,
}

/// Highest rate that is taken; QEMU's.
const RATE_MAX: u64 = 1_000_000_000_000_000;

/// Limits that contradict each other, in the words of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThrottlingError {
    /// One limit for both directions, and another for one of them.
    #[error("throttling.{0} cannot be used together with {1} or {2}")]
    TotalAndDirection(&'static str, &'static str, &'static str),
    /// The size of an operation without a limit that counts operations.
    #[error("throttling.iops-size needs iops-total, iops-read or iops-write")]
    SizeAlone,
    /// A rate that is out of range.
    #[error("throttling.{0} and {0}-max must not be above {RATE_MAX}")]
    TooHigh(&'static str),
    /// A burst that is no faster than the long run.
    #[error("throttling.{0}-max needs {0}, and must not be below it")]
    BurstBelowAverage(&'static str),
    /// A group without limits that its disks could share.
    #[error(
        "throttling.group needs a limit, such as throttling.iops-total=N; give each disk of the group the same limits"
    )]
    GroupAlone,
    /// A burst whose length is out of range.
    #[error("throttling.{0}-max-length needs {0}-max; give 1 or more, up to {RATE_MAX} / {0}-max")]
    BurstLength(&'static str),
}

impl Throttling {
    /// Nothing is limited.
    pub fn is_off(&self) -> bool {
        self.rates.iter().all(|rate| rate.average == 0)
    }

    /// Checks the limits against each other.
    ///
    /// # Errors
    /// What does not go together, with the options' names.
    pub fn check(&self) -> Result<(), ThrottlingError> {
        for unit in [&Limit::ALL[..3], &Limit::ALL[3..]] {
            let set = |limit: &Limit| self.rates[*limit as usize].average > 0;
            if set(&unit[0]) && unit[1..].iter().any(set) {
                let [total, read, write] = [0, 1, 2].map(|index| unit[index].option());
                return Err(ThrottlingError::TotalAndDirection(total, read, write));
            }
        }
        if self.operation_size > 0 && self.rates[3..].iter().all(|rate| rate.average == 0) {
            return Err(ThrottlingError::SizeAlone);
        }
        if self.group.is_some() && self.is_off() {
            return Err(ThrottlingError::GroupAlone);
        }
        for (limit, rate) in Limit::ALL.into_iter().zip(&self.rates) {
            let name = limit.option();
            let Rate { average, max, max_length } = *rate;
            if average > RATE_MAX || max > RATE_MAX {
                return Err(ThrottlingError::TooHigh(name));
            }
            if max > 0 && (average == 0 || max < average) {
                return Err(ThrottlingError::BurstBelowAverage(name));
            }
            if max_length == 0
                || max_length > 1 && max == 0
                || max.checked_mul(max_length).is_none_or(|b| b > RATE_MAX)
            {
                return Err(ThrottlingError::BurstLength(name));
            }
        }
        Ok(())
    }
}

/// One bucket for each limit. A request may have to fit several at once.
#[derive(Debug)]
pub(super) struct Buckets {
    pub(super) limits: Throttling,
    buckets: [Bucket; 6],
    /// Up to when they have leaked.
    leaked: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    rate: Rate,
    /// Leaks at the average rate.
    level: f64,
    /// Leaks at the burst's rate: keeps a long burst from coming all at once.
    burst_level: f64,
}

impl Buckets {
    /// Empty buckets.
    pub(super) fn new(limits: Throttling, now: Instant) -> Self {
        Self {
            buckets: limits.rates.map(|rate| Bucket { rate, ..Default::default() }),
            limits,
            leaked: now,
        }
    }

    /// Whether reads and writes count for the same limit.
    pub(super) fn couple_directions(&self) -> bool {
        let total = [Limit::BytesTotal, Limit::OperationsTotal];
        total.iter().any(|limit| self.limits.rates[*limit as usize].average > 0)
    }

    fn leak(&mut self, now: Instant) {
        let elapsed = (now - self.leaked).as_secs_f64();
        self.leaked = self.leaked.max(now);
        for bucket in &mut self.buckets {
            bucket.level = (bucket.level - bucket.rate.average as f64 * elapsed).max(0.0);
            bucket.burst_level = (bucket.burst_level - bucket.rate.max as f64 * elapsed).max(0.0);
        }
    }

    /// How long a request has to wait at `now` before it may start; zero when it may.
    pub(super) fn wait(&mut self, direction: Direction, now: Instant) -> Duration {
        self.leak(now);
        let concerned = Limit::ALL
            .into_iter()
            .zip(&self.buckets)
            .filter(|(limit, _)| limit.concerns(direction));
        let seconds = concerned.map(|(_, bucket)| bucket.wait()).fold(0.0, f64::max);
        // No timer is finer than that, and the arithmetic is not exact.
        if seconds < 1e-6 {
            Duration::ZERO
        } else {
            Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
        }
    }

    /// A request of so many bytes starts. Returns the seconds that its share of the slowest bucket takes to leak.
    pub(super) fn charge(&mut self, direction: Direction, bytes: u64) -> f64 {
        let size = self.limits.operation_size;
        let operations = if size > 0 && bytes > size { bytes as f64 / size as f64 } else { 1.0 };
        let mut longest = 0.0_f64;
        for (limit, bucket) in Limit::ALL.into_iter().zip(&mut self.buckets) {
            if limit.concerns(direction) {
                let units = if limit.counts_bytes() { bytes as f64 } else { operations };
                longest = longest.max(bucket.pour(units));
            }
        }
        longest
    }
}

impl Bucket {
    /// Returns the seconds that these units take to leak.
    fn pour(&mut self, units: f64) -> f64 {
        if self.rate.average == 0 {
            return 0.0;
        }
        self.level += units;
        self.burst_level += units;
        units / self.rate.average as f64
    }

    /// Seconds until it is no longer over its rim. Without a burst that is a tenth of a second's worth, so that requests
    /// are not forced into a rhythm.
    fn wait(&self) -> f64 {
        let Rate { average, max, max_length } = self.rate;
        if average == 0 {
            return 0.0;
        }
        let (average, burst) = (average as f64, max as f64);
        let rim = if max == 0 { average / 10.0 } else { burst * max_length as f64 };
        let long = (self.level - rim) / average;
        let short = if max_length > 1 { (self.burst_level - burst / 10.0) / burst } else { 0.0 };
        long.max(short).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(limit: Limit, average: u64, max: u64, max_length: u64) -> Throttling {
        let mut options = Throttling::default();
        options.rates[limit as usize] = Rate { average, max, max_length };
        options.check().unwrap();
        options
    }

    /// Starts requests one after the other as early as they may, for `seconds` of a clock of our own. Gives how many.
    fn run(
        buckets: &mut Buckets,
        start: Instant,
        direction: Direction,
        bytes: u64,
        seconds: f64,
    ) -> u64 {
        let (mut now, mut started) = (start, 0);
        loop {
            let wait = buckets.wait(direction, now);
            now += wait;
            if (now - start).as_secs_f64() > seconds {
                return started;
            }
            assert_eq!(
                buckets.wait(direction, now),
                Duration::ZERO,
                "it waited and has to wait again"
            );
            buckets.charge(direction, bytes);
            started += 1;
            // No request takes no time.
            now += Duration::from_nanos(100);
        }
    }

    #[track_caller]
    fn within_a_percent(actual: u64, expected: u64) {
        assert!(actual.abs_diff(expected) * 100 <= expected, "{actual}, not about {expected}");
    }

    #[test]
    fn the_average_holds() {
        let start = Instant::now();
        for direction in [Direction::Read, Direction::Write] {
            let mut buckets = Buckets::new(limited(Limit::OperationsTotal, 1000, 0, 1), start);
            within_a_percent(run(&mut buckets, start, direction, 4096, 100.0), 100_000);
            let mut buckets = Buckets::new(limited(Limit::BytesTotal, 1 << 20, 0, 1), start);
            within_a_percent(run(&mut buckets, start, direction, 4096, 100.0), 100 << 8);
        }
    }

    #[test]
    fn directions_are_apart() {
        let start = Instant::now();
        let mut buckets = Buckets::new(limited(Limit::BytesWrite, 1000, 0, 1), start);
        buckets.charge(Direction::Write, 100_000);
        assert!(buckets.wait(Direction::Write, start) > Duration::from_secs(90));
        assert_eq!(buckets.wait(Direction::Read, start), Duration::ZERO);
    }

    #[test]
    fn a_burst_may_come_at_once_or_last() {
        let start = Instant::now();
        let mut buckets = Buckets::new(limited(Limit::OperationsRead, 100, 1000, 1), start);
        within_a_percent(run(&mut buckets, start, Direction::Read, 512, 0.01), 1002);
        // Then only the average is left, and the next burst has to be saved up.
        let later = start + Duration::from_millis(10);
        within_a_percent(run(&mut buckets, later, Direction::Read, 512, 10.0), 1000);

        let mut buckets = Buckets::new(limited(Limit::OperationsRead, 100, 1000, 10), start);
        within_a_percent(run(&mut buckets, start, Direction::Read, 512, 1.0), 1100);
        let later = start + Duration::from_secs(1);
        // The rest of the burst: 10,000 in all, less what came, plus what leaked meanwhile.
        let more = run(&mut buckets, later, Direction::Read, 512, 20.0);
        within_a_percent(more + 1100, 10_000 + 2100);
    }

    #[test]
    fn large_requests_count_as_several_operations_and_delay_the_next() {
        let start = Instant::now();
        let mut options = limited(Limit::OperationsTotal, 100, 0, 1);
        options.operation_size = 4096;
        let mut buckets = Buckets::new(options, start);
        within_a_percent(run(&mut buckets, start, Direction::Read, 16384, 40.0), 1000);
        let mut buckets = Buckets::new(limited(Limit::BytesTotal, 1 << 20, 0, 1), start);
        buckets.charge(Direction::Read, 10 << 20);
        let wait = buckets.wait(Direction::Write, start).as_secs_f64();
        assert!((9.8..10.0).contains(&wait), "{wait}");
    }

    /// The guest chooses how large a request is. A level is a float, so that no sum overflows, and a wait that is longer than a
    /// `Duration` can be becomes the longest one.
    #[test]
    fn no_debt_is_too_large() {
        let start = Instant::now();
        let mut buckets = Buckets::new(limited(Limit::BytesTotal, 1, 0, 1), start);
        buckets.charge(Direction::Write, u64::MAX);
        buckets.charge(Direction::Write, u64::MAX);
        assert_eq!(buckets.wait(Direction::Read, start), Duration::MAX);
    }

    #[test]
    fn a_clock_that_goes_back_leaks_nothing() {
        let start = Instant::now();
        let options = limited(Limit::BytesTotal, 1000, 0, 1);
        let mut buckets = Buckets::new(options, start + Duration::from_secs(1));
        buckets.charge(Direction::Read, 1100);
        assert!(buckets.wait(Direction::Read, start) >= Duration::from_millis(999));
    }

    #[test]
    fn what_does_not_go_together() {
        let rate = |average, max, max_length| Rate { average, max, max_length };
        let check = |rates: &[(Limit, Rate)]| {
            let mut options = Throttling::default();
            rates.iter().for_each(|(limit, rate)| options.rates[*limit as usize] = *rate);
            options.check().map_err(|error| {
                let text = error.to_string();
                text.trim_start_matches("throttling.").split(' ').next().unwrap().to_owned()
            })
        };
        use Limit::*;
        assert_eq!(check(&[(BytesTotal, rate(1, 0, 1)), (OperationsRead, rate(1, 0, 1))]), Ok(()));
        assert_eq!(check(&[(BytesRead, rate(1, 0, 1)), (BytesWrite, rate(1, 2, 3))]), Ok(()));
        for (rates, named) in [
            (&[(BytesTotal, rate(1, 0, 1)), (BytesWrite, rate(1, 0, 1))][..], "bps-total"),
            (&[(OperationsTotal, rate(1, 0, 1)), (OperationsRead, rate(1, 0, 1))], "iops-total"),
            (&[(BytesRead, rate(0, 1, 1))], "bps-read-max"),
            (&[(BytesRead, rate(10, 9, 1))], "bps-read-max"),
            (&[(BytesRead, rate(10, 0, 2))], "bps-read-max-length"),
            (&[(BytesRead, rate(10, 10, 0))], "bps-read-max-length"),
            (&[(BytesRead, rate(10, 10, u64::MAX))], "bps-read-max-length"),
            (&[(OperationsWrite, rate(u64::MAX, 0, 1))], "iops-write"),
        ] {
            assert_eq!(check(rates), Err(named.to_owned()));
        }
        let mut sized = limited(BytesTotal, 1, 0, 1);
        sized.operation_size = 4096;
        assert_eq!(sized.check(), Err(ThrottlingError::SizeAlone));
        sized.rates[OperationsRead as usize].average = 1;
        assert_eq!(sized.check(), Ok(()));
        let alone = Throttling { group: Some("shared".to_owned()), ..Throttling::default() };
        assert_eq!(alone.check(), Err(ThrottlingError::GroupAlone));
    }
}

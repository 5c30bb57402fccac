//! The clock of the request path: the monotonic clock as one number.
//!
//! `std::time::Instant` keeps seconds and nanoseconds apart, so that a difference costs 40 instructions; here it is a
//! subtraction. Workers take one [`Instant`] a batch and compute with it for every request.

use std::ops::{Add, Sub};
use std::sync::LazyLock;
use std::time::{self, Duration};

/// A moment, in nanoseconds since this process first asked. 64 bits last for 584 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub(crate) u64);

impl Instant {
    /// The moment of the call.
    pub fn now() -> Self {
        static FIRST: LazyLock<time::Instant> = LazyLock::new(time::Instant::now);
        Self(FIRST.elapsed().as_nanos() as u64)
    }

    /// From `earlier` to here. Zero when that is later.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::AddAssign;

    use super::*;

    impl AddAssign<Duration> for Instant {
        fn add_assign(&mut self, duration: Duration) {
            *self = *self + duration;
        }
    }

    #[test]
    fn differences_are_those_of_the_standard_clock() {
        let (standard, ours) = (time::Instant::now(), Instant::now());
        let (later, first) = (Instant::now(), time::Instant::now());
        assert!(later - ours <= first - standard);
        let step = Duration::new(3, 5);
        assert_eq!((ours + step) - ours, step);
        assert_eq!(ours - (ours + step), Duration::ZERO);
        assert!(ours + Duration::MAX > ours);
    }
}

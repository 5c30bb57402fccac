//! The clock of the request path: the monotonic clock as one number.
//!
//! `std::time::Instant` keeps seconds and nanoseconds apart, so that a difference costs 40 instructions; here it is a
//! subtraction. Workers take one [`Instant`] for several requests and compute with it for each of them.

#![expect(unsafe_code, reason = "the system call fills a structure")]

use std::ops::{Add, Sub};
use std::time::Duration;

/// A moment of CLOCK_MONOTONIC, in nanoseconds since the host started, without suspends. 64 bits last for 584 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub(crate) u64);

impl Instant {
    /// The moment of the call.
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is valid during the call.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        Self(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// Nanoseconds from `earlier` to here. 0 when that is later.
    pub fn nanoseconds_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }
}

/// Zero when the other is later.
impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.nanoseconds_since(earlier))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::AddAssign;
    use std::time;

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

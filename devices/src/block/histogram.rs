//! How long requests take, in bins that the operator chose with `block-latency-histogram-set`. A worker adds to a
//! histogram of its own, and readers sum those up.

/// Latencies of one kind of request: `bins` has one more element than `boundaries`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Where one bin ends and the next begins, in nanoseconds, ascending.
    pub boundaries: Vec<u64>,
    /// Requests in each bin.
    pub bins: Vec<u64>,
}

impl Histogram {
    /// Empty bins. `None`: the boundaries do not ascend, or begin at 0.
    pub fn new(boundaries: Vec<u64>) -> Option<Self> {
        let ascend = boundaries.windows(2).all(|pair| pair[0] < pair[1]);
        let bins = vec![0; boundaries.len() + 1];
        (ascend && boundaries.first() != Some(&0)).then_some(Self { boundaries, bins })
    }

    pub(super) fn count(&mut self, nanoseconds: u64) {
        // A boundary belongs to the bin above it.
        let bin = self.boundaries.partition_point(|boundary| *boundary <= nanoseconds);
        self.bins[bin] += 1;
    }

    /// Adds another one with the same boundaries.
    pub(super) fn add(&mut self, other: &Self) {
        self.bins.iter_mut().zip(&other.bins).for_each(|(sum, bin)| *sum += bin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_belongs_to_the_bin_above() {
        let mut histogram = Histogram::new(vec![10, 20]).unwrap();
        for nanoseconds in [0, 9, 10, 19, 20, u64::MAX] {
            histogram.count(nanoseconds);
        }
        assert_eq!(histogram.bins, [2, 2, 2]);
        histogram.add(&histogram.clone());
        assert_eq!(histogram.bins, [4, 4, 4]);
    }

    #[test]
    fn boundaries_ascend() {
        assert!(Histogram::new(vec![]).is_some());
        for bad in [vec![0], vec![2, 1], vec![1, 1]] {
            assert_eq!(Histogram::new(bad), None);
        }
    }
}

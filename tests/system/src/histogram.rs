//! Latencies, kept in buckets of 1.6 % width.

use std::time::Duration;

const SUB: u64 = 64;

/// How long things took.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; 60 * SUB as usize], total: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    /// Adds one.
    pub fn record(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let last = self.counts.len() - 1;
        self.counts[bucket(ns).min(last)] += 1;
        self.total += 1;
        self.max = self.max.max(took);
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// How many were added.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// What `share` (0 to 1) of them did not exceed; 0 when there are none.
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_end(index as u64)).min(self.max);
            }
        }
        self.max
    }
}

impl std::fmt::Display for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (p50, p99) = (self.quantile(0.5), self.quantile(0.99));
        write!(f, "{} requests, p50 {p50:.1?}, p99 {p99:.1?}, max {:.1?}", self.total, self.max)
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUB {
        return ns as usize;
    }
    let exponent = u64::from(ns.ilog2());
    let sub = (ns >> (exponent - 6)) - SUB;
    ((exponent - 5) * SUB + sub) as usize
}

fn upper_end(bucket: u64) -> u64 {
    if bucket < SUB {
        return bucket;
    }
    let exponent = bucket / SUB + 5;
    let sub = bucket % SUB + SUB;
    ((sub + 1) << (exponent - 6)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_two_percent() {
        let mut histogram = Histogram::default();
        for us in 1..=10_000 {
            histogram.record(Duration::from_micros(us));
        }
        for (share, want) in [(0.5, 5000.0), (0.99, 9900.0), (1.0, 10_000.0)] {
            let got = histogram.quantile(share).as_secs_f64() * 1e6;
            assert!((got / want - 1.0).abs() < 0.02, "{share}: {got} instead of {want}");
        }
        assert_eq!(histogram.count(), 10_000);
        assert_eq!(histogram.max(), Duration::from_millis(10));
    }

    #[test]
    fn every_bucket_ends_where_the_next_begins() {
        for index in 0..3000 {
            assert_eq!(bucket(upper_end(index)) as u64, index);
            assert_eq!(bucket(upper_end(index) + 1) as u64, index + 1);
        }
    }
}

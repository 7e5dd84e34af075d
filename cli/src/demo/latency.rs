//! How long requests took, in bounded memory however long the demo runs.

use std::time::Duration;

/// Sub-buckets of each power of two: a percentile is at most 1/32 too high.
const STEPS: u64 = 32;
/// Buckets up to 2^63 ns.
const BUCKETS: usize = 60 * STEPS as usize;

/// A histogram of durations with an exact maximum.
#[derive(Debug, Clone)]
pub(super) struct Latencies {
    counts: Vec<u64>,
    total: u64,
    longest: Duration,
}

impl Latencies {
    /// An empty histogram.
    pub(super) fn new() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, longest: Duration::ZERO }
    }

    /// Adds one request.
    pub(super) fn add(&mut self, time: Duration) {
        self.counts[bucket(time.as_nanos().try_into().unwrap_or(u64::MAX))] += 1;
        self.total += 1;
        self.longest = self.longest.max(time);
    }

    /// How many requests there were.
    pub(super) fn count(&self) -> u64 {
        self.total
    }

    /// The slowest.
    pub(super) fn longest(&self) -> Duration {
        self.longest
    }

    /// What `share` (0 to 1) of the requests did not exceed; zero without requests.
    pub(super) fn percentile(&self, share: f64) -> Duration {
        let wanted = (self.total as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(upper_bound(index)).min(self.longest);
            }
        }
        self.longest
    }
}

fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let power = u64::from(63 - ns.leading_zeros()) - u64::from(STEPS.ilog2());
    let index = (power + 1) * STEPS + ((ns >> power) - STEPS);
    (index as usize).min(BUCKETS - 1)
}

fn upper_bound(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index;
    }
    let power = index / STEPS - 1;
    ((index % STEPS + STEPS + 1) << power) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_in_its_bucket_and_little_below_the_upper_bound() {
        for ns in (0..200u64).chain((0..62).flat_map(|p| [(1u64 << p) - 1, 1 << p, (1 << p) + (1 << p) / 3]))
        {
            let bound = upper_bound(bucket(ns));
            assert!(bound >= ns, "{ns}: {bound}");
            assert!(bound - ns <= ns / 32 + 1, "{ns}: {bound}");
        }
    }

    #[test]
    fn percentiles_of_a_known_series_are_close_and_the_longest_is_exact() {
        let mut latencies = Latencies::new();
        for us in 1..=1000 {
            latencies.add(Duration::from_micros(us));
        }
        let p = |share| latencies.percentile(share).as_micros();
        assert!((500..=516).contains(&p(0.5)), "{}", p(0.5));
        assert!((990..=1000).contains(&p(0.99)), "{}", p(0.99));
        assert_eq!(latencies.longest(), Duration::from_millis(1));
        assert_eq!(latencies.count(), 1000);
        assert_eq!(Latencies::new().percentile(0.99), Duration::ZERO);
    }
}

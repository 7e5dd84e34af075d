//! Latency histograms that a worker writes without a lock and anybody reads.

use std::sync::atomic::{AtomicU64, Ordering};

/// Sub-buckets in each power of two: 1/16 is the largest relative error.
const SUB: usize = 16;
/// Powers of two above `SUB` nanoseconds; the last holds everything from about 9 minutes on.
const POWERS: usize = 36;
const BUCKETS: usize = SUB * POWERS;

/// Counts of durations in logarithmic buckets.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

/// A copy of a histogram, or the sum of several.
#[derive(Debug, Clone)]
pub struct Snapshot {
    counts: Vec<u64>,
    /// Sum of all durations in nanoseconds.
    pub sum_ns: u64,
    /// The longest in nanoseconds.
    pub max_ns: u64,
}

fn bucket_of(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let power = 63 - ns.leading_zeros() as usize; // at least 4
    let sub = (ns >> (power - 4)) as usize & (SUB - 1);
    ((power - 3) * SUB + sub).min(BUCKETS - 1)
}

/// The largest duration that falls into the bucket, in nanoseconds.
fn upper_ns(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let (power, sub) = (bucket / SUB + 3, bucket % SUB);
    ((SUB + sub + 1) as u64) << (power - 4)
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts one duration. Only one thread may record; others read.
    pub fn record(&self, ns: u64) {
        let add = |cell: &AtomicU64, n: u64| cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        add(&self.counts[bucket_of(ns)], 1);
        add(&self.sum_ns, ns);
        if ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.store(ns, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            counts: self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect(),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            max_ns: self.max_ns.load(Ordering::Relaxed),
        }
    }
}

impl Default for Snapshot {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], sum_ns: 0, max_ns: 0 }
    }
}

impl Snapshot {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// What was counted since `earlier`, as microseconds (rounded up) and how many; both are of the same histogram.
    pub fn since(&self, earlier: &Self) -> impl Iterator<Item = (u64, u64)> {
        let counts = self.counts.iter().zip(&earlier.counts).enumerate();
        counts
            .filter(|(_, (now, before))| now > before)
            .map(|(bucket, (now, before))| (upper_ns(bucket).div_ceil(1000), now - before))
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How many were at most `ns` nanoseconds long, to the precision of a bucket.
    pub fn count_up_to(&self, ns: u64) -> u64 {
        self.counts[..=bucket_of(ns)].iter().sum()
    }

    /// The duration in microseconds that the share `quantile` (0 to 1) does not exceed; 0 when nothing was counted.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        let total = self.count();
        if total == 0 {
            return 0.0;
        }
        let rank = ((total as f64 * quantile).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        for (bucket, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper_ns(bucket).min(self.max_ns) as f64 / 1000.0;
            }
        }
        self.max_ns as f64 / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_sixteenth() {
        let h = Histogram::default();
        for ns in 1..=100_000u64 {
            h.record(ns);
        }
        let s = h.snapshot();
        assert_eq!(s.count(), 100_000);
        for (q, exact) in [(0.5, 50.0), (0.99, 99.0), (0.999, 99.9)] {
            let got = s.quantile_us(q);
            assert!((got - exact).abs() / exact < 0.07, "{q}: {got} instead of {exact}");
        }
        assert_eq!(s.max_ns, 100_000);
    }

    #[test]
    fn what_was_counted_since_is_told() {
        let h = Histogram::default();
        h.record(5_000);
        let before = h.snapshot();
        assert_eq!(h.snapshot().since(&before).count(), 0);
        for ns in [900, 40_000, 40_001] {
            h.record(ns);
        }
        assert_eq!(h.snapshot().since(&before).collect::<Vec<_>>(), [(1, 1), (41, 2)]);
    }

    #[test]
    fn every_duration_has_a_bucket_that_covers_it() {
        for shift in 0..64 {
            for ns in [1u64 << shift, (1u64 << shift).wrapping_sub(1), u64::MAX >> shift] {
                let b = bucket_of(ns);
                assert!(b < BUCKETS);
                assert!(b == BUCKETS - 1 || upper_ns(b) >= ns, "{ns} in bucket {b}");
            }
        }
    }
}

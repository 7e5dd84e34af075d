//! How fast: the bandwidth limit, the wait after an error, and the rate that is shown.

use crate::Tick;

const US_PER_S: u64 = 1_000_000;
/// What may be saved up while nothing is copied: a tenth of a second's worth.
const BURST_US: u64 = 100_000;
/// The first wait after an error; each further one is twice as long.
const BACKOFF_US_MIN: u64 = 100_000;
/// The longest wait after an error.
pub(super) const BACKOFF_US_MAX: u64 = 30 * US_PER_S;

/// A token bucket. Work may start while there is no debt, and may then leave one: so a copy larger than the bucket
/// needs no special case, and the long-term rate is exact.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: Option<u64>,
    /// Millionths of a byte.
    credit: i128,
    at: Tick,
}

impl Pace {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self { bytes_per_s: bytes_per_s.map(|rate| rate.max(1)), credit: 0, at: Tick::default() }
    }

    fn refill(&mut self, now: Tick) {
        let elapsed_us = now.us_since(self.at);
        self.at = self.at.max(now);
        let Some(rate) = self.bytes_per_s else { return };
        let most = i128::from(rate) * i128::from(BURST_US);
        let earned = i128::from(rate).saturating_mul(i128::from(elapsed_us));
        self.credit = self.credit.saturating_add(earned).min(most);
    }

    pub(super) fn set(&mut self, now: Tick, bytes_per_s: Option<u64>) {
        self.refill(now);
        self.bytes_per_s = bytes_per_s.map(|rate| rate.max(1));
        if self.bytes_per_s.is_none() {
            self.credit = 0;
        }
        self.refill(now);
    }

    /// `None` when work may start now, else when it may.
    pub(super) fn free_at(&mut self, now: Tick) -> Option<Tick> {
        self.refill(now);
        let rate = i128::from(self.bytes_per_s?);
        if self.credit >= 0 {
            return None;
        }
        let wait_us = self.credit.saturating_neg().saturating_add(rate - 1) / rate;
        Some(now.plus_us(u64::try_from(wait_us).unwrap_or(u64::MAX)))
    }

    /// Work on this many bytes starts.
    pub(super) fn take(&mut self, bytes: u64) {
        if self.bytes_per_s.is_some() {
            self.credit = self.credit.saturating_sub(i128::from(bytes) * i128::from(US_PER_S));
        }
    }

    /// Work on this many bytes was to start and did not.
    pub(super) fn give_back(&mut self, bytes: u64) {
        if self.bytes_per_s.is_some() {
            self.credit = self.credit.saturating_add(i128::from(bytes) * i128::from(US_PER_S));
        }
    }
}

/// Waits that double.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// When to try again after a failure now.
    pub(super) fn next(&mut self, now: Tick) -> Tick {
        let wait_us = BACKOFF_US_MIN.checked_shl(self.attempts.min(16)).unwrap_or(BACKOFF_US_MAX);
        self.attempts = self.attempts.saturating_add(1);
        now.plus_us(wait_us.min(BACKOFF_US_MAX))
    }

    /// Failures in a row.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }
}

/// The rate of the last seconds: a sum that fades, divided by the time that it stands for.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    bytes: f64,
    at: Tick,
    since: Option<Tick>,
}

/// How quickly the past fades.
const FADE_S: f64 = 3.0;

impl RateMeter {
    pub(super) fn note(&mut self, now: Tick, bytes: u64) {
        if self.since.is_none() {
            self.since = Some(now);
        }
        self.bytes = self.faded(now) + bytes as f64;
        self.at = now;
    }

    fn faded(&self, now: Tick) -> f64 {
        self.bytes * (-seconds(now.us_since(self.at)) / FADE_S).exp()
    }

    /// Bytes a second.
    pub(super) fn rate(&self, now: Tick) -> u64 {
        let Some(since) = self.since else { return 0 };
        let seen_s = seconds(now.us_since(since)).max(0.1);
        let stands_for_s = FADE_S * (1.0 - (-seen_s / FADE_S).exp());
        (self.faded(now) / stands_for_s) as u64
    }
}

pub(super) fn seconds(us: u64) -> f64 {
    us as f64 / US_PER_S as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_over_time_for_copies_larger_than_the_bucket() {
        let mut pace = Pace::new(Some(1_000_000));
        let (mut now, mut bytes) = (Tick(5), 0);
        while now < Tick(10_000_000) {
            match pace.free_at(now) {
                None => {
                    pace.take(700_000);
                    bytes += 700_000;
                }
                Some(at) => {
                    assert!(at > now);
                    now = at;
                }
            }
        }
        assert!((10_000_000..=10_900_000).contains(&bytes), "{bytes} bytes in 10 s at 1 MB/s");
    }

    #[test]
    fn a_limit_that_changes_takes_effect_at_once() {
        let mut pace = Pace::new(Some(1));
        assert_eq!(pace.free_at(Tick(0)), None);
        pace.take(1_000);
        assert_eq!(pace.free_at(Tick(0)), Some(Tick(1_000 * US_PER_S)));
        pace.set(Tick(0), Some(1_000));
        assert_eq!(pace.free_at(Tick(0)), Some(Tick(US_PER_S)));
        pace.set(Tick(0), None);
        assert_eq!(pace.free_at(Tick(0)), None);
        pace.set(Tick(0), Some(u64::MAX));
        pace.take(u64::MAX);
        assert_eq!(pace.free_at(Tick(u64::MAX)), None);
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..40).map(|_| backoff.next(Tick(0)).0).collect();
        assert_eq!(waits[..4], [100_000, 200_000, 400_000, 800_000]);
        assert_eq!(waits[39], BACKOFF_US_MAX);
        backoff.reset();
        assert_eq!(backoff.next(Tick(7)), Tick(100_007));
    }

    #[test]
    fn a_steady_rate_is_shown_as_it_is() {
        let mut meter = RateMeter::default();
        assert_eq!(meter.rate(Tick(0)), 0);
        for step in 1..=2_000 {
            meter.note(Tick(step * 10_000), 10_000);
        }
        let rate = meter.rate(Tick(20_000_000));
        assert!((990_000..=1_010_000).contains(&rate), "{rate} bytes/s");
    }
}

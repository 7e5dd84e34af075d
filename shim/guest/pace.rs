//! When the next page may be visited.

use super::layout::{PAGE, Parameters};

/// Milliseconds of visits that are made up for at most, after the processor was not run for a while, and that are waited at
/// least before the clock is taken to have gone back.
const SLACK_MS: u64 = 100;
/// Slowest rate, in ticks between two pages, as seconds.
const INTERVAL_MAX_S: u64 = 10;

pub struct Pace {
    tsc_khz: u64,
    vcpus: u64,
    rate: u64,
    /// Ticks between two visits.
    interval: u64,
    /// When the next one is due.
    next: u64,
}

impl Pace {
    pub fn new(parameters: &Parameters) -> Self {
        Self {
            tsc_khz: u64::from(parameters.tsc_khz),
            vcpus: u64::from(parameters.vcpus),
            rate: 0,
            interval: 0,
            next: 0,
        }
    }

    /// Whether a page may be visited now, at `rate` bytes a second of all processors together. Says yes once for each page.
    ///
    /// The clock may jump either way when the machine moves: a jump ahead is made up for by [`SLACK_MS`] of visits, after a
    /// jump back the clock is believed anew.
    #[inline]
    pub fn due(&mut self, now: u64, rate: u64) -> bool {
        if rate == 0 {
            return true;
        }
        if rate != self.rate {
            self.rate = rate;
            let ticks = u128::from(self.tsc_khz * 1000) * u128::from(PAGE * self.vcpus);
            let slowest = self.tsc_khz * 1000 * INTERVAL_MAX_S;
            // Quick for what fits 64 bits, which is all but absurd rates and clocks.
            self.interval = u64::try_from(ticks).map_or(slowest, |ticks| (ticks / rate).min(slowest));
            self.next = now;
        }
        let slack = self.tsc_khz * SLACK_MS;
        let ahead = self.next.wrapping_sub(now) as i64;
        if ahead > (slack + self.interval * 2) as i64 {
            self.next = now;
        } else if ahead > 0 {
            return false;
        } else if ahead < -(slack as i64) {
            self.next = now.wrapping_sub(slack);
        }
        self.next = self.next.wrapping_add(self.interval);
        true
    }
}

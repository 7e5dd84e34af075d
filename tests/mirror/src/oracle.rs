//! What the guest may see: every sector's writes, with when they were begun and ended.
//!
//! A read may return what any write wrote that was begun before the read ended, unless another write that succeeded
//! came wholly between the two. A failed write may have happened or not. After a power cut the same holds, only that
//! what came between must have been flushed.

/// Not ended yet.
const NEVER: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Written {
    value: u32,
    request: u64,
    begun: u32,
    ended: u32,
    failed: bool,
}

/// The guest's view of its disk.
#[derive(Debug, Clone)]
pub struct Oracle {
    sectors: Vec<Vec<Written>>,
    clock: u32,
    /// When the latest flush that the guest was told is done was begun.
    flushed: u32,
}

impl Oracle {
    /// A disk that holds these values.
    pub fn new(values: impl Iterator<Item = u32>) -> Self {
        let first = |value| vec![Written { value, request: 0, begun: 0, ended: 0, failed: false }];
        Self { sectors: values.map(first).collect(), clock: 1, flushed: 0 }
    }

    /// A point in time after all before.
    pub fn tick(&mut self) -> u32 {
        self.clock += 1;
        self.clock
    }

    /// A guest's write begins; `value` is unique, or 0 for zeroes.
    pub fn write_begins(&mut self, request: u64, sectors: std::ops::Range<u32>, value: u32) {
        let begun = self.tick();
        for sector in sectors {
            self.sectors[sector as usize].push(Written {
                value,
                request,
                begun,
                ended: NEVER,
                failed: false,
            });
        }
    }

    /// The guest is told how it ended.
    pub fn write_ends(&mut self, request: u64, sectors: std::ops::Range<u32>, is_ok: bool) {
        let now = self.tick();
        for sector in sectors {
            let written = self.sectors[sector as usize].iter_mut().find(|written| written.request == request);
            let written = written.expect("a write ends that began");
            assert!(written.ended == NEVER, "write {request} is completed twice");
            written.ended = now;
            written.failed = !is_ok;
        }
    }

    /// The guest is told that a flush, begun at `begun`, is done.
    pub fn flush_ends(&mut self, begun: u32) {
        self.flushed = self.flushed.max(begun);
    }

    /// A read from `begun` until now returned `value`. With no write in flight meanwhile, this is what the sector holds
    /// from now on.
    pub fn read(&mut self, sector: u32, value: u32, begun: u32) {
        let now = self.tick();
        self.check(sector, value, begun, "a read");
        let writes = &mut self.sectors[sector as usize];
        if writes.iter().all(|written| written.ended < begun) {
            writes.push(Written { value, request: 0, begun, ended: now, failed: false });
        }
    }

    /// Panics unless a read that began at `begun` and ends now may return `value`.
    pub fn check(&self, sector: u32, value: u32, begun: u32, who: &str) {
        let writes = &self.sectors[sector as usize];
        let is_allowed = is_allowed(writes, value, begun);
        assert!(
            is_allowed,
            "{who} of sector {sector} found {value} at {begun}..{}; it has {writes:?}",
            self.clock
        );
    }

    /// Panics unless the sector may hold `value` after a power cut now.
    pub fn check_after_power_cut(&self, sector: u32, value: u32) {
        let (writes, flushed) = (&self.sectors[sector as usize], self.flushed);
        let is_allowed = is_allowed(writes, value, flushed);
        assert!(
            is_allowed,
            "after a power cut sector {sector} holds {value}; flushed at {flushed} it had {writes:?}"
        );
    }

    /// After a power cut: these are the values now, and nothing is in flight.
    pub fn restart(&mut self, values: impl Iterator<Item = u32>) {
        let clock = self.tick();
        *self = Self { clock, flushed: 0, ..Self::new(values) };
    }
}

/// Whether no successful write that ended before `by` came wholly after one of this value.
fn is_allowed(writes: &[Written], value: u32, by: u32) -> bool {
    writes.iter().any(|written| {
        let is_overwritten =
            |other: &Written| !other.failed && other.ended < by && written.ended < other.begun;
        written.value == value && !writes.iter().any(is_overwritten)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sector: 7 at first, then 8 is written, then 9 while a write of 10 stays in flight.
    fn oracle() -> (Oracle, u32) {
        let mut oracle = Oracle::new([7].into_iter());
        oracle.write_begins(1, 0..1, 8);
        oracle.write_ends(1, 0..1, true);
        let between = oracle.tick();
        oracle.write_begins(2, 0..1, 9);
        oracle.write_begins(3, 0..1, 10);
        oracle.write_ends(2, 0..1, true);
        (oracle, between)
    }

    #[test]
    fn a_read_may_see_what_is_in_flight_and_what_was_written_last() {
        let (mut oracle, between) = oracle();
        oracle.check(0, 8, between, "a read that began before the write of 9");
        let now = oracle.tick();
        oracle.check(0, 9, now, "a read");
        oracle.check(0, 10, now, "a read");
    }

    #[test]
    #[should_panic(expected = "a read of sector 0 found 8")]
    fn a_read_never_sees_what_was_overwritten() {
        let (mut oracle, _) = oracle();
        let now = oracle.tick();
        oracle.check(0, 8, now, "a read");
    }

    #[test]
    #[should_panic(expected = "a read of sector 0 found 9")]
    fn what_was_read_once_is_what_is_there() {
        let (mut oracle, _) = oracle();
        oracle.write_ends(3, 0..1, true);
        let begun = oracle.tick();
        oracle.read(0, 10, begun);
        let begun = oracle.tick();
        oracle.read(0, 9, begun);
    }

    #[test]
    fn a_power_cut_takes_back_what_was_not_flushed() {
        let (mut oracle, between) = oracle();
        for value in 7..=10 {
            oracle.check_after_power_cut(0, value);
        }
        oracle.flush_ends(between);
        for value in 8..=10 {
            oracle.check_after_power_cut(0, value);
        }
    }

    #[test]
    #[should_panic(expected = "after a power cut sector 0 holds 7")]
    fn a_power_cut_leaves_what_was_flushed() {
        let (mut oracle, between) = oracle();
        oracle.flush_ends(between);
        oracle.check_after_power_cut(0, 7);
    }
}

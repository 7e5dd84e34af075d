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

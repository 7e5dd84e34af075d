//! Which parts of the file are taken, in units of 1 MiB.

use std::collections::BTreeMap;

/// Runs of zeroed free space that are kept at hand.
const MAX_RUNS: usize = 4096;

/// The units of a file. A unit is taken by a structure, waiting to be zeroed or zeroed and at hand (all of which count as
/// used), or a gap: unused, of unknown content.
#[derive(Debug, Clone)]
pub(super) struct Space {
    used: Vec<u64>,
    /// One past the last unit that anything used; what follows in the file was never written.
    end: u64,
    /// Zeroed free runs, by their first unit.
    pool: BTreeMap<u64, u64>,
    /// Gaps before this unit were looked at already.
    cursor: u64,
    units_per_block: u64,
}

impl Space {
    /// Of a file of which nothing is known to be used.
    pub(super) fn new(file_units: u64) -> Self {
        let words = vec![0; file_units.div_ceil(64) as usize];
        Self { used: words, end: 0, pool: BTreeMap::new(), cursor: 0, units_per_block: 1 }
    }

    /// Sets how many units a block takes.
    pub(super) fn set_block(&mut self, units: u64) {
        self.units_per_block = units;
    }

    /// One past the last unit in use.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    fn is_used(&self, unit: u64) -> bool {
        self.used.get((unit / 64) as usize).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    fn set(&mut self, start: u64, len: u64) {
        let words = (start + len).div_ceil(64) as usize;
        if words > self.used.len() {
            self.used.resize(words, 0);
        }
        for unit in start..start + len {
            self.used[(unit / 64) as usize] |= 1 << (unit % 64);
        }
        self.end = self.end.max(start + len);
    }

    fn clear(&mut self, start: u64, len: u64) {
        for unit in start..start + len {
            self.used[(unit / 64) as usize] &= !(1 << (unit % 64));
        }
    }

    /// Takes a run for a structure; `false`, and nothing is taken, when some of it is taken already.
    pub(super) fn mark(&mut self, start: u64, len: u64) -> bool {
        let free = (start..start + len).all(|unit| !self.is_used(unit));
        if free {
            self.set(start, len);
        }
        free
    }

    /// Takes room for one block: zeroed space if there is some, else what follows the end.
    pub(super) fn allocate(&mut self) -> u64 {
        self.allocate_units(self.units_per_block)
    }

    /// Takes room for a structure of `n` units in the same way.
    pub(super) fn allocate_units(&mut self, n: u64) -> u64 {
        let Some((&start, &len)) = self.pool.iter().find(|(_, len)| **len >= n) else {
            let start = self.end;
            self.set(start, n);
            return start;
        };
        self.pool.remove(&start);
        if len > n {
            self.pool.insert(start + n, len - n);
        }
        start
    }

    /// Puts zeroed space at hand. It counts as used already.
    pub(super) fn give_zeroed(&mut self, mut start: u64, mut len: u64) {
        if let Some((&before, &n)) = self.pool.range(..start).next_back().filter(|(s, n)| **s + **n == start)
        {
            self.pool.remove(&before);
            (start, len) = (before, n + len);
        }
        if let Some(n) = self.pool.remove(&(start + len)) {
            len += n;
        }
        if self.pool.len() < MAX_RUNS {
            self.pool.insert(start, len);
        } else {
            self.clear(start, len);
            self.cursor = self.cursor.min(start);
        }
    }

    /// Whether there may be gaps that are worth zeroing because nothing zeroed is left.
    pub(super) fn wants_gaps(&self) -> bool {
        self.pool.is_empty() && self.cursor < self.end
    }

    /// Takes up to `max` gaps that hold a block or more, to be zeroed: (first unit, units).
    pub(super) fn take_gaps(&mut self, max: usize) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        while gaps.len() < max && self.cursor < self.end {
            let word = (self.cursor / 64) as usize;
            if self.cursor.is_multiple_of(64) && self.used[word] == u64::MAX {
                self.cursor += 64;
                continue;
            }
            if self.is_used(self.cursor) {
                self.cursor += 1;
                continue;
            }
            let start = self.cursor;
            while self.cursor < self.end && !self.is_used(self.cursor) {
                self.cursor += 1;
            }
            let len = self.cursor - start;
            if len >= self.units_per_block {
                self.set(start, len);
                gaps.push((start, len));
            }
        }
        gaps
    }

    /// Gives up zeroed space and gaps at the end; the new end.
    pub(super) fn trim(&mut self) -> u64 {
        loop {
            let last = self.pool.last_key_value().map(|(s, n)| (*s, *n));
            if let Some((start, len)) = last.filter(|(start, len)| start + len == self.end) {
                self.pool.remove(&start);
                self.clear(start, len);
                self.end = start;
            } else if self.end > 0 && !self.is_used(self.end - 1) {
                self.end -= 1;
            } else {
                break;
            }
        }
        self.cursor = self.cursor.min(self.end);
        self.end
    }

    /// The runs of units below the end that nothing uses, in order: (first unit, units).
    pub(super) fn gaps(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut unit = 0;
        std::iter::from_fn(move || {
            let start = self.next_of(unit, false);
            unit = self.next_of(start, true);
            (unit > start).then_some((start, unit - start))
        })
    }

    /// The first unit from `unit` on, below the end, that is used or is not; the end if there is none.
    fn next_of(&self, mut unit: u64, used: bool) -> u64 {
        while unit < self.end {
            let word = self.used[(unit / 64) as usize];
            let wanted = if used { word } else { !word } >> (unit % 64);
            if wanted != 0 {
                return (unit + u64::from(wanted.trailing_zeros())).min(self.end);
            }
            unit = (unit / 64 + 1) * 64;
        }
        self.end
    }

    /// Units below the end that nothing uses.
    pub(super) fn unused(&self) -> u64 {
        let used: u64 = self.used.iter().map(|word| u64::from(word.count_ones())).sum();
        self.end - used + self.pool.values().sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(used: &[(u64, u64)], block: u64) -> Space {
        let mut space = Space::new(200);
        space.set_block(block);
        for (start, len) in used {
            assert!(space.mark(*start, *len));
        }
        space
    }

    #[test]
    fn what_is_taken_cannot_be_taken_again() {
        let mut space = space(&[(0, 4), (70, 60)], 2);
        assert!(!space.mark(3, 1));
        assert!(!space.mark(128, 5));
        assert!(space.mark(4, 66));
    }

    #[test]
    fn blocks_come_from_behind_the_end_until_gaps_are_zeroed() {
        let mut space = space(&[(0, 4), (8, 2)], 2);
        assert_eq!(space.allocate(), 10);
        assert_eq!(space.unused(), 4);
        let gaps = space.take_gaps(10);
        assert_eq!(gaps, [(4, 4)]);
        assert_eq!(space.allocate(), 12);
        space.give_zeroed(4, 4);
        assert_eq!((space.allocate(), space.allocate(), space.allocate()), (4, 6, 14));
    }

    #[test]
    fn gaps_smaller_than_a_block_are_left_alone() {
        let mut space = space(&[(0, 4), (5, 1), (8, 100)], 2);
        assert_eq!(space.take_gaps(10), [(6, 2)]);
        assert!(!space.wants_gaps());
    }

    #[test]
    fn gaps_are_found_across_words() {
        let empty = |used: &[(u64, u64)]| space(used, 1).gaps().collect::<Vec<_>>();
        assert_eq!(empty(&[]), []);
        assert_eq!(empty(&[(0, 64)]), []);
        assert_eq!(empty(&[(0, 1), (63, 2), (130, 70)]), [(1, 62), (65, 65)]);
        assert_eq!(empty(&[(199, 1)]), [(0, 199)]);
    }

    #[test]
    fn trimming_gives_up_what_is_free_at_the_end() {
        let mut space = space(&[(0, 4)], 2);
        let (a, b, c) = (space.allocate(), space.allocate(), space.allocate());
        assert_eq!((a, b, c), (4, 6, 8));
        space.give_zeroed(c, 2);
        space.give_zeroed(a, 2);
        assert_eq!(space.trim(), 8);
        space.give_zeroed(b, 2);
        assert_eq!(space.trim(), 4);
        assert_eq!(space.allocate(), 4);
    }
}

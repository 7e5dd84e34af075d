//! Which sectors are the layer's own, though the image's metadata does not say so yet.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges of sectors, each with the round in which it came.
#[derive(Debug, Default)]
struct Ranges {
    /// First sector → (one past the last, round).
    map: BTreeMap<u64, (u64, u64)>,
}

impl Ranges {
    /// Puts in what is not there yet; what is there keeps its round.
    fn insert(&mut self, range: Range<u64>, round: u64) {
        let mut at = range.start;
        while at < range.end {
            let before = self.map.range(..=at).next_back().map(|(start, entry)| (*start, *entry));
            if let Some((_, (end, _))) = before.filter(|(_, (end, _))| *end > at) {
                at = end;
                continue;
            }
            let next = self.map.range(at..).next().map(|(start, entry)| (*start, *entry));
            let mut end = next.map_or(range.end, |(start, _)| start.min(range.end));
            if let Some((start, (further, _))) = next.filter(|(start, (_, r))| *start == end && *r == round) {
                self.map.remove(&start);
                end = further;
            }
            let joined = before.filter(|(_, (stop, r))| *stop == at && *r == round);
            self.map.insert(joined.map_or(at, |(start, _)| start), (end, round));
            at = end;
        }
    }

    fn remove(&mut self, range: &Range<u64>) {
        while let Some((start, (end, round))) =
            self.map.range(..range.end).next_back().map(|(start, entry)| (*start, *entry))
        {
            if end <= range.start || range.is_empty() {
                break;
            }
            self.map.remove(&start);
            if end > range.end {
                self.map.insert(range.end, (end, round));
            }
            if start < range.start {
                self.map.insert(start, (range.start, round));
                break;
            }
        }
    }

    /// Calls `each` with what lies within `range`, in order.
    fn within(&self, range: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        let before = self.map.range(..range.start).next_back().filter(|(_, (end, _))| *end > range.start);
        for (start, (end, _)) in before.into_iter().chain(self.map.range(range.clone())) {
            each((*start).max(range.start)..(*end).min(range.end));
        }
    }
}

/// Appends to sorted ranges, joining those that touch.
fn append(list: &mut Vec<Range<u64>>, next: Range<u64>) {
    match list.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => list.push(next),
    }
}

/// The round of ranges whose payload is durable: they wait for no sync.
const DURABLE: u64 = 0;

/// What waits for a sync, and what was taken to be recorded and is not yet.
#[derive(Debug)]
pub(super) struct Pending {
    waiting: Ranges,
    taken: Ranges,
    /// Rises with each [`Self::begin`], so that a round tells on which side of it a range came.
    round: u64,
    /// Token → the last round whose ranges its sync makes durable.
    cuts: BTreeMap<u64, u64>,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self {
            waiting: Ranges::default(),
            taken: Ranges::default(),
            round: DURABLE + 1,
            cuts: BTreeMap::new(),
        }
    }

    /// How many ranges are kept.
    pub(super) fn len(&self) -> usize {
        self.waiting.map.len() + self.taken.map.len()
    }

    /// Whether anything waits to be taken.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.map.is_empty()
    }

    pub(super) fn add(&mut self, range: Range<u64>) {
        self.waiting.insert(range, self.round);
    }

    /// A sync begins, which is known by `token`.
    pub(super) fn begin(&mut self, token: u64) {
        let cut = self.cuts.insert(token, self.round);
        assert!(cut.is_none(), "two syncs are called {token}");
        self.round += 1;
    }

    /// What came before the sync of `token` began, `ranges_max` of it at the most: then there may be more. A token that is not
    /// known took nothing along.
    pub(super) fn take(&mut self, token: u64, ranges_max: usize) -> Vec<Range<u64>> {
        let cut = self.cuts.get(&token).copied().unwrap_or(DURABLE);
        let takes = |(_, (_, round)): &(&u64, &(u64, u64))| *round <= cut;
        let found = self.waiting.map.iter().filter(takes).take(ranges_max);
        let found: Vec<Range<u64>> = found.map(|(start, (end, _))| *start..*end).collect();
        if found.len() < ranges_max {
            // It has nothing left to take, and neither have the syncs that began earlier.
            self.cuts.retain(|_, other| *other > cut);
        }
        let mut list = Vec::new();
        for range in found {
            self.waiting.map.remove(&range.start);
            self.taken.insert(range.clone(), DURABLE);
            append(&mut list, range);
        }
        list
    }

    pub(super) fn give_back(&mut self, range: &Range<u64>) {
        self.taken.remove(range);
        self.waiting.remove(range);
        self.waiting.insert(range.clone(), DURABLE);
    }

    pub(super) fn remove(&mut self, range: &Range<u64>) {
        self.taken.remove(range);
        self.waiting.remove(range);
    }

    pub(super) fn overlaps(&self, range: &Range<u64>) -> bool {
        let mut any = false;
        self.within(range.clone(), |_| any = true);
        any
    }

    /// Calls `each` with all that lies within `range`; parts may come twice and in any order.
    pub(super) fn within(&self, range: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        self.waiting.within(range.clone(), &mut each);
        self.taken.within(range, each);
    }

    /// Everything, in order and disjoint.
    pub(super) fn all(&self) -> Vec<Range<u64>> {
        let mut all = Ranges::default();
        for (start, (end, _)) in self.waiting.map.iter().chain(&self.taken.map) {
            all.insert(*start..*end, DURABLE);
        }
        all.map.into_iter().map(|(start, (end, _))| start..end).collect()
    }
}

//! The queue of guest writes, copies and guarded verifications: what may run beside what.
//!
//! Everything in it has a place in one order. It may run when nothing earlier that conflicts with it is left; each
//! entry counts those. Two writes conflict where their bytes overlap, all else where extents do. Conflicts are
//! symmetric, so no lists of waiters are kept: an entry that leaves looks for later ones that it was in the way of.
//!
//! Entries of few extents are found through buckets by extent number, the rest (there are few) in one list. In the
//! steady state nothing is allocated.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::{CopyId, ExtentRange, WriteId, WriteTo};

/// Entries of more extents than this are kept in one list.
const BUCKETED_EXTENTS_MAX: u32 = 8;
/// A power of two, at least `BUCKETED_EXTENTS_MAX`, so that no entry is twice in one bucket.
const BUCKET_COUNT: usize = 256;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Write(WriteId),
    Copy(CopyId),
    /// A verification that guest writes wait for.
    Guard(CopyId),
}

/// Where an entry is kept; valid until it is removed.
pub(super) type Slot = u32;

/// What the queue knows of a piece of work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) work: Work,
    pub(super) extents: ExtentRange,
    /// Bytes `[start, end)`; only looked at between two writes.
    pub(super) bytes: (u64, u64),
    /// It was told to go.
    pub(super) running: bool,
    /// Where a running write went.
    pub(super) to: WriteTo,
    /// Its place in the order.
    place: u64,
    /// Earlier entries that conflict with it and are still there.
    blockers: u32,
    present: bool,
}

impl Entry {
    fn conflicts_with(&self, other: &Self) -> bool {
        match (self.work, other.work) {
            (Work::Write(_), Work::Write(_)) => self.bytes.0 < other.bytes.1 && other.bytes.0 < self.bytes.1,
            _ => self.extents.overlaps(other.extents),
        }
    }

    fn is_bucketed(&self) -> bool {
        self.extents.count <= BUCKETED_EXTENTS_MAX
    }

    pub(super) fn is_write(&self) -> bool {
        matches!(self.work, Work::Write(_))
    }

    pub(super) fn is_guard(&self) -> bool {
        matches!(self.work, Work::Guard(_))
    }
}

/// Write ids come from our own caller: a multiplication spreads them well enough.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    entries: Vec<Entry>,
    free: Vec<Slot>,
    buckets: Vec<Vec<Slot>>,
    large: Vec<Slot>,
    writes: HashMap<WriteId, Slot, BuildHasherDefault<IdHasher>>,
    /// Copies and guards, running or waiting: there are few.
    others: Vec<(CopyId, Slot)>,
    copies: u32,
    next_place: u64,
    /// Entries that may run now and have not been told so.
    ready: Vec<Slot>,
    found: Vec<Slot>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            buckets: vec![Vec::new(); BUCKET_COUNT],
            large: Vec::new(),
            writes: HashMap::default(),
            others: Vec::new(),
            copies: 0,
            next_place: 0,
            ready: Vec::new(),
            found: Vec::new(),
        }
    }

    pub(super) fn entry(&self, slot: Slot) -> &Entry {
        let entry = &self.entries[slot as usize];
        assert!(entry.present, "slot {slot} of the queue is used after its entry has left");
        entry
    }

    /// Puts work at the end of the order; it is ready at once when nothing is in its way.
    pub(super) fn insert(&mut self, work: Work, extents: ExtentRange, bytes: (u64, u64)) {
        let place = self.next_place;
        self.next_place += 1;
        let to = WriteTo::Both;
        let mut entry = Entry { work, extents, bytes, running: false, to, place, blockers: 0, present: true };
        self.find_conflicts(&entry);
        entry.blockers = u32::try_from(self.found.len()).expect("fewer requests in flight than 2^32");
        let slot = self.place(entry);
        match work {
            Work::Write(id) => {
                let earlier = self.writes.insert(id, slot);
                assert!(earlier.is_none(), "write {id} began while another of this name is in flight");
            }
            Work::Copy(id) => {
                self.copies += 1;
                self.others.push((id, slot));
            }
            Work::Guard(id) => self.others.push((id, slot)),
        }
        if entry.blockers == 0 {
            self.ready.push(slot);
        }
    }

    fn place(&mut self, entry: Entry) -> Slot {
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                u32::try_from(self.entries.len() - 1).expect("fewer requests in flight than 2^32")
            }
        };
        if entry.is_bucketed() {
            for extent in entry.extents.first..entry.extents.end() {
                self.buckets[extent as usize % BUCKET_COUNT].push(slot);
            }
        } else {
            self.large.push(slot);
        }
        slot
    }

    /// Takes an entry out; what it was the last one in the way of becomes ready.
    pub(super) fn remove(&mut self, slot: Slot) -> Entry {
        let entry = *self.entry(slot);
        if entry.is_bucketed() {
            for extent in entry.extents.first..entry.extents.end() {
                take_out(&mut self.buckets[extent as usize % BUCKET_COUNT], slot);
            }
        } else {
            take_out(&mut self.large, slot);
        }
        self.entries[slot as usize].present = false;
        self.free.push(slot);
        match entry.work {
            Work::Write(id) => {
                assert!(self.writes.remove(&id).is_some(), "write {id} was in the queue twice")
            }
            Work::Copy(id) | Work::Guard(id) => self.others.retain(|&(other, _)| other != id),
        }
        if matches!(entry.work, Work::Copy(_)) {
            self.copies -= 1;
        }
        self.find_conflicts(&entry);
        for index in 0..self.found.len() {
            let slot = self.found[index];
            let other = &mut self.entries[slot as usize];
            // What runs already waits for nothing (it was released, or came first).
            if other.place > entry.place && !other.running {
                other.blockers -= 1;
                if other.blockers == 0 {
                    self.ready.push(slot);
                }
            }
        }
        entry
    }

    /// Fills `found` with the entries that conflict with this one.
    fn find_conflicts(&mut self, entry: &Entry) {
        self.found.clear();
        let (entries, found) = (&self.entries, &mut self.found);
        if !entry.is_bucketed() {
            let conflicting =
                entries.iter().enumerate().filter(|(_, other)| other.present && entry.conflicts_with(other));
            found.extend(conflicting.map(|(slot, _)| slot as Slot));
            return;
        }
        for extent in entry.extents.first..entry.extents.end() {
            for &slot in &self.buckets[extent as usize % BUCKET_COUNT] {
                let other = &entries[slot as usize];
                // Each pair is found once: at the first extent that both have.
                if entry.extents.first.max(other.extents.first) == extent && entry.conflicts_with(other) {
                    found.push(slot);
                }
            }
        }
        found.extend(self.large.iter().filter(|&&slot| entry.conflicts_with(&entries[slot as usize])));
    }

    /// The next entry that may run, now marked as running.
    pub(super) fn next_ready(&mut self) -> Option<Slot> {
        let slot = self.ready.pop()?;
        let entry = &mut self.entries[slot as usize];
        assert!(
            entry.present && !entry.running && entry.blockers == 0,
            "an entry became ready twice or too soon"
        );
        entry.running = true;
        Some(slot)
    }

    pub(super) fn set_route(&mut self, slot: Slot, to: WriteTo) {
        self.entries[slot as usize].to = to;
    }

    /// Lets all waiting writes run at once, whatever is in their way, once the order no longer matters.
    pub(super) fn release_writes(&mut self) {
        self.ready.clear();
        for (slot, entry) in self.entries.iter_mut().enumerate() {
            if entry.present && entry.is_write() && !entry.running {
                entry.blockers = 0;
                self.ready.push(slot as Slot);
            }
        }
    }

    /// Takes out the copies and guards that have not been told to run. Nothing may be ready.
    pub(super) fn remove_waiting_others(&mut self, mut removed: impl FnMut(Entry)) {
        assert!(self.ready.is_empty(), "what is ready is told to run before waiting work is taken out");
        while let Some(&(_, slot)) = self.others.iter().find(|&&(_, slot)| !self.entry(slot).running) {
            removed(self.remove(slot));
        }
    }

    pub(super) fn write_slot(&self, id: WriteId) -> Option<Slot> {
        self.writes.get(&id).copied()
    }

    pub(super) fn other_slot(&self, id: CopyId) -> Option<Slot> {
        self.others.iter().find(|&&(other, _)| other == id).map(|&(_, slot)| slot)
    }

    /// Copies, running or waiting.
    pub(super) fn copies(&self) -> u32 {
        self.copies
    }

    /// Copies and guards that have not been told to run.
    pub(super) fn has_waiting_others(&self) -> bool {
        self.others.iter().any(|&(_, slot)| !self.entry(slot).running)
    }

    /// Copies and guards, running or waiting.
    pub(super) fn others(&self) -> impl Iterator<Item = &Entry> {
        self.others.iter().map(|&(_, slot)| self.entry(slot))
    }

    pub(super) fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }

    /// All writes, running or waiting.
    pub(super) fn writes(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.present && entry.is_write())
    }

    /// The end (exclusive) of an entry that has this extent, and whether that entry is a guest write; `None` when nothing has it.
    pub(super) fn holder(&self, extent: u32) -> Option<(u32, bool)> {
        let holds = |slot: &&Slot| self.entries[**slot as usize].extents.contains(extent);
        let of = |slot: &Slot| {
            let entry = &self.entries[*slot as usize];
            (entry.extents.end(), entry.is_write())
        };
        let bucketed = self.buckets[extent as usize % BUCKET_COUNT].iter().filter(holds).map(of);
        let all = bucketed.chain(self.large.iter().filter(holds).map(of));
        // A copy or guard counts before a write.
        all.reduce(|a, b| (a.0.max(b.0), a.1 && b.1))
    }

    /// Whether a write or copy that runs touches these extents.
    pub(super) fn works_on(&self, range: ExtentRange) -> bool {
        let mut running =
            self.entries.iter().filter(|entry| entry.present && entry.running && !entry.is_guard());
        running.any(|entry| entry.extents.overlaps(range))
    }

    /// Whether a guest write that runs touches these extents.
    pub(super) fn is_written(&self, range: ExtentRange) -> bool {
        self.writes().any(|entry| entry.running && entry.extents.overlaps(range))
    }
}

fn take_out(list: &mut Vec<Slot>, slot: Slot) {
    let index =
        list.iter().position(|&other| other == slot).expect("an entry is in the lists of its extents");
    list.swap_remove(index);
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: u64 = 4096;

    /// A stream of pseudo-random numbers.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state >> 33
    }

    fn some_work(state: &mut u64, id: u64) -> (Work, ExtentRange, (u64, u64)) {
        let offset = next(state) % (600 * EXTENT);
        let len_max = [512, EXTENT, 20 * EXTENT, 400 * EXTENT][(next(state) % 4) as usize];
        let len = 1 + next(state) % len_max;
        let extents = ExtentRange::touched_by(offset, len, EXTENT);
        match next(state) % 5 {
            0 => (Work::Copy(id), extents, (0, 0)),
            1 => (Work::Guard(id), extents, (0, 0)),
            _ => (Work::Write(id), extents, (offset, offset + len)),
        }
    }

    /// The rule itself, by looking at everything: what may run is what conflicts with nothing earlier.
    fn expected(model: &[(Work, ExtentRange, (u64, u64))]) -> Vec<Work> {
        let conflict =
            |a: &(Work, ExtentRange, (u64, u64)), b: &(Work, ExtentRange, (u64, u64))| match (a.0, b.0) {
                (Work::Write(_), Work::Write(_)) => a.2.0 < b.2.1 && b.2.0 < a.2.1,
                _ => a.1.overlaps(b.1),
            };
        let may_run =
            |index: &usize| model[..*index].iter().all(|earlier| !conflict(earlier, &model[*index]));
        (0..model.len()).filter(may_run).map(|index| model[index].0).collect()
    }

    #[test]
    fn what_runs_is_what_conflicts_with_nothing_earlier() {
        let mut state = 1;
        for round in 0..60 {
            let (mut queue, mut model, mut running) = (Queue::new(), Vec::new(), Vec::new());
            for id in 0..400 {
                let leaves = next(&mut state).is_multiple_of(2) && model.len() > (round % 30);
                if leaves {
                    let index = (next(&mut state) % model.len() as u64) as usize;
                    let (work, ..): (Work, _, _) = model.remove(index);
                    let slot = match work {
                        Work::Write(id) => queue.write_slot(id),
                        Work::Copy(id) | Work::Guard(id) => queue.other_slot(id),
                    };
                    queue.remove(slot.expect("it is in the queue"));
                    running.retain(|&other| other != work);
                } else {
                    let (work, extents, bytes) = some_work(&mut state, id);
                    queue.insert(work, extents, bytes);
                    model.push((work, extents, bytes));
                }
                while let Some(slot) = queue.next_ready() {
                    running.push(queue.entry(slot).work);
                }
                let expected = expected(&model);
                assert_eq!(running.len(), expected.len(), "{running:?} run, {expected:?} may");
                assert!(expected.iter().all(|work| running.contains(work)));
                check_holders(&queue, &model, (next(&mut state) % 620) as u32);
            }
        }
    }

    fn check_holders(queue: &Queue, model: &[(Work, ExtentRange, (u64, u64))], extent: u32) {
        let holders = || model.iter().filter(|(_, extents, _)| extents.contains(extent));
        let is_written = holders().all(|(work, ..)| matches!(work, Work::Write(_)));
        let expected = holders().map(|(_, extents, _)| extents.end()).max().map(|end| (end, is_written));
        assert_eq!(queue.holder(extent), expected);
        assert_eq!(
            queue.copies() as usize,
            model.iter().filter(|(work, ..)| matches!(work, Work::Copy(_))).count()
        );
    }
}

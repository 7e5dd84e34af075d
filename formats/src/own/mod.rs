//! Which sectors a differencing image has of its own: recorded ones as its metadata has them, and those whose payload is
//! written, but whose bits may not be written before that payload is durable.
//!
//! ```text
//!   wrote ──► waiting ── begin, sync, take ──► taken ── the codec writes the bits ── recorded ──► known from `load` alone
//!                ▲                               │
//!                └────────── give_back ──────────┘                  own to readers all the time, until clear
//! ```
//!
//! **What a codec has to keep to.**
//! * Each sync has a token of its own: no two calls of [`OwnSectors::begin`] have the same. Their order does not matter.
//! * `take` … `recorded` or `give_back` is one section under the codec's lock, and so is a change of a block together with
//!   its `clear`. `load` may take that lock: nothing is locked here while it runs.
//! * `recorded` and `clear` come after the change that `load` reads, or under the lock that `load` takes.
//! * `take` may return sectors of a block that lost its place meanwhile (a write that raced with a discard): they are not to
//!   be recorded, but to be cleared.
//! * A flush whose `take` finds nothing may still have to wait: another one may have taken its sectors and written their
//!   bits after this one's sync began. It is durable only when its sync began after the last bits were written.
#![allow(dead_code)]

mod pending;

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ImageError, NotesFile};
use pending::Pending;

/// Sectors of a page: bit `i` of word `w` of page `p` is sector `p * 4096 + 64 * w + i`.
pub(crate) const PAGE_SECTORS: u64 = 4096;
/// The bits of one page, 1 where the sector is the layer's own.
pub(crate) type PageBits = [u64; 64];
/// Reads a page as the image's metadata has it, recorded bits only, into an array of zeroes.
pub(crate) type Load<'a> = &'a dyn Fn(u64, &mut PageBits) -> Result<(), ImageError>;

/// How many pages to keep for a disk of any size.
pub(crate) const PAGES_MAX: usize = 20 << 10;
/// The most ranges that may be pending.
const PENDING_MAX: usize = 1 << 17;

/// What came of [`OwnSectors::wrote`].
#[derive(Debug)]
pub(crate) enum Wrote {
    /// All of it was own before.
    Already,
    /// It is own now, also after the death of the process (if there is a file for notes at all).
    Noted,
    /// It is own now, but could not be noted: the caller syncs and records at once.
    NotNoted(io::Error),
    /// Nothing was done: too much is pending. The caller syncs and records, and calls again.
    Crowded,
}

/// The own sectors of one image.
#[derive(Debug)]
pub(crate) struct OwnSectors {
    sectors: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pending: Pending,
    /// Loads that are under way: what changes meanwhile is put on top of what they bring.
    loads: Vec<LoadUnderWay>,
    next_load: u64,
}

#[derive(Debug)]
struct LoadUnderWay {
    id: u64,
    page: u64,
    set: PageBits,
    cleared: PageBits,
}

impl OwnSectors {
    pub(crate) fn new(
        sectors: u64,
        _pages_max: usize,
        _notes: Option<(NotesFile, [u8; 16])>,
    ) -> Result<Self, ImageError> {
        let state = State { pending: Pending::new(), loads: Vec::new(), next_load: 0 };
        Ok(Self { sectors, state: Mutex::new(state) })
    }

    /// The sectors that a killed process had noted; they are own, and pending.
    pub(crate) fn recovered(&self) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Calls `each` with the runs of `count` sectors from `first` on: their length, and whether they are own.
    pub(crate) fn runs(
        &self,
        first: u64,
        count: u64,
        load: Load,
        each: &mut dyn FnMut(u64, bool),
    ) -> Result<(), ImageError> {
        let (mut at, end) = (first, self.end_of(first, count));
        let (mut len, mut state) = (0, false);
        while at < end {
            let page = at / PAGE_SECTORS;
            let bits = self.page(page, load)?;
            let stop = end.min((page + 1) * PAGE_SECTORS);
            while at < stop {
                let own = bits[(at % PAGE_SECTORS / 64) as usize] >> (at % 64) & 1 == 1;
                if own != state && len > 0 {
                    each(len, state);
                    len = 0;
                }
                (len, state) = (len + 1, own);
                at += 1;
            }
        }
        if len > 0 {
            each(len, state);
        }
        Ok(())
    }

    /// Whether all of these sectors are own.
    pub(crate) fn are_own(&self, first: u64, count: u64, load: Load) -> Result<bool, ImageError> {
        let mut all = true;
        self.runs(first, count, load, &mut |_, own| all &= own)?;
        Ok(all)
    }

    /// Says that the payload of these sectors is in the file. What it answers is to be obeyed, see [`Wrote`].
    pub(crate) fn wrote(&self, first: u64, count: u64, load: Load) -> Result<Wrote, ImageError> {
        if self.are_own(first, count, load)? {
            return Ok(Wrote::Already);
        }
        let mut state = self.state();
        if state.pending.len() >= PENDING_MAX {
            return Ok(Wrote::Crowded);
        }
        state.pending.add(first..first + count);
        Ok(Wrote::Noted)
    }

    /// A sync is about to begin: what was written before belongs to it.
    pub(crate) fn begin(&self, token: u64) {
        let mut state = self.state();
        if state.pending.is_waiting() {
            state.pending.begin(token);
        }
    }

    /// What belongs to the sync of `token`, which has ended, or to an earlier one: sorted, disjoint, and to be recorded.
    pub(crate) fn take(&self, token: u64) -> Vec<Range<u64>> {
        self.state().pending.take(token)
    }

    /// The metadata has these now.
    pub(crate) fn recorded(&self, ranges: &[Range<u64>]) {
        let mut state = self.state();
        for range in ranges {
            state.pending.remove(range);
            for load in &mut state.loads {
                mark(&mut load.set, load.page, range, true);
                mark(&mut load.cleared, load.page, range, false);
            }
        }
    }

    /// These could not be recorded.
    pub(crate) fn give_back(&self, ranges: &[Range<u64>]) {
        let mut state = self.state();
        for range in ranges {
            state.pending.give_back(range);
        }
    }

    /// These are not own any longer, nor pending.
    pub(crate) fn clear(&self, first: u64, count: u64) {
        let range = first..self.end_of(first, count);
        let mut state = self.state();
        state.pending.remove(&range);
        for load in &mut state.loads {
            mark(&mut load.set, load.page, &range, false);
            mark(&mut load.cleared, load.page, &range, true);
        }
    }

    /// Whether anything is own and not recorded.
    pub(crate) fn has_pending(&self) -> bool {
        self.state().pending.len() > 0
    }

    /// Whether it is time to sync and record.
    pub(crate) fn is_crowded(&self) -> bool {
        self.state().pending.len() >= PENDING_MAX / 2
    }

    /// Empties the notes at a clean close.
    pub(crate) fn drop_notes(&self) -> Result<(), ImageError> {
        Ok(())
    }

    fn page(&self, page: u64, load: Load) -> Result<PageBits, ImageError> {
        let id = {
            let mut state = self.state();
            let id = state.next_load;
            state.next_load += 1;
            state.loads.push(LoadUnderWay { id, page, set: [0; 64], cleared: [0; 64] });
            id
        };
        let mut bits = [0; 64];
        let loaded = load(page, &mut bits);
        let mut state = self.state();
        let index = state.loads.iter().position(|l| l.id == id).expect("only this call ends its load");
        let changes = state.loads.swap_remove(index);
        loaded?;
        for (word, (set, cleared)) in bits.iter_mut().zip(changes.set.iter().zip(changes.cleared)) {
            *word = *word & !cleared | set;
        }
        let sectors = page * PAGE_SECTORS..(page + 1) * PAGE_SECTORS;
        state.pending.within(sectors, |range| mark(&mut bits, page, &range, true));
        Ok(bits)
    }

    fn end_of(&self, first: u64, count: u64) -> u64 {
        let end = first.checked_add(count).filter(|end| *end <= self.sectors);
        end.unwrap_or_else(|| panic!("{count} sectors from {first} on, of a disk of {}", self.sectors))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets or clears the bits of that part of `range` that lies in `page`.
fn mark(bits: &mut PageBits, page: u64, range: &Range<u64>, own: bool) {
    let base = page * PAGE_SECTORS;
    let (start, end) = (range.start.max(base), range.end.min(base + PAGE_SECTORS));
    let mut at = start;
    while at < end {
        let stop = end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
        let word = &mut bits[((at - base) / 64) as usize];
        *word = if own { *word | mask } else { *word & !mask };
        at = stop;
    }
}

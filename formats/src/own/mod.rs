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
//! * What [`OwnSectors::recovered`] gives is from before a kill, which may have come between a change of a block and its
//!   `clear`: sectors of blocks that keep no bits are to be cleared, not recorded.
//! * A flush whose `take` finds nothing may still have to wait: another one may have taken its sectors and written their
//!   bits after this one's sync began. It is durable only when its sync began after the last bits were written.
//!
//! **Who knows what.** [`pending`] is the truth about what is not recorded, the image's metadata about the rest; a page of
//! [`cache`] is both together, and can be given up at any time. Changes are made under one lock, and so is the end of a load,
//! which puts on top of what it brought what changed since it began. Readers of cached pages take no lock. [`notes`] are
//! written under the same lock, before the bits are seen: so what a reader has seen is not lost with the process, and notes
//! have the order of the changes. (The file system takes one writer of a file at a time anyway.)
//!
//! **Memory**, with [`PAGES_MAX`] pages: 10.6 MiB of pages (568 bytes each) and at most 3 MiB of pending ranges (5 MiB after a
//! recovery); less for disks that have fewer pages. With sectors of 512 bytes a page is 2 MiB of the disk, so 38 GiB of it are
//! in memory at a time.

mod cache;
mod notes;

mod pending;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ImageError, NotesFile};
use cache::{PageCache, Writer};
use notes::{Notes, Word};
use pending::Pending;

/// Sectors of a page: bit `i` of word `w` of page `p` is sector `p * 4096 + 64 * w + i`.
pub(crate) const PAGE_SECTORS: u64 = 4096;
/// The bits of one page, 1 where the sector is the layer's own.
pub(crate) type PageBits = [u64; 64];
/// Reads a page as the image's metadata has it, recorded bits only, into an array of zeroes.
pub(crate) type Load<'a> = &'a dyn Fn(u64, &mut PageBits) -> Result<(), ImageError>;

/// How many pages to keep of a disk of any size, see the module's documentation.
pub(crate) const PAGES_MAX: usize = 19 << 10;
/// The most ranges that may be pending: what they take as notes is half of a side, so that changing sides pays off.
const PENDING_MAX: usize = 1 << 16;
const _: () = assert!(PENDING_MAX as u64 * 2 <= notes::RECORDS_MAX);
/// How many ranges are dealt with before the lock is given up for a moment, since writes wait for it.
const RANGES_AT_ONCE: usize = 256;
/// No disk has more sectors (the largest VHDX has 64 TiB), so page numbers can be calculated with freely.
const SECTORS_MAX: u64 = 1 << 40;

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

/// The own sectors of one image. Ranges are in sectors of the disk, and must lie within it.
#[derive(Debug)]
pub(crate) struct OwnSectors {
    sectors: u64,
    cache: PageCache,
    state: Mutex<State>,
    signs: Signs,
}

/// What of the state is asked for without its lock. Written under the lock.
#[derive(Debug, Default)]
struct Signs {
    /// Something waits for a sync.
    waiting: AtomicBool,
    /// Something is not recorded.
    pending: AtomicBool,
    /// It is time to record.
    crowded: AtomicBool,
    /// Something is pending that is not noted. Set before its bits are seen, so that nobody takes such bits for noted.
    lossy: AtomicBool,
    /// One more than the last token, to find a codec that uses one twice.
    last_token: AtomicU64,
}

#[derive(Debug)]
struct State {
    writer: Writer,
    pending: Pending,
    notes: Option<Notes>,
    /// Loads that are under way.
    loads: Vec<LoadUnderWay>,
    next_load: u64,
}

/// A load that is under way, and what was recorded and cleared of its page since it began.
#[derive(Debug)]
struct LoadUnderWay {
    id: u64,
    page: u64,
    set: PageBits,
    cleared: PageBits,
}

impl OwnSectors {
    /// The own sectors of a disk of `sectors` sectors, of which `pages_max` pages (see [`PAGES_MAX`]) may be in memory.
    /// `notes` come with an id of the image: what a file says of another one is ignored.
    ///
    /// # Errors
    /// The notes file cannot be read. One that holds nothing of worth is no error.
    pub(crate) fn new(
        sectors: u64,
        pages_max: usize,
        notes: Option<(NotesFile, [u8; 16])>,
    ) -> Result<Self, ImageError> {
        assert!(sectors <= SECTORS_MAX, "a disk of {sectors} sectors");
        let mut pending = Pending::new();
        let notes = notes.map(|(file, image)| {
            Notes::open(file, image, sectors, |word, range| match word {
                Word::Own => pending.add(range),
                Word::NotOwn => pending.remove(&range),
            })
        });
        let notes = notes.transpose()?;
        let (cache, writer) = PageCache::new(sectors.div_ceil(PAGE_SECTORS), pages_max);
        let state = State { writer, pending, notes, loads: Vec::new(), next_load: 0 };
        let signs = Signs::default();
        signs.show(&state);
        Ok(Self { sectors, cache, state: Mutex::new(state), signs })
    }

    /// The sectors that a killed process had noted: sorted, disjoint, own, and pending. To be asked for before anything else,
    /// since whatever is pending is given.
    pub(crate) fn recovered(&self) -> Vec<Range<u64>> {
        self.state().pending.all()
    }

    /// Calls `each` with the runs of `count` sectors from `first` on: their length, and whether they are own.
    ///
    /// # Errors
    /// What `load` says.
    pub(crate) fn runs(
        &self,
        first: u64,
        count: u64,
        load: Load,
        each: &mut dyn FnMut(u64, bool),
    ) -> Result<(), ImageError> {
        let mut at = first;
        let end = self.range(first, count).end;
        let mut runs = Runs { each, len: 0, own: false };
        while at < end {
            let page = at / PAGE_SECTORS;
            let stop = end.min((page + 1) * PAGE_SECTORS);
            if let Some(cached) = self.cache.find(page) {
                while at < stop
                    && let Some(word) = cached.word(word_of(at))
                {
                    at = runs.word(at, stop, word);
                }
            }
            if at < stop {
                let bits = self.page(page, load)?;
                while at < stop {
                    at = runs.word(at, stop, bits[word_of(at)]);
                }
            }
        }
        runs.finish();
        Ok(())
    }

    /// Whether all of these sectors are own.
    ///
    /// # Errors
    /// What `load` says.
    pub(crate) fn are_own(&self, first: u64, count: u64, load: Load) -> Result<bool, ImageError> {
        let mut all = true;
        self.runs(first, count, load, &mut |_, own| all &= own)?;
        Ok(all)
    }

    /// Says that the payload of these sectors is in the file. What it answers is to be obeyed, see [`Wrote`].
    ///
    /// # Errors
    /// What `load` says; nothing is done then.
    pub(crate) fn wrote(&self, first: u64, count: u64, load: Load) -> Result<Wrote, ImageError> {
        let range = self.range(first, count);
        let all_own = self.are_own(first, count, load)?;
        if all_own && !self.signs.lossy.load(Ordering::Acquire) {
            return Ok(Wrote::Already);
        }
        let mut guard = self.state();
        let state = &mut *guard;
        if all_own && !state.pending.overlaps(&range) {
            return Ok(Wrote::Already);
        }
        if state.pending.len() >= PENDING_MAX {
            return Ok(Wrote::Crowded);
        }
        let noted = match &mut state.notes {
            Some(notes) => notes.add(Word::Own, &range, || state.pending.all()),
            None => Ok(()),
        };
        if noted.is_err() {
            self.signs.lossy.store(true, Ordering::Release);
        }
        // What of it is recorded already becomes pending with the rest: to record it again does no harm.
        state.pending.add(range.clone());
        self.cache.mark(&mut state.writer, &range, true);
        self.signs.show(state);
        Ok(noted.map_or_else(Wrote::NotNoted, |()| Wrote::Noted))
    }

    /// A sync is about to begin: what was written before belongs to it. Each has a `token` of its own.
    pub(crate) fn begin(&self, token: u64) {
        let before = self.signs.last_token.swap(token.wrapping_add(1), Ordering::Relaxed);
        assert!(before != token.wrapping_add(1) || before == 0, "two syncs in a row have the token {token}");
        // Who wrote before, and told us, has shown it.
        if self.signs.waiting.load(Ordering::Acquire) {
            self.state().pending.begin(token);
        }
    }

    /// What was written before the sync of `token`, which has ended, began: sorted, disjoint, and to be recorded. And what was
    /// given back.
    pub(crate) fn take(&self, token: u64) -> Vec<Range<u64>> {
        self.take_some(token, usize::MAX)
    }

    /// The first of what [`Self::take`] gives: about `ranges_max` ranges (joined where they touch), so that a codec that records
    /// a part at a time needs not give back the rest. To be called again until nothing comes.
    pub(crate) fn take_some(&self, token: u64, ranges_max: usize) -> Vec<Range<u64>> {
        assert!(ranges_max > 0, "to take nothing would look like the end");
        if !self.signs.waiting.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut state = self.state();
        let taken = state.pending.take(token, ranges_max);
        self.signs.show(&state);
        taken
    }

    /// The metadata has these now, and is with the kernel.
    pub(crate) fn recorded(&self, ranges: &[Range<u64>]) {
        for some in ranges.chunks(RANGES_AT_ONCE) {
            let state = &mut *self.state();
            for range in some {
                state.pending.remove(range);
                self.cache.mark(&mut state.writer, range, true);
                state.change_loads(range, true);
            }
        }
        let state = &mut *self.state();
        self.tidy_notes(state);
        self.signs.show(state);
    }

    /// These could not be recorded. Their payload stays durable, so the next [`Self::take`] has them, whatever its token.
    pub(crate) fn give_back(&self, ranges: &[Range<u64>]) {
        for some in ranges.chunks(RANGES_AT_ONCE) {
            let mut state = self.state();
            some.iter().for_each(|range| state.pending.give_back(range));
            self.signs.show(&state);
        }
    }

    /// These are not own any longer, nor pending.
    pub(crate) fn clear(&self, first: u64, count: u64) {
        let range = self.range(first, count);
        let mut guard = self.state();
        let state = &mut *guard;
        state.pending.remove(&range);
        self.cache.mark(&mut state.writer, &range, false);
        state.change_loads(&range, false);
        self.note_cleared(state, &range);
        self.signs.show(state);
    }

    /// Whether anything is own and not recorded.
    pub(crate) fn has_pending(&self) -> bool {
        self.signs.pending.load(Ordering::Acquire)
    }

    /// Whether it is time to sync and record: many ranges are pending, or some that could not be noted.
    pub(crate) fn is_crowded(&self) -> bool {
        self.signs.crowded.load(Ordering::Relaxed)
    }

    /// Empties the notes at a clean close. Where something is pending they are kept: they are all that tells of it.
    ///
    /// # Errors
    /// The file cannot be cut.
    pub(crate) fn drop_notes(&self) -> Result<(), ImageError> {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(notes) = &mut state.notes else { return Ok(()) };
        if state.pending.len() > 0 {
            tracing::warn!(
                "{} ranges of own sectors are not recorded; their notes stay",
                state.pending.len()
            );
            return Ok(());
        }
        notes.clear().map_err(|e| ImageError::io("emptying the notes file", e))
    }

    /// Drops notes that are not needed any longer, and notes again what could not be noted.
    fn tidy_notes(&self, state: &mut State) {
        let State { notes, pending, .. } = state;
        let lossy = self.signs.lossy.load(Ordering::Relaxed);
        let tidied = match notes {
            Some(notes) if lossy => notes.keep_only(&pending.all()),
            Some(notes) => notes.tidy(pending.len(), || pending.all()),
            None => Ok(()),
        };
        match tidied {
            // They may stay: what is recorded may be recovered again.
            Err(e) => tracing::warn!("dropping old notes: {e}"),
            Ok(()) if lossy => self.signs.lossy.store(false, Ordering::Release),
            Ok(()) => {}
        }
        if pending.len() == 0 {
            self.signs.lossy.store(false, Ordering::Release);
        }
    }

    /// Sees to it that notes of these sectors are not recovered.
    fn note_cleared(&self, state: &mut State, range: &Range<u64>) {
        let State { notes, pending, .. } = state;
        let Some(notes) = notes.as_mut().filter(|notes| notes.is_used()) else { return };
        let Err(e) = notes.add(Word::NotOwn, range, || pending.all()) else { return };
        tracing::warn!("noting that sectors are not own any longer: {e}");
        if notes.keep_only(&pending.all()).is_ok() {
            return;
        }
        // Better none than wrong ones. What is pending is safe again once it is recorded, which this asks for.
        if pending.len() > 0 {
            self.signs.lossy.store(true, Ordering::Release);
        }
        if let Err(e) = notes.keep_only(&[]) {
            tracing::warn!(
                "dropping the notes: {e}; if the process is killed now, discarded sectors are recovered"
            );
        }
    }

    /// A page that was not in memory a moment ago. Nothing is locked while it is loaded.
    fn page(&self, page: u64, load: Load) -> Result<PageBits, ImageError> {
        let id = {
            let mut state = self.state();
            if let Some(bits) = self.cache.get(&state.writer, page) {
                return Ok(bits);
            }
            state.begin_load(page)
        };
        let mut bits = [0; 64];
        let loaded = load(page, &mut bits);
        let mut guard = self.state();
        let state = &mut *guard;
        state.end_load(id, &mut bits);
        loaded?;
        if let Some(bits) = self.cache.get(&state.writer, page) {
            return Ok(bits);
        }
        let sectors = page * PAGE_SECTORS..(page + 1) * PAGE_SECTORS;
        state.pending.within(sectors, |range| mark(&mut bits, page, &range, true));
        self.cache.put(&mut state.writer, page, &bits);
        Ok(bits)
    }

    fn range(&self, first: u64, count: u64) -> Range<u64> {
        let end = first.checked_add(count).filter(|end| *end <= self.sectors);
        let end =
            end.unwrap_or_else(|| panic!("{count} sectors from {first} on, of a disk of {}", self.sectors));
        first..end
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Signs {
    /// Shows what became of the state, writing only what changed: these are read by all threads.
    fn show(&self, state: &State) {
        let len = state.pending.len();
        let crowded = len >= PENDING_MAX / 2 || self.lossy.load(Ordering::Relaxed);
        let signs =
            [(&self.waiting, state.pending.is_waiting()), (&self.pending, len > 0), (&self.crowded, crowded)];
        for (sign, now) in signs {
            if sign.load(Ordering::Relaxed) != now {
                sign.store(now, Ordering::Release);
            }
        }
    }
}

impl State {
    fn begin_load(&mut self, page: u64) -> u64 {
        let id = self.next_load;
        self.next_load += 1;
        self.loads.push(LoadUnderWay { id, page, set: [0; 64], cleared: [0; 64] });
        id
    }

    /// Puts what changed meanwhile on top of what was loaded. It does not matter whether the load has seen it: these changes
    /// are later than anything else that it can have seen.
    fn end_load(&mut self, id: u64, bits: &mut PageBits) {
        let index = self.loads.iter().position(|load| load.id == id);
        let load = self.loads.swap_remove(index.expect("only its own thread ends a load"));
        for (word, (set, cleared)) in bits.iter_mut().zip(load.set.iter().zip(load.cleared)) {
            *word = *word & !cleared | set;
        }
    }

    fn change_loads(&mut self, range: &Range<u64>, own: bool) {
        for load in &mut self.loads {
            mark(&mut load.set, load.page, range, own);
            mark(&mut load.cleared, load.page, range, !own);
        }
    }
}

/// Joins the bits of words to runs.
struct Runs<'a> {
    each: &'a mut dyn FnMut(u64, bool),
    len: u64,
    own: bool,
}

impl Runs<'_> {
    /// Takes the sectors from `at` on that `word` has, up to `stop`; returns where it stopped.
    fn word(&mut self, mut at: u64, stop: u64, word: u64) -> u64 {
        let stop = stop.min((at / 64 + 1) * 64);
        while at < stop {
            let rest = word >> (at % 64);
            let own = rest & 1 == 1;
            let same = if own { rest.trailing_ones() } else { rest.trailing_zeros() };
            let len = u64::from(same).min(stop - at);
            if own != self.own {
                self.finish();
                self.own = own;
            }
            self.len += len;
            at += len;
        }
        at
    }

    fn finish(&mut self) {
        if self.len > 0 {
            (self.each)(self.len, self.own);
            self.len = 0;
        }
    }
}

/// Which word of its page a sector is in.
fn word_of(sector: u64) -> usize {
    (sector % PAGE_SECTORS / 64) as usize
}

/// Calls `each` with the words of `page` that `range` touches, and the bits of it in them.
fn each_mask(page: u64, range: &Range<u64>, mut each: impl FnMut(usize, u64)) {
    let base = page * PAGE_SECTORS;
    let (mut at, end) = (range.start.max(base), range.end.min(base + PAGE_SECTORS));
    while at < end {
        let stop = end.min((at / 64 + 1) * 64);
        each(word_of(at), (u64::MAX >> (64 - (stop - at))) << (at % 64));
        at = stop;
    }
}

/// Sets or clears the bits of that part of `range` that lies in `page`.
fn mark(bits: &mut PageBits, page: u64, range: &Range<u64>, own: bool) {
    each_mask(page, range, |word, mask| {
        bits[word] = if own { bits[word] | mask } else { bits[word] & !mask };
    });
}

//! Pages of the block allocation table in memory: bounded, and read without a lock.
//!
//! A page is in a *frame*: memory that is taken when it is first needed, never given back, and used for one page after another.
//! From the moment when a page is put into a frame until it is given up again is a *stay*, and each stay has a number of its
//! own. For each page of the table one atomic word says in which frame it stays, and the number of the stay; 0: in none.
//!
//! **Readers** take that word, then the entry from the frame, then look whether the word is still the same. It is set to
//! another value before anything else is put into the frame, and never has an old value again, so an entry that belongs to
//! another page, or to a later stay, is never taken for this one. They write nothing but the frame's mark of use, once.
//!
//! **Whoever moves pages** holds the keeper's lock, for work in memory only. A page is read from the file without it; what was
//! read may be old by the time it is put into a frame, if meanwhile the page was read by somebody else, changed, its change
//! applied, and the page given up again. Between change and application a page is pinned, and the keeper counts how often
//! pages were released from that: where the count is as it was before the reading, what was read is what the file says.
//!
//! **Pinned pages** have changes that their place in the file does not have, or are about to. They stay, whatever the limit is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::log_entry::SECTOR_LEN;
use super::log_writer::USED_MAX;
use crate::ImageError;

/// Entries of one page of 4 KiB: what one log sector carries.
pub(super) const PAGE_ENTRIES: u64 = 512;

/// The entries of a page, as they are in the file.
pub(super) type Entries = [u64; PAGE_ENTRIES as usize];
type Words = [AtomicU64; PAGE_ENTRIES as usize];

/// Pages that may be pinned at once: each of them is in an entry of the log that was not applied yet.
const PINNED_MAX: usize = (USED_MAX / SECTOR_LEN) as usize;
/// The lower bits of a stay say in which frame it is, the others which one it is.
const FRAME_BITS: u32 = 16;

/// The pages that are in memory.
#[derive(Debug)]
pub(super) struct Pages {
    /// The stay of each page of the table, or 0.
    stays: Box<[AtomicU64]>,
    frames: Box<[Frame]>,
    /// So many pages are kept, but for those that are pinned.
    pages_max: usize,
    keeper: Mutex<Keeper>,
}

#[derive(Debug, Default)]
struct Frame {
    /// Read since the hand went by.
    used: AtomicBool,
    words: OnceLock<Box<Words>>,
}

/// What only the one who moves pages needs to know.
#[derive(Debug, Default)]
struct Keeper {
    /// What is in each frame whose memory was taken.
    taken: Vec<Option<Guest>>,
    /// The frames among them that hold nothing.
    free: Vec<usize>,
    /// The frame that is looked at next when one is to be given up.
    hand: usize,
    /// Counts stays.
    stays: u64,
    /// Counts how often pages were released.
    releases: u64,
}

#[derive(Debug, Clone, Copy)]
struct Guest {
    page: u64,
    pinned: bool,
}

impl Pages {
    /// Of a table of `pages` pages, of which `pages_max` (at least 1, at most 65536) may be in memory without being pinned.
    pub(super) fn new(pages: u64, pages_max: usize) -> Self {
        let pages = usize::try_from(pages).expect("a table of 131105 pages is the largest");
        let frames = pages.min(pages_max.max(PINNED_MAX + 1));
        assert!(pages_max >= 1 && frames <= 1 << FRAME_BITS, "{pages_max} pages are out of range");
        Self {
            stays: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
            pages_max,
            keeper: Mutex::default(),
        }
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An entry of a page that is in memory. Takes no lock.
    pub(super) fn find(&self, page: u64, index: usize) -> Option<u64> {
        let stay = &self.stays[page as usize];
        // Acquire: pairs with the end of `put_in`, so that what is read from the frame is of this stay, or later.
        let seen = stay.load(Ordering::Acquire);
        if seen == 0 {
            return None;
        }
        let frame = &self.frames[frame_of(seen)];
        // Acquire: whoever sees a new place also sees that its log entry was written before. And if the entry is one of a
        // later stay, this pairs with the fence in `put_in`, and the end of this stay is seen below.
        let entry = frame.words.get()?[index].load(Ordering::Acquire);
        if stay.load(Ordering::Relaxed) != seen {
            return None;
        }
        if !frame.used.load(Ordering::Relaxed) {
            frame.used.store(true, Ordering::Relaxed);
        }
        Some(entry)
    }

    /// An entry of a page, which `read` reads from its place where it is not in memory.
    #[cold]
    pub(super) fn entry(
        &self,
        page: u64,
        index: usize,
        read: &dyn Fn() -> Result<Entries, ImageError>,
    ) -> Result<u64, ImageError> {
        self.with(page, read, |_, frame| self.words(frame)[index].load(Ordering::Acquire))
    }

    /// Has a page in memory until it is released. Nothing changes if it fails. Doing it again does nothing.
    pub(super) fn pin(
        &self,
        page: u64,
        read: &dyn Fn() -> Result<Entries, ImageError>,
    ) -> Result<(), ImageError> {
        self.with(page, read, |keeper, frame| {
            keeper.taken[frame].as_mut().expect("it holds the page").pinned = true;
        })
    }

    /// The entries of a page that is pinned.
    pub(super) fn pinned(&self, page: u64) -> Entries {
        let keeper = self.keeper();
        let words = self.words(self.pinned_frame(&keeper, page));
        std::array::from_fn(|i| words[i].load(Ordering::Acquire))
    }

    /// Changes an entry of a page that is pinned.
    pub(super) fn store(&self, page: u64, index: usize, entry: u64) {
        let keeper = self.keeper();
        self.words(self.pinned_frame(&keeper, page))[index].store(entry, Ordering::Release);
    }

    /// Says that pages that were pinned are in their places as they are in memory.
    pub(super) fn release(&self, pages: impl IntoIterator<Item = u64>) {
        let mut keeper = self.keeper();
        keeper.releases += 1;
        for page in pages {
            let frame = self.pinned_frame(&keeper, page);
            if keeper.taken.len() - keeper.free.len() > self.pages_max {
                self.give_up(&mut keeper, frame);
                keeper.free.push(frame);
            } else {
                keeper.taken[frame] = Some(Guest { page, pinned: false });
            }
        }
    }

    /// Calls `then` with the frame that the page is in, under the keeper's lock.
    fn with<T>(
        &self,
        page: u64,
        read: &dyn Fn() -> Result<Entries, ImageError>,
        then: impl FnOnce(&mut Keeper, usize) -> T,
    ) -> Result<T, ImageError> {
        let mut found = None;
        loop {
            let mut keeper = self.keeper();
            if let Some(frame) = self.frame(&keeper, page) {
                return Ok(then(&mut keeper, frame));
            }
            if let Some((releases, entries)) = found
                && releases == keeper.releases
            {
                let frame = self.put_in(&mut keeper, page, &entries?);
                return Ok(then(&mut keeper, frame));
            }
            let releases = keeper.releases;
            drop(keeper);
            found = Some((releases, read()));
        }
    }

    /// The frame of a page.
    fn frame(&self, _: &Keeper, page: u64) -> Option<usize> {
        // Changes only under the lock.
        let stay = self.stays[page as usize].load(Ordering::Relaxed);
        (stay != 0).then(|| frame_of(stay))
    }

    fn pinned_frame(&self, keeper: &Keeper, page: u64) -> usize {
        let frame =
            self.frame(keeper, page).filter(|frame| keeper.taken[*frame].is_some_and(|guest| guest.pinned));
        frame.expect("a page is pinned as long as it is changed")
    }

    fn words(&self, frame: usize) -> &Words {
        self.frames[frame].words.get().expect("a frame that was taken has its memory")
    }

    /// Puts a page that is in no frame into one.
    fn put_in(&self, keeper: &mut Keeper, page: u64, entries: &Entries) -> usize {
        let frame = self.empty_frame(keeper);
        let Frame { used, words } = &self.frames[frame];
        let words = words.get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        // What follows is not seen before the end of the stay that was there, see `find`.
        fence(Ordering::Release);
        for (word, entry) in words.iter().zip(entries) {
            word.store(*entry, Ordering::Relaxed);
        }
        // Not before it is read again does it count more than a page that comes after it.
        used.store(false, Ordering::Relaxed);
        keeper.taken[frame] = Some(Guest { page, pinned: false });
        keeper.stays += 1;
        assert!(keeper.stays < 1 << (u64::BITS - FRAME_BITS), "there were 2^48 stays");
        let stay = keeper.stays << FRAME_BITS | frame as u64;
        self.stays[page as usize].store(stay, Ordering::Release);
        frame
    }

    /// A frame that holds nothing: a new one below the limit, else that of a page which is given up. If all are pinned, it is
    /// a new one beyond the limit.
    fn empty_frame(&self, keeper: &mut Keeper) -> usize {
        if keeper.taken.len() - keeper.free.len() >= self.pages_max
            && let Some(frame) = self.least_used(keeper)
        {
            keeper.hand = frame + 1;
            self.give_up(keeper, frame);
            return frame;
        }
        keeper.free.pop().unwrap_or_else(|| {
            let frame = keeper.taken.len();
            assert!(frame < self.frames.len(), "no more pages are pinned than fit the log");
            keeper.taken.push(None);
            frame
        })
    }

    /// The first frame from the hand on whose page was not used lately; after one round all have been passed.
    fn least_used(&self, keeper: &Keeper) -> Option<usize> {
        let frames = keeper.taken.len();
        let mut unpinned = (keeper.hand..frames)
            .chain(0..keeper.hand.min(frames))
            .filter(|frame| keeper.taken[*frame].is_some_and(|guest| !guest.pinned));
        let first = unpinned.clone().next();
        unpinned.find(|frame| !self.frames[*frame].used.swap(false, Ordering::Relaxed)).or(first)
    }

    /// Ends the stay of the page in a frame.
    fn give_up(&self, keeper: &mut Keeper, frame: usize) {
        let guest = keeper.taken[frame].take().expect("a frame that holds a page");
        self.stays[guest.page as usize].store(0, Ordering::Relaxed);
    }

    /// Pages that are in memory, and how many of them are pinned.
    #[cfg(test)]
    pub(super) fn count(&self) -> (usize, usize) {
        let keeper = self.keeper();
        let guests = keeper.taken.iter().flatten();
        (guests.clone().count(), guests.filter(|guest| guest.pinned).count())
    }
}

fn frame_of(stay: u64) -> usize {
    (stay & ((1 << FRAME_BITS) - 1)) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread::yield_now;

    use super::*;
    use crate::ErrorKind;

    /// Entry `index` of a page in its version `version`: no other entry is ever the same.
    fn raw(page: u64, index: usize, version: u64) -> u64 {
        version << 32 | page << 16 | index as u64
    }

    fn first(page: u64) -> Entries {
        std::array::from_fn(|i| raw(page, i, 0))
    }

    fn never() -> Result<Entries, ImageError> {
        panic!("it is in memory")
    }

    /// As good as any for choosing what to do next (xorshift).
    struct Random(u64);

    impl Random {
        fn new(seed: u64) -> Self {
            Self((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
        }

        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) % n
        }
    }

    /// The table in the file. A page is written and read in two halves, between which anything may happen.
    struct File(Vec<[Mutex<[u64; 256]>; 2]>);

    impl File {
        fn new(pages: u64) -> Self {
            let half = |page, half: usize| std::array::from_fn(|i| raw(page, half * 256 + i, 0));
            Self((0..pages).map(|page| [0, 1].map(|n| Mutex::new(half(page, n)))).collect())
        }

        fn half(&self, page: u64, half: usize) -> MutexGuard<'_, [u64; 256]> {
            self.0[page as usize][half].lock().expect("no test panics while it holds a half")
        }

        fn read(&self, page: u64, meanwhile: impl Fn()) -> Entries {
            let mut entries = [0; 512];
            entries[..256].copy_from_slice(&*self.half(page, 0));
            meanwhile();
            entries[256..].copy_from_slice(&*self.half(page, 1));
            entries
        }

        fn write(&self, page: u64, entries: &Entries, meanwhile: impl Fn()) {
            self.half(page, 0).copy_from_slice(&entries[..256]);
            meanwhile();
            self.half(page, 1).copy_from_slice(&entries[256..]);
        }
    }

    #[test]
    fn a_small_table_stays_as_a_whole_and_is_read_once() {
        let pages = Pages::new(20, 20);
        for round in 0..3 {
            for page in 0..20 {
                assert_eq!(pages.find(page, 7).is_some(), round > 0);
                let read = || if round == 0 { Ok(first(page)) } else { never() };
                assert_eq!(pages.entry(page, 7, &read).expect("it can be read"), raw(page, 7, 0));
            }
        }
        assert_eq!(pages.count(), (20, 0));
    }

    #[test]
    fn no_more_pages_stay_than_the_limit_but_for_those_that_are_pinned() {
        let pages = Pages::new(100, 4);
        for page in 0..50 {
            pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
        }
        assert_eq!(pages.count(), (4, 0));
        for page in 0..10 {
            pages.pin(page, &|| Ok(first(page))).expect("it can be read");
            pages.store(page, 1, raw(page, 1, 1));
        }
        for page in 10..50 {
            pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
        }
        let (all, pinned) = pages.count();
        assert!(pinned == 10 && (10..=11).contains(&all), "{all} pages");
        (0..10).for_each(|page| assert_eq!(pages.find(page, 1), Some(raw(page, 1, 1))));
        pages.release(0..10);
        assert_eq!(pages.count(), (4, 0));
    }

    #[test]
    fn a_page_that_is_read_again_and_again_stays() {
        let pages = Pages::new(1000, 8);
        pages.entry(3, 0, &|| Ok(first(3))).expect("it can be read");
        for page in 100..300 {
            assert!(pages.find(3, 5).is_some(), "before page {page}");
            pages.entry(page, 0, &|| Ok(first(page))).expect("it can be read");
        }
    }

    #[test]
    fn a_page_that_cannot_be_read_leaves_everything_as_it_was() {
        let pages = Pages::new(10, 2);
        let fails = || Err(ImageError::new(ErrorKind::Io, "the disk is gone"));
        pages.entry(1, 0, &|| Ok(first(1))).expect("it can be read");
        assert!(pages.entry(2, 0, &fails).is_err() && pages.pin(3, &fails).is_err());
        assert_eq!((pages.count(), pages.find(1, 9)), ((1, 0), Some(raw(1, 9, 0))));
        pages.entry(2, 0, &|| Ok(first(2))).expect("it can be read");
    }

    /// What was read from the file before a change that meanwhile was made, applied and forgotten is not taken for the page.
    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let pages = Pages::new(10, 1);
        let reads = AtomicU64::new(0);
        let read = || {
            if reads.fetch_add(1, Ordering::Relaxed) > 0 {
                let mut entries = first(0);
                entries[4] = raw(0, 4, 1);
                return Ok(entries);
            }
            pages.pin(0, &|| Ok(first(0)))?;
            pages.store(0, 4, raw(0, 4, 1));
            pages.release([0]);
            pages.entry(1, 0, &|| Ok(first(1)))?;
            assert_eq!(pages.find(0, 4), None, "it was given up");
            Ok(first(0))
        };
        assert_eq!(pages.entry(0, 4, &read).expect("it can be read"), raw(0, 4, 1));
        assert_eq!(reads.load(Ordering::Relaxed), 2);
    }

    /// Changes as the log makes them, compared with a plain table.
    fn random_life(seed: u64, count: u64, pages_max: usize) {
        let mut random = Random::new(seed);
        let (pages, file) = (Pages::new(count, pages_max), File::new(count));
        let mut table: Vec<Entries> = (0..count).map(first).collect();
        let mut dirty = BTreeSet::new();
        for version in 1..4000 {
            let (page, index) = (random.below(count), random.below(512) as usize);
            match random.below(20) {
                0..12 => {
                    let entry = pages
                        .find(page, index)
                        .map_or_else(|| pages.entry(page, index, &|| Ok(file.read(page, || ()))), Ok);
                    assert_eq!(entry.expect("it can be read"), table[page as usize][index], "seed {seed}");
                }
                12 => {
                    let read = || Err(ImageError::new(ErrorKind::Io, "not now"));
                    if pages.pin(page, &read).is_ok() && !dirty.contains(&page) {
                        pages.release([page]);
                    }
                }
                13 => {
                    // Not written to the log after all.
                    pages.pin(page, &|| Ok(file.read(page, || ()))).expect("it can be read");
                    pages.release(Some(page).filter(|page| !dirty.contains(page)));
                }
                14..18 => {
                    pages.pin(page, &|| Ok(file.read(page, || ()))).expect("it can be read");
                    assert_eq!(pages.pinned(page), table[page as usize], "seed {seed}");
                    table[page as usize][index] = raw(page, index, version);
                    dirty.insert(page);
                    pages.store(page, index, raw(page, index, version));
                }
                18 => {
                    let some: Vec<u64> = dirty.iter().copied().filter(|_| random.below(3) > 0).collect();
                    for page in &some {
                        file.write(*page, &pages.pinned(*page), || ());
                        dirty.remove(page);
                    }
                    pages.release(some);
                }
                _ => {
                    let (all, pinned) = pages.count();
                    assert!(
                        pinned == dirty.len() && all <= pages_max.max(pinned + 1),
                        "{all}, {pinned} pinned"
                    );
                }
            }
        }
    }

    #[test]
    fn random_lives_agree_with_a_plain_table() {
        for seed in 0..40 {
            for (count, pages_max) in [(40, 1), (40, 3), (60, 16), (8, 8), (300, 7)] {
                random_life(seed, count, pages_max);
            }
        }
    }

    /// The versions of entries that are done, and those that are begun, by page and index.
    struct Versions([Vec<[AtomicU64; 512]>; 2]);

    impl Versions {
        fn new(count: u64) -> Self {
            Self([0, 1].map(|_| (0..count).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect()))
        }

        fn of(&self, kind: usize, page: u64, index: usize) -> &AtomicU64 {
            &self.0[kind][page as usize][index]
        }
    }

    const DONE: usize = 0;
    const BEGUN: usize = 1;
    /// Entries of a page that are looked at: some in each half.
    const LOOKED_AT: [usize; 4] = [0, 100, 300, 511];

    /// What threads that race share.
    struct Race {
        count: u64,
        pages: Pages,
        file: File,
        versions: Versions,
        seen: AtomicU64,
        ended: AtomicBool,
    }

    /// Whoever ends, or panics, ends the race.
    struct EndsAll<'a>(&'a AtomicBool);

    impl Drop for EndsAll<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn read_all_the_time(seed: u64, race: &Race) {
        let Race { count, pages, file, versions, seen, ended } = race;
        let _all = EndsAll(ended);
        let mut random = Random::new(seed);
        let mut last = vec![[0; 4]; *count as usize];
        while !ended.load(Ordering::Relaxed) {
            let (page, n) = (random.below(*count), random.below(4) as usize);
            let (index, slow) = (LOOKED_AT[n], random.below(4) == 0);
            let done = versions.of(DONE, page, index).load(Ordering::Acquire);
            let read = || {
                Ok(file.read(page, || {
                    if slow {
                        yield_now()
                    }
                }))
            };
            let entry = pages.find(page, index).map_or_else(|| pages.entry(page, index, &read), Ok);
            let entry = entry.expect("it can be read");
            let begun = versions.of(BEGUN, page, index).load(Ordering::Acquire);
            let version = entry >> 32;
            assert_eq!(entry, raw(page, index, version), "an entry of its own");
            assert!((done..=begun).contains(&version), "{version} is none of {done}..={begun}");
            let last = &mut last[page as usize][n];
            assert!(version >= *last, "{version} after {last}");
            *last = version;
            if random.below(100) == 0 {
                seen.fetch_add(100, Ordering::Relaxed);
                yield_now();
            }
        }
    }

    /// How many changes it made.
    fn change_all_the_time(seed: u64, race: &Race) -> u64 {
        let Race { count, pages, file, versions, seen, ended } = race;
        let _all = EndsAll(ended);
        let mut random = Random::new(seed);
        let mut dirty = BTreeSet::new();
        let (mut version, mut rounds) = (0, 0);
        while (rounds < 300 || seen.load(Ordering::Relaxed) < 5000) && !ended.load(Ordering::Relaxed) {
            for _ in 0..=random.below(6) {
                let (page, index) = (random.below(*count), LOOKED_AT[random.below(4) as usize]);
                pages.pin(page, &|| Ok(file.read(page, yield_now))).expect("it can be read");
                version += 1;
                versions.of(BEGUN, page, index).store(version, Ordering::Release);
                pages.store(page, index, raw(page, index, version));
                versions.of(DONE, page, index).store(version, Ordering::Release);
                dirty.insert(page);
            }
            if random.below(3) > 0 {
                dirty.iter().for_each(|page| file.write(*page, &pages.pinned(*page), yield_now));
                pages.release(std::mem::take(&mut dirty));
            }
            rounds += 1;
        }
        version
    }

    fn race(seed: u64, count: u64, pages_max: usize) {
        let race = &Race {
            count,
            pages: Pages::new(count, pages_max),
            file: File::new(count),
            versions: Versions::new(count),
            seen: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        };
        std::thread::scope(|scope| {
            let readers = [1, 2, 3].map(|n| scope.spawn(move || read_all_the_time(seed << 8 | n, race)));
            let version = scope.spawn(move || change_all_the_time(seed, race)).join();
            readers.into_iter().for_each(|reader| reader.join().expect("a reader found nothing wrong"));
            let (version, seen) = (version.expect("all pages stayed"), race.seen.load(Ordering::Relaxed));
            println!(
                "seed {seed}: {count} pages, {pages_max} in memory: {version} changes, {seen} entries read"
            );
        });
    }

    #[test]
    fn readers_see_what_was_done_and_nothing_older_while_pages_come_and_go() {
        for seed in 0..6 {
            for (count, pages_max) in [(3, 1), (12, 4), (64, 8)] {
                race(seed, count, pages_max);
            }
        }
    }
}

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
mod tests;

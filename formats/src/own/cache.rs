//! Pages of bits in memory, bounded, read without a lock.
//!
//! A set-associative table: page `p` may be in any of the [`WAYS`] ways of set `p % sets`. A way's memory is taken with
//! its first page and then kept. Whoever changes anything holds the [`Writer`], so there is one writer at a time; readers take
//! nothing and check afterwards:
//!
//! * A way that changes its *page* is a sequence lock. Its version is odd meanwhile, and rises by 2 in all. A word counts only
//!   if the version was even before it was read and is the same after it: the page was in the way all the time.
//! * The *bits* of a page change in place, under the same version. A reader sees each bit as it was before or after, and who
//!   learned that the change is done (through a lock, a queue, the guest) sees it after: changes of one atomic are seen in
//!   one order by everyone.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::{PAGE_SECTORS, PageBits};

/// Pages that share a set. Their tags are one cache line.
const WAYS: usize = 8;

type Words = [AtomicU64; 64];

/// The pages that are in memory.
#[derive(Debug)]
pub(super) struct PageCache {
    sets: Box<[Set]>,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Page + 1, or 0 where there is none. A hint, until the version confirms it.
    tags: [AtomicU64; WAYS],
    /// Odd while the page of the way changes.
    versions: [AtomicU64; WAYS],
    /// Read since the hand went by.
    used: [AtomicBool; WAYS],
    words: [OnceLock<Box<Words>>; WAYS],
}

/// The right to change a [`PageCache`], of which there is one.
#[derive(Debug)]
pub(super) struct Writer {
    /// The way of each set that is looked at next when one is to be given up.
    hands: Box<[u8]>,
}

/// A page that was found.
pub(super) struct Cached<'a> {
    words: &'a Words,
    version: &'a AtomicU64,
    seen: u64,
}

impl Cached<'_> {
    /// Word `index` of the page; `None` when the way has another page by now.
    pub(super) fn word(&self, index: usize) -> Option<u64> {
        let word = self.words[index].load(Ordering::Relaxed);
        // If the word is one of a later page, this fence pairs with the one in `put`, and the version is seen as changed.
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == self.seen).then_some(word)
    }
}

impl PageCache {
    /// Room for `pages_max` pages (in whole sets, so up to 7 more), but for no more than the `pages` that there are.
    pub(super) fn new(pages: u64, pages_max: usize) -> (Self, Writer) {
        let room = usize::try_from(pages).unwrap_or(usize::MAX).min(pages_max).max(1);
        let sets: Box<[Set]> = (0..room.div_ceil(WAYS)).map(|_| Set::default()).collect();
        let hands = vec![0; sets.len()].into();
        (Self { sets }, Writer { hands })
    }

    fn set_of(&self, page: u64) -> usize {
        (page % self.sets.len() as u64) as usize
    }

    /// Finds a page for reading.
    pub(super) fn find(&self, page: u64) -> Option<Cached<'_>> {
        let set = &self.sets[self.set_of(page)];
        let way = set.tags.iter().position(|tag| tag.load(Ordering::Relaxed) == page + 1)?;
        let version = &set.versions[way];
        // Pairs with the release at the end of `put`: tag and words are at least those of this version.
        let seen = version.load(Ordering::Acquire);
        if seen % 2 == 1 || set.tags[way].load(Ordering::Relaxed) != page + 1 {
            return None;
        }
        if !set.used[way].load(Ordering::Relaxed) {
            set.used[way].store(true, Ordering::Relaxed);
        }
        Some(Cached { words: set.words[way].get()?, version, seen })
    }

    /// A page as it is, nothing changing meanwhile.
    pub(super) fn get(&self, _: &Writer, page: u64) -> Option<PageBits> {
        let words = self.words(page)?;
        Some(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
    }

    /// Puts a page in that is not there, in place of another where the set is full.
    pub(super) fn put(&self, writer: &mut Writer, page: u64, bits: &PageBits) {
        assert!(self.words(page).is_none(), "page {page} is there already");
        let index = self.set_of(page);
        let set = &self.sets[index];
        let way = set.free_way().unwrap_or_else(|| set.give_up(&mut writer.hands[index]));
        let words = set.words[way].get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        let version = set.versions[way].load(Ordering::Relaxed);
        set.versions[way].store(version + 1, Ordering::Relaxed);
        // What follows is not seen before the odd version is, see `Cached::word`.
        fence(Ordering::Release);
        set.tags[way].store(page + 1, Ordering::Relaxed);
        for (word, bits) in words.iter().zip(bits) {
            word.store(*bits, Ordering::Relaxed);
        }
        set.used[way].store(true, Ordering::Relaxed);
        set.versions[way].store(version + 2, Ordering::Release);
    }

    /// Sets or clears the bits of `range`, where its pages are in memory.
    pub(super) fn mark(&self, _: &mut Writer, range: &Range<u64>, own: bool) {
        for page in range.start / PAGE_SECTORS..range.end.div_ceil(PAGE_SECTORS) {
            let Some(words) = self.words(page) else { continue };
            super::each_mask(page, range, |index, mask| {
                // The only writer: nothing is lost between the load and the store.
                let old = words[index].load(Ordering::Relaxed);
                // Release: who sees the bit also sees what was done before it was set.
                words[index].store(if own { old | mask } else { old & !mask }, Ordering::Release);
            });
        }
    }

    /// Only for who holds the writer: nobody else changes a tag.
    fn words(&self, page: u64) -> Option<&Words> {
        let set = &self.sets[self.set_of(page)];
        let way = set.tags.iter().position(|tag| tag.load(Ordering::Relaxed) == page + 1)?;
        set.words[way].get().map(|words| &**words)
    }
}

impl Set {
    fn free_way(&self) -> Option<usize> {
        self.tags.iter().position(|tag| tag.load(Ordering::Relaxed) == 0)
    }

    /// The first way from the hand on that was not used lately; after one round all have been passed.
    fn give_up(&self, hand: &mut u8) -> usize {
        for _ in 0..WAYS {
            let way = usize::from(*hand);
            *hand = (*hand + 1) % WAYS as u8;
            if !self.used[way].swap(false, Ordering::Relaxed) {
                return way;
            }
        }
        usize::from(*hand)
    }
}

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

/// With its share of the set, and what an allocator adds.
const BYTES_OF_A_PAGE: usize = size_of::<Words>() + size_of::<Set>() / WAYS + 16;
const _: () = assert!(super::PAGES_MAX * BYTES_OF_A_PAGE <= 11 << 20, "what the documentation says");

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
        // Not before it is read again does it count more than a page that comes after it.
        set.used[way].store(false, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A page's bits that tell which page it is.
    fn bits_of(page: u64) -> PageBits {
        std::array::from_fn(|i| page << 8 | i as u64)
    }

    #[test]
    fn a_page_that_is_given_up_is_read_no_more() {
        let (cache, mut writer) = PageCache::new(100, WAYS);
        for page in 0..WAYS as u64 {
            cache.put(&mut writer, page, &bits_of(page));
        }
        let found: Vec<_> = (0..WAYS as u64).filter_map(|page| cache.find(page)).collect();
        assert!((0..WAYS).all(|page| found[page].word(5) == Some(bits_of(page as u64)[5])));
        cache.put(&mut writer, 50, &bits_of(50));
        let gone: Vec<_> = (0..WAYS).filter(|page| found[*page].word(5).is_none()).collect();
        assert_eq!(gone.len(), 1, "one makes room");
        assert!(cache.find(gone[0] as u64).is_none() && cache.get(&writer, gone[0] as u64).is_none());
        assert_eq!(cache.get(&writer, 50), Some(bits_of(50)));
    }

    #[test]
    fn pages_that_are_read_again_and_again_stay() {
        let (cache, mut writer) = PageCache::new(1000, WAYS);
        cache.put(&mut writer, 3, &bits_of(3));
        for page in 100..200 {
            assert!(cache.find(3).is_some(), "before page {page}");
            cache.put(&mut writer, page, &bits_of(page));
        }
    }

    #[test]
    fn every_page_of_a_small_disk_has_its_place() {
        let (cache, mut writer) = PageCache::new(21, 1 << 20);
        assert_eq!(cache.sets.len(), 3);
        (0..21).for_each(|page| cache.put(&mut writer, page, &bits_of(page)));
        assert!((0..21).all(|page| cache.find(page).is_some()));
    }

    #[test]
    fn readers_never_see_a_word_of_another_page() {
        let (cache, mut writer) = PageCache::new(64, WAYS);
        let (cache, start) = (&cache, std::time::Instant::now());
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers = [0, 1, 2].map(|first| {
                let ended = &ended;
                scope.spawn(move || {
                    let (mut page, mut seen, mut lost) = (first, 0u64, 0u64);
                    while !ended.load(Ordering::Relaxed) {
                        page = (page + 7) % 64;
                        let Some(found) = cache.find(page) else { continue };
                        for index in [0, 17, 63] {
                            match found.word(index) {
                                Some(word) => assert_eq!(word, page << 8 | index as u64),
                                None => lost += 1,
                            }
                            seen += 1;
                        }
                    }
                    (seen, lost)
                })
            });
            let mut page = 0;
            while start.elapsed() < std::time::Duration::from_millis(700) {
                page = (page * 5 + 1) % 64;
                if cache.get(&writer, page).is_none() {
                    cache.put(&mut writer, page, &bits_of(page));
                }
            }
            ended.store(true, Ordering::Relaxed);
            for (seen, lost) in readers.map(|reader| reader.join().expect("a reader found nothing wrong")) {
                println!("{seen} words seen, {lost} lost");
                assert!(seen > 1000);
            }
        });
    }
}

//! A set of pages that several threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::pages::PageSet;

/// A set of pages. Whoever takes a page out is the only one who did.
pub(super) struct SharedSet(Vec<AtomicU64>);

impl SharedSet {
    /// An empty one, for so many pages.
    pub fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The same pages.
    pub fn from_set(set: &PageSet) -> Self {
        Self(set.words().iter().map(|word| AtomicU64::new(*word)).collect())
    }

    /// The same pages, as they are while nobody changes them.
    pub fn to_set(&self, pages: u64) -> PageSet {
        let mut set = PageSet::empty(pages);
        let words: Vec<u64> = self.0.iter().map(|word| word.load(Ordering::Acquire)).collect();
        set.insert_bits(0, &words);
        set
    }

    /// Puts a page in.
    pub fn insert(&self, page: u64) {
        self.0[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
    }

    /// Takes a page out; whether it was in. False beyond the end.
    pub fn remove(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        self.0.get((page / 64) as usize).is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }

    /// Whether a page is in. False beyond the end.
    pub fn contains(&self, page: u64) -> bool {
        self.0
            .get((page / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_taken_out_by_one_thread() {
        let set = SharedSet::from_set(&PageSet::full(5000));
        let taken: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| (0..6000).filter(|page| set.remove(*page)).collect::<Vec<u64>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(taken.len(), 5000);
        assert!(set.to_set(5000).is_empty() && !set.contains(4999) && !set.contains(1 << 40));
    }
}

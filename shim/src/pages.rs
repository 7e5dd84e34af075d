//! Sets of pages of guest memory.

/// Bytes of a page, the unit in which memory is tracked and sent.
pub const PAGE_BYTES: usize = 4096;

/// A set of pages, by their index in guest memory (0 is the first page of the first region; regions follow each other
/// without gaps, see [`crate::memory::GuestRam`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of `pages`.
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// Every page of `pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self { words: vec![u64::MAX; pages.div_ceil(64) as usize], pages };
        set.trim();
        set
    }

    fn trim(&mut self) {
        let rest = self.pages % 64;
        if rest != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << rest) - 1;
        }
    }

    /// Pages that the set ranges over.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether the page is in the set; false beyond its end.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Puts a page in.
    ///
    /// # Panics
    /// If it is beyond the end.
    pub fn insert(&mut self, page: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[(page / 64) as usize] |= 1 << (page % 64);
    }

    /// Takes a page out.
    pub fn remove(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    /// Puts in the pages of a bitmap (bit 0 of its first word is page `first`), as KVM's dirty log has them. Bits beyond
    /// the end of the set are ignored.
    pub fn insert_bits(&mut self, first: u64, bits: &[u64]) {
        if first.is_multiple_of(64) {
            let at = (first / 64) as usize;
            for (word, bits) in self.words.iter_mut().skip(at).zip(bits) {
                *word |= bits;
            }
            self.trim();
            return;
        }
        for (i, mut word) in bits.iter().copied().enumerate() {
            while word != 0 {
                let page = first + i as u64 * 64 + u64::from(word.trailing_zeros());
                if page < self.pages {
                    self.insert(page);
                }
                word &= word - 1;
            }
        }
    }

    /// Puts in all that another set of the same size has.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn insert_all(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of different memories");
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// The bitmap: bit 0 of the first word is page 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages in their order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let mut word = *word;
            std::iter::from_fn(move || {
                (word != 0).then(|| {
                    let bit = word.trailing_zeros();
                    word &= word - 1;
                    i as u64 * 64 + u64::from(bit)
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_set_ends_where_the_memory_ends() {
        let set = PageSet::full(70);
        assert_eq!((set.len(), set.contains(69), set.contains(70)), (70, true, false));
    }

    #[test]
    fn bits_are_put_in_wherever_they_begin() {
        for first in [0, 1, 63, 64, 65, 128] {
            let mut set = PageSet::empty(200);
            set.insert_bits(first, &[0b1001, 1 << 63]);
            let expected: Vec<_> =
                [0, 3, 127].iter().map(|bit| first + bit).filter(|page| *page < 200).collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), expected, "first {first}");
        }
    }
}

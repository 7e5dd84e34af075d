//! What is written to pages and blocks, and in which order pages are visited. Compiled by the guest, which writes and
//! verifies, and by its host, which verifies from outside.

use super::layout::{FILL_FULL, PAGE, PAGE_WORDS, PATTERN_RANDOM, Parameters};

/// Words of a page that take turns in being written where not all are: all but the first and the last one.
pub const TURNS: u64 = PAGE_WORDS as u64 - 2;
const LAST: usize = PAGE_WORDS - 1;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A bijection of words in which every bit of the input changes about half of the output's.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The pages of the working set that belong to a processor: the first one and their number.
pub fn slice(pages: u64, vcpus: u32, vcpu: u32) -> (u64, u64) {
    let part = |n: u32| pages * u64::from(n) / u64::from(vcpus);
    (part(vcpu), part(vcpu + 1) - part(vcpu))
}

/// Address of a page of the working set.
pub fn page_address(parameters: &Parameters, page: u64) -> u64 {
    match page.checked_sub(parameters.low_pages) {
        None => parameters.low_start + page * PAGE,
        Some(above) => parameters.high_start + above * PAGE,
    }
}

/// One lap's order: a bijection of `0..count`.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    random: bool,
    count: u64,
    bits: u32,
    key: u64,
}

impl Order {
    /// The order in which a processor visits its `count` pages in a lap.
    pub fn new(parameters: &Parameters, vcpu: u32, lap: u64, count: u64) -> Self {
        let key = mix(parameters.seed ^ mix(lap.wrapping_mul(STEP) ^ u64::from(vcpu)));
        let bits = 64 - count.saturating_sub(1).leading_zeros();
        Self { random: parameters.pattern == PATTERN_RANDOM, count, bits, key }
    }

    /// The page that is visited at `position`, which is below the count.
    #[inline]
    pub fn page(&self, position: u64) -> u64 {
        if !self.random || self.bits < 2 {
            return position;
        }
        let mut x = position;
        // A bijection of the next power of two, followed until it comes back below the count: again a bijection.
        loop {
            x = self.scatter(x);
            if x < self.count {
                return x;
            }
        }
    }

    #[inline]
    fn scatter(&self, x: u64) -> u64 {
        let (mask, half) = ((1u64 << self.bits) - 1, self.bits / 2);
        let x = x.wrapping_add(self.key).wrapping_mul(STEP) & mask;
        let x = (x ^ (x >> half)).wrapping_mul(self.key | 1) & mask;
        let x = (x ^ (x >> half)).wrapping_mul(0xd6e8_feb8_6659_fd93) & mask;
        x ^ (x >> half)
    }
}

/// What a page holds.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    seed: u64,
    full: bool,
    page: u64,
}

impl Content {
    /// Of a page of the working set; `vcpu` is whose it is.
    #[inline]
    pub fn new(parameters: &Parameters, vcpu: u32, page: u64) -> Self {
        let seed = parameters.seed ^ (u64::from(vcpu) << 56);
        Self { seed, full: parameters.fill == FILL_FULL, page }
    }

    /// The first word as a lap leaves it: the page and the lap as one can read them, each in 32 bits.
    #[inline]
    pub fn stamp(&self, lap: u64) -> u64 {
        self.page << 32 | lap & 0xffff_ffff
    }

    /// What the other words of a lap are made from.
    #[inline]
    pub fn base(&self, lap: u64) -> u64 {
        mix(self.seed ^ mix(self.page ^ mix(lap)))
    }

    /// A word other than the first one, as a lap with this base leaves it if it writes it.
    #[inline]
    pub fn word(base: u64, index: usize) -> u64 {
        base.wrapping_add((index as u64).wrapping_mul(STEP))
    }

    /// The word whose turn it is in a lap, where not all are written.
    #[inline]
    pub fn turn(lap: u64) -> usize {
        1 + (lap % TURNS) as usize
    }

    /// The whole page as it is after this lap.
    pub fn after(self, lap: u64) -> Written {
        Written { content: self, lap, base: self.base(lap) }
    }
}

/// A page as a lap leaves it, all zeroes before the first one.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    content: Content,
    lap: u64,
    base: u64,
}

impl Written {
    /// One word of it.
    #[inline]
    pub fn word(&self, index: usize) -> u64 {
        let lap = self.lap;
        if lap == 0 {
            return 0;
        }
        if index == 0 {
            return self.content.stamp(lap);
        }
        if self.content.full || index == LAST {
            return Content::word(self.base, index);
        }
        // The latest lap, if there was one, in which it was this word's turn.
        let ago = (lap % TURNS + TURNS - (index as u64 - 1)) % TURNS;
        if ago >= lap { 0 } else { Content::word(self.content.base(lap - ago), index) }
    }
}

/// The two words at every 16 bytes of a block of a disk: (block, disk, seed) and (generation, place in the block, seed).
#[inline]
pub fn block_words(seed: u64, disk: u32, block: u64, generation: u32, unit: u64) -> (u64, u64) {
    let (low, high) = (seed & 0xffff, seed >> 16 & 0xffff);
    (block | u64::from(disk) << 40 | low << 48, u64::from(generation) | unit << 32 | high << 48)
}

//! Choices, taken from the bytes of a fuzzer's input.

use formats::ByteSpan;

/// What is left of the input.
#[derive(Debug)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Bytes<'_> {
    /// The next byte, or 0 when there is none.
    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of these.
    pub(super) fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[usize::from(self.byte()) % list.len()]
    }

    /// Some sectors of a disk of `sectors` sectors and blocks of `block` sectors: near the edges of blocks, and mostly in
    /// the first few of them.
    pub(super) fn sectors(&mut self, sectors: u64, block: u64) -> std::ops::Range<u64> {
        let first = self.sector(sectors, block);
        let len = match self.byte() {
            n @ 0..200 => u64::from(n % 16) + 1,
            n @ 200..248 => 6 * u64::from(n - 199),
            n => block.min(4096) + u64::from(n - 248),
        };
        first..(first + len).min(sectors)
    }

    fn sector(&mut self, sectors: u64, block: u64) -> u64 {
        let blocks = sectors.div_ceil(block);
        let number = match self.byte() {
            n @ 0..160 => u64::from(n) % blocks.min(12),
            n => (blocks - 1) * u64::from(n - 160) / 95,
        };
        let within = match self.byte() {
            n @ 0..128 => u64::from(n).min(block - 1),
            n => block.saturating_sub(u64::from(n - 127)),
        };
        (number * block + within).min(sectors - 1)
    }

    /// Some whole blocks.
    pub(super) fn blocks(&mut self, sectors: u64, block: u64) -> std::ops::Range<u64> {
        let first = self.sector(sectors, block) / block * block;
        first..(first + block * (u64::from(self.byte() % 8) + 1)).min(sectors)
    }
}

/// The bytes of some sectors.
pub(super) fn span(sectors: std::ops::Range<u64>, sector: u64) -> ByteSpan {
    ByteSpan::new(sectors.start * sector, (sectors.end - sectors.start) * sector)
}

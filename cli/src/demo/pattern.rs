//! What the demo's disk must hold: each block's content follows from a seed, its place and how often it was written.

/// The granule of the pattern in bytes.
pub(super) const BLOCK: usize = 4096;

/// A small, fast generator whose state may be any number.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// From a seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits (SplitMix64).
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// The content that the disk must have.
#[derive(Debug, Clone)]
pub(super) struct Content {
    seed: u64,
    /// How often each block was written; 0 means that it reads as zeroes.
    versions: Vec<u32>,
}

impl Content {
    /// A disk of `blocks` blocks that was never written.
    pub(super) fn new(seed: u64, blocks: usize) -> Self {
        Self { seed, versions: vec![0; blocks] }
    }

    /// How many blocks there are.
    pub(super) fn blocks(&self) -> u64 {
        self.versions.len() as u64
    }

    /// How often the block was written.
    pub(super) fn version(&self, block: u64) -> u32 {
        self.versions[block as usize]
    }

    /// Notes that the block now holds this version.
    pub(super) fn set_version(&mut self, block: u64, version: u32) {
        self.versions[block as usize] = version;
    }

    /// Fills `data`, one block long, with what a version of a block is.
    pub(super) fn fill(&self, block: u64, version: u32, data: &mut [u8]) {
        assert_eq!(data.len(), BLOCK, "the pattern is made a block at a time");
        if version == 0 {
            data.fill(0);
            return;
        }
        let tag = self.tag(block, version);
        let mut random =
            Random::new(tag.iter().fold(self.seed, |hash, word| Random::new(hash ^ word).next()));
        for (at, word) in data.chunks_exact_mut(8).enumerate() {
            let value = if at < 2 { tag[at] } else { random.next() };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Says what is wrong with `data`, which was read from `block` on; `None` when all of it is right.
    pub(super) fn first_mismatch(
        &self,
        block: u64,
        data: &[u8],
        scratch: &mut [u8; BLOCK],
    ) -> Option<Mismatch> {
        data.chunks_exact(BLOCK).zip(block..).find_map(|(found, block)| {
            self.fill(block, self.version(block), scratch);
            (found != scratch.as_slice()).then(|| self.explain(block, found, scratch))
        })
    }

    fn tag(&self, block: u64, version: u32) -> [u64; 2] {
        // Never 0, so that a written block can't be taken for a hole.
        [block ^ self.seed, u64::from(version) | 1 << 63]
    }

    fn explain(&self, block: u64, found: &[u8], scratch: &mut [u8; BLOCK]) -> Mismatch {
        let expected = match self.version(block) {
            0 => "zeroes".to_owned(),
            version => format!("version {version}"),
        };
        let word = |at: usize| found[at * 8..at * 8 + 8].iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        let (place, version) = (word(0) ^ self.seed, word(1) as u32);
        self.fill(place, version.max(1), scratch);
        let found = if found.iter().all(|b| *b == 0) {
            "zeroes".to_owned()
        } else if found != scratch.as_slice() {
            "something that was never written".to_owned()
        } else if place == block {
            format!("version {version}")
        } else {
            format!("version {version} of block {place}")
        };
        Mismatch { offset: block * BLOCK as u64, message: format!("expected {expected}, found {found}") }
    }
}

/// A block that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Where, in bytes of the disk.
    pub(super) offset: u64,
    /// What is there instead.
    pub(super) message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &Content, block: u64) -> Vec<u8> {
        let mut data = vec![0xee; BLOCK];
        content.fill(block, content.version(block), &mut data);
        data
    }

    #[test]
    fn what_was_written_is_right_and_all_else_is_told_apart() {
        let mut content = Content::new(7, 16);
        content.set_version(3, 2);
        let mut scratch = [0; BLOCK];
        let mut check = |block, data: &[u8]| content.first_mismatch(block, data, &mut scratch);
        let right = read(&content, 3);
        assert_eq!(check(3, &right), None);
        assert_eq!(check(5, &[0; BLOCK]), None);

        let mut old = vec![0; BLOCK];
        content.fill(3, 1, &mut old);
        let message = |m: Option<Mismatch>| m.expect("a mismatch").message;
        assert_eq!(message(check(3, &old)), "expected version 2, found version 1");
        assert_eq!(message(check(3, &[0; BLOCK])), "expected version 2, found zeroes");
        assert_eq!(message(check(4, &right)), "expected zeroes, found version 2 of block 3");
        let torn: Vec<u8> = right[..2048].iter().chain(&old[2048..]).copied().collect();
        assert_eq!(message(check(3, &torn)), "expected version 2, found something that was never written");
    }

    #[test]
    fn a_flip_of_any_single_bit_is_seen() {
        let mut content = Content::new(99, 4);
        content.set_version(1, 1);
        let right = read(&content, 1);
        let mut scratch = [0; BLOCK];
        for bit in (0..BLOCK * 8).step_by(97) {
            let mut flipped = right.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(content.first_mismatch(1, &flipped, &mut scratch).is_some(), "bit {bit}");
        }
    }

    #[test]
    fn a_mismatch_in_the_middle_is_found_at_its_place() {
        let content = Content::new(1, 8);
        let mut data = vec![0; 4 * BLOCK];
        data[2 * BLOCK + 17] = 1;
        let found = content.first_mismatch(4, &data, &mut [0; BLOCK]).expect("a mismatch");
        assert_eq!(found.offset, 6 * BLOCK as u64);
    }
}

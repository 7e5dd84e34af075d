//! What guest writes touched while only tracked: bits that workers set without a lock and the move collects.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mirror::ExtentRange;

/// Extents of one chunk.
const CHUNK: u32 = 512 * 64;

#[derive(Debug)]
struct Chunk {
    any: AtomicBool,
    words: Box<[AtomicU64]>,
}

/// One bit an extent, in chunks that exist once something in them was marked.
#[derive(Debug)]
pub struct Marks {
    chunks: Box<[OnceLock<Chunk>]>,
}

impl Marks {
    /// For a disk of `extents` extents, none of them marked.
    pub fn new(extents: u32) -> Self {
        Self { chunks: (0..extents.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect() }
    }

    /// Marks extents. What the caller did before is seen by who collects the mark.
    pub fn mark(&self, range: ExtentRange) {
        for extent in range.first..range.end() {
            let chunk = self.chunks[(extent / CHUNK) as usize].get_or_init(|| Chunk {
                any: AtomicBool::new(false),
                words: (0..CHUNK / 64).map(|_| AtomicU64::new(0)).collect(),
            });
            let bit = 1 << (extent % 64);
            chunk.words[(extent % CHUNK / 64) as usize].fetch_or(bit, Ordering::Release);
            // After the bit: a collector that clears the flag first and looks then cannot miss it. Not a mere store, which
            // would hide another worker's from the collector, and with it that worker's bit.
            chunk.any.fetch_or(true, Ordering::Release);
        }
    }

    /// Takes all marks away and hands them over as ranges.
    pub fn collect(&self, mut each: impl FnMut(ExtentRange)) {
        for (i, chunk) in self.chunks.iter().enumerate() {
            let Some(chunk) = chunk.get() else { continue };
            if !chunk.any.swap(false, Ordering::AcqRel) {
                continue;
            }
            for (w, word) in chunk.words.iter().enumerate() {
                // Most words of a chunk hold nothing, and looking is cheaper than taking. What is set from now on sets the flag.
                if word.load(Ordering::Acquire) == 0 {
                    continue;
                }
                let mut bits = word.swap(0, Ordering::Acquire);
                while bits != 0 {
                    let start = bits.trailing_zeros();
                    let count = (bits >> start).trailing_ones();
                    each(ExtentRange { first: i as u32 * CHUNK + w as u32 * 64 + start, count });
                    bits &= if start + count == 64 { 0 } else { !0 << (start + count) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_marked_is_collected_once() {
        let marks = Marks::new(CHUNK * 3);
        let wanted = [(0, 1), (63, 2), (CHUNK - 1, 130), (CHUNK * 3 - 1, 1)];
        for (first, count) in wanted {
            marks.mark(ExtentRange { first, count });
        }
        let mut got = std::collections::BTreeSet::new();
        marks.collect(|r| got.extend(r.first..r.end()));
        let expected = wanted.iter().flat_map(|&(f, c)| f..f + c).collect();
        assert_eq!(got, expected);
        marks.collect(|r| panic!("{r:?} was collected twice"));
    }
}

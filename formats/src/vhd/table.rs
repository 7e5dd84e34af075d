//! The block table in memory: read without a lock, changed under the allocator's.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::layout::ABSENT;

/// One entry for each block of the disk, and for each block whether its bitmap is known to be all ones.
#[derive(Debug)]
pub(super) struct BlockTable {
    entries: Box<[AtomicU32]>,
    /// A bit for each block: set once the bitmap was found or made all ones in this session.
    marked: Box<[AtomicU64]>,
    absent: AtomicU64,
}

impl BlockTable {
    pub(super) fn new(table: &[u32]) -> Self {
        let absent = table.iter().filter(|&&e| e == ABSENT).count() as u64;
        Self {
            entries: table.iter().map(|&e| AtomicU32::new(e)).collect(),
            marked: (0..table.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            absent: AtomicU64::new(absent),
        }
    }

    /// The entry of a block; `None` when it has no place.
    pub(super) fn get(&self, block: u64) -> Option<u32> {
        // Pairs with the release in `set`: whoever sees the entry sees the block's mark too.
        let entry = self.entries[block as usize].load(Ordering::Acquire);
        (entry != ABSENT).then_some(entry)
    }

    /// Gives a block its place.
    pub(super) fn set(&self, block: u64, entry: u32) {
        assert_ne!(entry, ABSENT, "a place must not look like none");
        let before = self.entries[block as usize].swap(entry, Ordering::Release);
        assert_eq!(before, ABSENT, "block {block} has a place already");
        self.absent.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many blocks have no place.
    pub(super) fn absent(&self) -> u64 {
        self.absent.load(Ordering::Relaxed)
    }

    /// How many blocks have one.
    pub(super) fn present(&self) -> u64 {
        self.entries.len() as u64 - self.absent()
    }

    /// How many blocks from `block` on have no place, at most up to `end`.
    pub(super) fn absent_run(&self, block: u64, end: u64) -> u64 {
        self.entries[block as usize..end as usize]
            .iter()
            .take_while(|e| e.load(Ordering::Acquire) == ABSENT)
            .count() as u64
    }

    /// Whether the block's bitmap is known to be all ones.
    pub(super) fn is_marked(&self, block: u64) -> bool {
        self.marked[block as usize / 64].load(Ordering::Acquire) & (1 << (block % 64)) != 0
    }

    /// Notes that the block's bitmap is all ones.
    pub(super) fn mark(&self, block: u64) {
        self.marked[block as usize / 64].fetch_or(1 << (block % 64), Ordering::Release);
    }
}

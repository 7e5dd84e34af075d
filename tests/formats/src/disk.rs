//! Sparse contents of a simulated file, with a hash that is kept up to date.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::SECTOR;

const PAGE: u64 = 4096;
type Page = [u8; PAGE as usize];

/// The contents and the length of a simulated file at one moment. Cloning is cheap: pages are shared.
#[derive(Clone, Default)]
pub struct SimDisk {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
    hash: u64,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimDisk({} bytes, {} pages, {:016x})", self.len, self.pages.len(), self.hash)
    }
}

impl SimDisk {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A fingerprint of contents and length: equal disks have equal ones.
    pub fn fingerprint(&self) -> u64 {
        self.hash ^ sector_hash(u64::MAX, &self.len.to_le_bytes())
    }

    /// Fills `buf` from `offset`; what lies in holes or beyond the end is zeroes.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for (page, inner, range) in split(offset, buf.len() as u64, PAGE) {
            match self.pages.get(&page) {
                Some(p) => buf[range.clone()].copy_from_slice(&p[inner..inner + range.len()]),
                None => buf[range].fill(0),
            }
        }
    }

    /// Writes `data` at `offset`; the length grows where needed.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        self.put(offset, data);
    }

    /// Makes a range read as zeroes; the length stays.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len.next_multiple_of(PAGE));
        if end <= offset {
            return;
        }
        let pages: Vec<u64> = self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(p, _)| *p).collect();
        for page in pages {
            let from = offset.max(page * PAGE);
            let to = end.min((page + 1) * PAGE);
            if from < to {
                let zeroes = [0; PAGE as usize];
                self.put(from, &zeroes[..(to - from) as usize]);
            }
        }
    }

    /// Cuts or extends; what lies beyond a new, smaller length is gone.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// The first run of stored pages at or after `offset` that ends within the file.
    pub fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        if offset >= self.len {
            return None;
        }
        let first = *self.pages.range(offset / PAGE..).next()?.0;
        if first * PAGE >= self.len {
            return None;
        }
        let mut next = first + 1;
        while self.pages.contains_key(&next) {
            next += 1;
        }
        Some(((first * PAGE).max(offset), (next * PAGE).min(self.len)))
    }

    /// Bytes that are stored, in whole pages: what the file takes up.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        for (index, inner, range) in split(offset, data.len() as u64, PAGE) {
            let part = &data[range];
            if !self.pages.contains_key(&index) && part.iter().all(|b| *b == 0) {
                continue;
            }
            let page = Arc::make_mut(self.pages.entry(index).or_insert_with(|| Arc::new([0; PAGE as usize])));
            let sectors = inner / SECTOR as usize..(inner + part.len()).div_ceil(SECTOR as usize);
            let base = index * (PAGE / SECTOR);
            let digest = |page: &Page, sectors: std::ops::Range<usize>| {
                sectors.fold(0, |h, s| {
                    let at = s * SECTOR as usize;
                    h ^ sector_hash(base + s as u64, &page[at..at + SECTOR as usize])
                })
            };
            self.hash ^= digest(page, sectors.clone());
            page[inner..inner + part.len()].copy_from_slice(part);
            self.hash ^= digest(page, sectors);
            if page.iter().all(|b| *b == 0) {
                self.pages.remove(&index);
            }
        }
    }
}

/// 0 for zeroes, so that a hole and written zeroes are the same.
fn sector_hash(index: u64, data: &[u8]) -> u64 {
    if data.iter().all(|b| *b == 0) {
        return 0;
    }
    let mut hasher = std::hash::DefaultHasher::new();
    index.hash(&mut hasher);
    data.hash(&mut hasher);
    hasher.finish()
}

/// Cuts a range at multiples of `unit`: (index of the unit, offset in it, range in the caller's buffer).
pub(crate) fn split(
    offset: u64,
    len: u64,
    unit: u64,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done;
        let inner = at % unit;
        let n = (unit - inner).min(len - done);
        let range = done as usize..(done + n) as usize;
        done += n;
        Some((at / unit, inner as usize, range))
    })
}

//! Sector bitmaps of a differencing image (2.5.1.2, 2.5.2): what the metadata says of single sectors.
//!
//! Only what is recorded goes through here: bits of sectors whose payload is durable. A block's bits mean something as long as
//! the block is partially present, and only then are they looked at.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::log_entry::SECTOR;
use super::metadata::Metadata;
use crate::{ImageError, Storage};

/// 4 KiB of a sector bitmap block, the unit of the log: bits of 32768 sectors.
pub(super) type BitmapPage = [u8; SECTOR];
const PAGE_BITS: u64 = SECTOR as u64 * 8;
/// Sectors of a chunk: what one sector bitmap block describes.
pub(super) const CHUNK_SECTORS: u64 = 1 << 23;

/// A page that is newer in the log than in its place.
#[derive(Debug)]
struct Dirty {
    page: Arc<BitmapPage>,
    /// The last entry that has it.
    sequence: u64,
}

/// The bitmaps of an image.
#[derive(Debug)]
pub(super) struct Bitmaps {
    view: Arc<dyn Storage>,
    /// Sectors of a payload block; a power of two of at least 256.
    pub(super) block_sectors: u64,
    /// By their offset in the file. Locked for moments only, and nothing else is locked meanwhile.
    dirty: Mutex<BTreeMap<u64, Dirty>>,
}

/// The part of a block's bits that lies in one page.
#[derive(Debug, Clone, Copy)]
pub(super) struct BitSpan {
    /// Where the page is in the file.
    pub(super) page: u64,
    /// The first bit in it, a multiple of 8.
    pub(super) bit: u64,
    /// How many bits.
    pub(super) count: u64,
    /// The sector of the disk that the first bit is about.
    pub(super) sector: u64,
}

impl BitSpan {
    /// The bytes that hold the bits. A last byte may have bits of no sector.
    pub(super) fn bytes(&self) -> std::ops::Range<usize> {
        (self.bit / 8) as usize..(self.bit + self.count).div_ceil(8) as usize
    }

    /// Whether all of its bits are set.
    pub(super) fn is_full(&self, page: &BitmapPage) -> bool {
        let whole = (self.bit / 8) as usize..((self.bit + self.count) / 8) as usize;
        let rest = (1_u8 << (self.count % 8)) - 1;
        let last = if rest == 0 { 0 } else { page[whole.end] };
        page[whole].iter().all(|byte| *byte == 0xff) && last & rest == rest
    }

    /// Sets the bits of these sectors of the disk, as far as they are its own.
    pub(super) fn set(&self, page: &mut BitmapPage, sectors: &std::ops::Range<u64>) {
        let (start, end) = (sectors.start.max(self.sector), sectors.end.min(self.sector + self.count));
        let (mut bit, end) =
            (start.max(self.sector) - self.sector + self.bit, end.max(start) - self.sector + self.bit);
        while bit < end {
            if bit.is_multiple_of(8) && end - bit >= 8 {
                page[(bit / 8) as usize] = 0xff;
                bit += 8;
            } else {
                page[(bit / 8) as usize] |= 1 << (bit % 8);
                bit += 1;
            }
        }
    }

    /// Whether any of these sectors is one of its own.
    pub(super) fn touches(&self, sectors: &std::ops::Range<u64>) -> bool {
        sectors.start < self.sector + self.count && sectors.end > self.sector
    }
}

impl Bitmaps {
    pub(super) fn new(view: Arc<dyn Storage>, metadata: &Metadata) -> Self {
        let block_sectors = u64::from(metadata.block_size / metadata.logical_sector);
        Self { view, block_sectors, dirty: Mutex::default() }
    }

    fn dirty(&self) -> MutexGuard<'_, BTreeMap<u64, Dirty>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bits of a block are, page by page, given the place of its chunk's bitmap block. `sectors` of the block belong
    /// to the disk.
    pub(super) fn spans(
        &self,
        block: u64,
        sectors: u64,
        bitmap: u64,
    ) -> impl Iterator<Item = BitSpan> + use<> {
        spans_from(block * self.block_sectors, sectors, bitmap)
    }

    /// The bits as they are recorded.
    pub(super) fn page(&self, offset: u64) -> Result<Arc<BitmapPage>, ImageError> {
        if let Some(dirty) = self.dirty().get(&offset) {
            return Ok(dirty.page.clone());
        }
        let mut page = [0; SECTOR];
        self.read(offset, &mut page)?;
        Ok(Arc::new(page))
    }

    /// Some bytes of a page as they are recorded.
    pub(super) fn bytes(&self, page: u64, from: usize, buf: &mut [u8]) -> Result<(), ImageError> {
        if let Some(dirty) = self.dirty().get(&page) {
            buf.copy_from_slice(&dirty.page[from..from + buf.len()]);
            return Ok(());
        }
        self.read(page + from as u64, buf)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let read = self.view.read_at(buf, offset);
        read.map_err(|e| ImageError::io(format!("reading the sector bitmap at {offset:#x}"), e))
    }

    /// Takes note of pages that an entry of the log has.
    pub(super) fn logged(&self, pages: impl Iterator<Item = (u64, Arc<BitmapPage>)>, sequence: u64) {
        self.dirty().extend(pages.map(|(offset, page)| (offset, Dirty { page, sequence })));
    }

    /// Everything that is newer in the log than in its place.
    pub(super) fn all_dirty(&self) -> Vec<(u64, Arc<BitmapPage>)> {
        self.dirty().iter().map(|(offset, dirty)| (*offset, dirty.page.clone())).collect()
    }

    /// What entries up to this one have is in its place.
    pub(super) fn applied(&self, sequence: u64) {
        self.dirty().retain(|_, dirty| dirty.sequence > sequence);
    }

    pub(super) fn is_clean(&self) -> bool {
        self.dirty().is_empty()
    }
}

/// Where the bits of `sectors` sectors from `first` on are, which lie in one chunk.
fn spans_from(first: u64, sectors: u64, bitmap: u64) -> impl Iterator<Item = BitSpan> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= sectors {
            return None;
        }
        let at = (first + done) % CHUNK_SECTORS;
        let count = (PAGE_BITS - at % PAGE_BITS).min(sectors - done);
        let page = bitmap + at / PAGE_BITS * SECTOR as u64;
        let span = BitSpan { page, bit: at % PAGE_BITS, count, sector: first + done };
        done += count;
        Some(span)
    })
}

/// Pages that are being changed, over those that are recorded.
#[derive(Debug)]
pub(super) struct Edit<'a> {
    bitmaps: &'a Bitmaps,
    pages: BTreeMap<u64, Arc<BitmapPage>>,
}

impl<'a> Edit<'a> {
    pub(super) fn new(bitmaps: &'a Bitmaps) -> Self {
        Self { bitmaps, pages: BTreeMap::new() }
    }

    /// How many pages are changed.
    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// A page with the changes so far.
    pub(super) fn page(&self, offset: u64) -> Result<Arc<BitmapPage>, ImageError> {
        self.pages.get(&offset).map_or_else(|| self.bitmaps.page(offset), |page| Ok(page.clone()))
    }

    /// Changes a page.
    pub(super) fn put(&mut self, offset: u64, page: Arc<BitmapPage>) {
        self.pages.insert(offset, page);
    }

    pub(super) fn into_pages(self) -> Vec<(u64, Arc<BitmapPage>)> {
        self.pages.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(bit: u64, count: u64, sector: u64) -> BitSpan {
        BitSpan { page: 0, bit, count, sector }
    }

    #[test]
    fn bits_are_set_from_the_lowest_of_each_byte_on_and_only_within_the_span() {
        let mut page = [0; SECTOR];
        span(8, 16, 100).set(&mut page, &(0..103));
        assert_eq!(page[..4], [0, 0b111, 0, 0]);
        span(8, 16, 100).set(&mut page, &(107..1000));
        assert_eq!(page[..4], [0, 0b1000_0111, 0xff, 0]);
        let before = page;
        span(8, 16, 100).set(&mut page, &(116..200));
        span(8, 16, 100).set(&mut page, &(0..100));
        assert_eq!(page, before);
    }

    #[test]
    fn a_span_is_full_when_all_bits_of_its_sectors_are_set_whatever_follows() {
        let mut page = [0; SECTOR];
        let span = span(16, 11, 0);
        span.set(&mut page, &(0..10));
        assert!(!span.is_full(&page));
        span.set(&mut page, &(10..11));
        assert!(span.is_full(&page));
        assert_eq!(page[2..4], [0xff, 0b111]);
        assert_eq!(span.bytes(), 2..4);
    }

    #[test]
    fn the_bits_of_a_large_block_are_on_several_pages_of_the_bitmap_of_its_chunk() {
        // 256 MiB in sectors of 512 bytes; block 17 is the second of chunk 1.
        let spans: Vec<_> = spans_from(17 << 19, 1 << 19, 5 << 20).collect();
        assert_eq!(spans.len(), 16);
        assert_eq!((spans[0].page, spans[0].bit, spans[0].sector), ((5 << 20) + (1 << 16), 0, 17 << 19));
        assert_eq!((spans[15].page, spans[15].count), ((5 << 20) + (1 << 16) + 15 * 4096, 32768));
        // 1 MiB in sectors of 4096 bytes: 32 bytes each. The last block of the disk is short.
        let spans: Vec<_> = spans_from(129 * 256, 3, 7 << 20).collect();
        assert_eq!(spans.len(), 1);
        assert_eq!((spans[0].page, spans[0].bit, spans[0].count), ((7 << 20) + 4096, 256, 3));
    }
}

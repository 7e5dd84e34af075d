//! The block allocation table (2.5): validated as a stream, kept in memory page by page.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::MIB;
pub(super) use super::bat_pages::PAGE_ENTRIES;
use super::bat_pages::{Entries, Pages};
use super::corruption::{Corruption, Stop};
use super::le::u64_at;
use super::log_entry::SECTOR;
use super::metadata::{BlockLayout, EntryOwner, Owners};
use super::region::Region;
use super::space::Space;
use crate::{ImageError, Storage};

/// Pages of the table that are in memory at once: 32 MiB of them, the table of 4 TiB in blocks of 1 MiB. A disk that is not larger
/// has all of its table in memory once it was read.
pub(super) const TABLE_PAGES_MAX: usize = 8192;
/// Bytes that are read at once when the table is validated.
const BATCH: u64 = 256 << 10;

/// A raw entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatEntry(pub(super) u64);

/// States of payload blocks (2.5.1.1).
pub(super) mod state {
    pub(in super::super) const NOT_PRESENT: u8 = 0;
    pub(in super::super) const UNDEFINED: u8 = 1;
    pub(in super::super) const ZERO: u8 = 2;
    pub(in super::super) const UNMAPPED: u8 = 3;
    pub(in super::super) const FULLY_PRESENT: u8 = 6;
    pub(in super::super) const PARTIALLY_PRESENT: u8 = 7;
}

impl BatEntry {
    /// A block that holds its data at this unit of 1 MiB.
    pub(super) fn present(unit: u64) -> Self {
        Self(unit << 20 | u64::from(state::FULLY_PRESENT))
    }

    /// A block at this unit of 1 MiB that holds the sectors which its bitmap names.
    pub(super) fn partial(unit: u64) -> Self {
        Self(unit << 20 | u64::from(state::PARTIALLY_PRESENT))
    }

    /// A block that reads as zeroes. Its offset is 0, since Hyper-V refuses others.
    pub(super) const ZERO: Self = Self(state::ZERO as u64);

    pub(super) fn state(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// The place of the block in units of 1 MiB, below 2^44.
    pub(super) fn unit(self) -> u64 {
        self.0 >> 20
    }

    /// The place of the block in bytes, if the block holds data, all of it or some.
    pub(super) fn data_offset(self) -> Option<u64> {
        matches!(self.state(), state::FULLY_PRESENT | state::PARTIALLY_PRESENT).then(|| self.unit() * MIB)
    }

    fn has_reserved_bits(self) -> bool {
        self.0 & 0xF_FFF8 != 0
    }
}

/// Where the table is and what it describes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub(super) region: Region,
    pub(super) layout: BlockLayout,
    pub(super) differencing: bool,
    pub(super) file_len: u64,
}

/// What validation learned.
#[derive(Debug, Default, Clone)]
pub(super) struct Census {
    /// One bit for each page that has an entry other than 0.
    pub(super) populated: Vec<u64>,
    /// Payload blocks that have a place for their data.
    pub(super) allocated: u64,
    /// Where the sector bitmap blocks are, in units; at most 16384.
    pub(super) bitmaps: Vec<u64>,
    /// Entries of blocks without data that name a place all the same: (index, raw), the first few.
    pub(super) stale: Vec<(u64, u64)>,
}

/// So many stale entries are remembered for `check`.
const MAX_STALE: usize = 100;

impl Table {
    pub(super) fn new(region: Region, layout: BlockLayout, differencing: bool, file_len: u64) -> Self {
        Self { region, layout, differencing, file_len }
    }

    fn pages(&self) -> u64 {
        self.layout.entries.div_ceil(PAGE_ENTRIES)
    }

    /// Where the entry is in the file.
    fn place_of(&self, index: u64) -> u64 {
        self.region.offset + index * 8
    }

    /// Whether the region can hold the table.
    fn validate_size(&self) -> Result<(), Corruption> {
        let needed = self.layout.entries * 8;
        if needed > u64::from(self.region.len) {
            return Err(Corruption::BatTooSmall { len: self.region.len, needed });
        }
        Ok(())
    }

    /// Reads every entry that is not 0, in order. Holes of the file are skipped.
    pub(super) fn stream(
        &self,
        view: &dyn Storage,
        mut each: impl FnMut(u64, BatEntry) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let io = |e| ImageError::io("reading the BAT", e);
        let base = self.region.offset;
        let end = base + self.layout.entries * 8;
        let mut buf = vec![0; BATCH as usize];
        let mut at = base;
        while let Some((start, stop)) = view.next_data(at).map_err(io)?.filter(|(start, _)| *start < end) {
            at = start / 8 * 8;
            let stop = stop.min(end).next_multiple_of(8);
            while at < stop {
                let n = (stop - at).min(BATCH) as usize;
                view.read_at(&mut buf[..n], at).map_err(io)?;
                for (i, raw) in buf[..n].chunks_exact(8).enumerate() {
                    let raw = u64_at(raw, 0);
                    if raw != 0 {
                        each((at - base) / 8 + i as u64, BatEntry(raw))?;
                    }
                }
                at += n as u64;
            }
        }
        Ok(())
    }

    /// Whether an entry may be as it is, whatever others say. `Some`: the run of units that its block takes.
    fn validate_entry(
        &self,
        index: u64,
        owner: Option<EntryOwner>,
        entry: BatEntry,
    ) -> Result<Option<(u64, u64)>, Corruption> {
        let (at, raw) = (self.place_of(index), entry.0);
        let bad_state = |whose| Err(Corruption::BatState { index, at, raw, state: entry.state(), whose });
        let (units, len) = match owner {
            None => return Ok(None),
            Some(EntryOwner::Bitmap(_)) => match entry.state() {
                state::NOT_PRESENT => return Ok(None),
                state::FULLY_PRESENT if self.differencing => (1, MIB),
                _ if self.differencing => return bad_state("a sector bitmap block"),
                _ => return bad_state("a sector bitmap block of an image without parent"),
            },
            Some(EntryOwner::Payload(block)) => match entry.state() {
                state::FULLY_PRESENT => (self.layout.units_per_block(), self.block_len(block)),
                state::PARTIALLY_PRESENT if self.differencing => {
                    (self.layout.units_per_block(), self.block_len(block))
                }
                state::PARTIALLY_PRESENT => return bad_state("a block of an image without parent"),
                4 | 5 => return bad_state("a payload block"),
                _ if entry.has_reserved_bits() => return Err(Corruption::BatReserved { index, at, raw }),
                _ => return Ok(None),
            },
        };
        if entry.has_reserved_bits() {
            return Err(Corruption::BatReserved { index, at, raw });
        }
        let offset = u128::from(entry.unit()) << 20;
        if entry.unit() == 0 || offset + u128::from(len) > u128::from(self.file_len) {
            let file_len = self.file_len;
            return Err(Corruption::BatPlace { index, at, raw, offset, len, file_len });
        }
        Ok(Some((entry.unit(), units)))
    }

    /// Bytes of a block that belong to the disk.
    fn block_len(&self, block: u64) -> u64 {
        if block + 1 == self.layout.blocks { self.layout.last_block_len } else { self.layout.block_size }
    }

    /// Validates every entry against the rules and against `space`, in which the blocks are marked. What is wrong goes
    /// to `issue`, which may stop the validation. `None`: there is no room for the table.
    pub(super) fn validate(
        &self,
        view: &dyn Storage,
        space: &mut Space,
        issue: &mut dyn FnMut(Corruption) -> Result<(), Stop>,
    ) -> Result<Option<Census>, Stop> {
        if let Err(corruption) = self.validate_size() {
            return issue(corruption).map(|()| None);
        }
        let populated = vec![0; self.pages().div_ceil(64) as usize];
        let mut census = Census { populated, ..Census::default() };
        let mut owners = Owners::new(self.layout);
        let mut anchors = false;
        let mut partial: Option<(u64, u64)> = None;
        let orphan =
            |partial: Option<(u64, u64)>| partial.map(|(_, index)| Corruption::SectorBitmapMissing { index });
        self.stream(view, |index, entry| {
            let page = index / PAGE_ENTRIES;
            census.populated[(page / 64) as usize] |= 1 << (page % 64);
            let (chunk, owner) = owners.at(index);
            if partial.is_some_and(|(c, _)| c != chunk) {
                orphan(partial.take()).map_or(Ok(()), &mut *issue)?;
            }
            let (start, units) = match self.validate_entry(index, owner, entry) {
                Ok(Some(run)) => run,
                Ok(None) => {
                    anchors |= entry.unit() != 0;
                    if entry.unit() != 0 && census.stale.len() < MAX_STALE {
                        census.stale.push((index, entry.0));
                    }
                    return Ok(());
                }
                Err(corruption) => return issue(corruption),
            };
            match owner {
                Some(EntryOwner::Bitmap(_)) => {
                    partial = None;
                    census.bitmaps.push(start);
                }
                _ => census.allocated += 1,
            }
            if entry.state() == state::PARTIALLY_PRESENT {
                partial.get_or_insert((chunk, index));
            }
            if space.mark(start, units) {
                return Ok(());
            }
            let (at, raw) = (self.place_of(index), entry.0);
            issue(Corruption::BatOverlap { index, at, raw, offset: start * MIB, len: units * MIB })
        })?;
        orphan(partial).map_or(Ok(()), issue)?;
        if anchors {
            self.mark_anchors(view, space)?;
        }
        Ok(Some(census))
    }

    /// Blocks that were unmapped may keep their old place. Nothing is read from there, but nothing else is put there
    /// either as long as the entry says so.
    fn mark_anchors(&self, view: &dyn Storage, space: &mut Space) -> Result<(), Stop> {
        let file_units = self.file_len.div_ceil(MIB);
        let units = self.layout.units_per_block();
        self.stream(view, |index, entry| {
            let anchor = matches!(self.layout.owner_of(index), Some(EntryOwner::Payload(_)))
                && matches!(entry.state(), state::UNDEFINED | state::UNMAPPED)
                && !entry.has_reserved_bits()
                && entry.unit() != 0;
            if anchor && entry.unit() + units <= file_units {
                // Where something else already is, the entry is merely stale.
                let _ = space.mark(entry.unit(), units);
            }
            Ok(())
        })
    }
}

/// The table in memory. Pages are read when they are needed; see [`Pages`] for how long they stay.
///
/// Whoever changes the table holds the lock on the image's changes: pins the pages ([`Bat::pin`]), writes the log entry with
/// what [`Bat::encode_page`] says, shows the change ([`Bat::publish`]), and releases the pages when they are durable in their
/// places ([`Bat::release`]).
#[derive(Debug)]
pub(super) struct Bat {
    view: Arc<dyn Storage>,
    table: Table,
    pages: Pages,
    /// Pages that held anything when the image was opened, or do since. The others need not be read.
    populated: Box<[AtomicU64]>,
}

impl Bat {
    /// At most `pages_max` pages are in memory, but for those that are pinned.
    pub(super) fn new(view: Arc<dyn Storage>, table: Table, census: &Census, pages_max: usize) -> Self {
        let populated = census.populated.iter().map(|bits| AtomicU64::new(*bits)).collect();
        Self { view, table, pages: Pages::new(table.pages(), pages_max), populated }
    }

    pub(super) fn layout(&self) -> &BlockLayout {
        &self.table.layout
    }

    /// Where a page is in the file.
    pub(super) fn page_offset(&self, page: u64) -> u64 {
        self.table.region.offset + page * SECTOR as u64
    }

    fn is_populated(&self, page: u64) -> bool {
        self.populated[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// The entry of a payload block.
    pub(super) fn block(&self, block: u64) -> Result<BatEntry, ImageError> {
        self.entry(self.table.layout.index_of(block))
    }

    /// Where the sector bitmap block of a chunk is, in bytes.
    pub(super) fn bitmap_offset(&self, chunk: u64) -> Result<Option<u64>, ImageError> {
        Ok(self.entry(self.table.layout.bitmap_index(chunk))?.data_offset())
    }

    fn entry(&self, index: u64) -> Result<BatEntry, ImageError> {
        let (page, within) = (index / PAGE_ENTRIES, (index % PAGE_ENTRIES) as usize);
        if let Some(entry) = self.pages.find(page, within) {
            return Ok(BatEntry(entry));
        }
        if !self.is_populated(page) {
            return Ok(BatEntry(0));
        }
        self.pages.entry(page, within, &|| self.read_page(page)).map(BatEntry)
    }

    /// How many blocks from `block` on are known to be absent because their page never held anything.
    pub(super) fn absent_run(&self, block: u64) -> u64 {
        let index = self.table.layout.index_of(block);
        let page = index / PAGE_ENTRIES;
        if self.is_populated(page) {
            return 0;
        }
        // The page's last payload entry; bitmap entries in between only make the run shorter.
        let chunk_end = (block / self.table.layout.chunk_ratio + 1) * self.table.layout.chunk_ratio;
        let page_end = block + ((page + 1) * PAGE_ENTRIES - index);
        page_end.min(chunk_end).min(self.table.layout.blocks) - block
    }

    fn read_page(&self, page: u64) -> Result<Entries, ImageError> {
        let mut buf = [0; SECTOR];
        let offset = self.page_offset(page);
        self.view
            .read_at(&mut buf, offset)
            .map_err(|e| ImageError::io(format!("reading the BAT at {offset:#x}"), e))?;
        let entries: Entries = std::array::from_fn(|i| u64_at(&buf, i * 8));
        self.revalidate(page, &entries)?;
        Ok(entries)
    }

    /// The table was validated when the image was opened; this is for files that changed behind our back since.
    fn revalidate(&self, page: u64, entries: &Entries) -> Result<(), ImageError> {
        let table = Table { file_len: super::MAX_FILE_SIZE, ..self.table };
        let mut owners = Owners::new(table.layout);
        for (index, entry) in
            (page * PAGE_ENTRIES..table.layout.entries).zip(entries).filter(|(_, e)| **e != 0)
        {
            let (_, owner) = owners.at(index);
            table.validate_entry(index, owner, BatEntry(*entry))?;
        }
        Ok(())
    }

    /// Has a page in memory until it is released, since it is going to be changed. Nothing happens when that fails.
    pub(super) fn pin(&self, page: u64) -> Result<(), ImageError> {
        self.pages.pin(page, &|| self.read_page(page))
    }

    /// Says of pages that are pinned that their places in the file have what they have in memory.
    pub(super) fn release(&self, pages: impl IntoIterator<Item = u64>) {
        self.pages.release(pages);
    }

    /// The 4 KiB of a pinned page as they are now, with changes that are not published yet.
    pub(super) fn encode_page(&self, page: u64, changes: &[(u64, BatEntry)]) -> Vec<u8> {
        let mut entries = self.pages.pinned(page);
        for (index, entry) in changes.iter().filter(|(index, _)| index / PAGE_ENTRIES == page) {
            entries[(index % PAGE_ENTRIES) as usize] = entry.0;
        }
        entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    }

    /// Makes a change of a pinned page that is in the log visible.
    pub(super) fn publish(&self, index: u64, entry: BatEntry) {
        let (page, within) = (index / PAGE_ENTRIES, (index % PAGE_ENTRIES) as usize);
        // First: whoever sees the entry also sees, when the page is in memory no more, that it has to be read.
        self.populated[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        self.pages.store(page, within, entry.0);
    }
}

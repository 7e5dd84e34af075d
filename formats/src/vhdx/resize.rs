//! Changing the size of the disk of an image that nobody uses.
//!
//! The new size, the entries of the BAT that share a page with others, and the place of the BAT where that moves go into
//! one entry of the log. The rest of the table is written in place, where the disk of the smaller size does not look.
//!
//! New space reads as zeroes whatever the file holds there: new blocks have no place (of a differencing image: they are
//! said to be zeroes, since the parent may be larger), and what lies in the last block behind the old end is zeroed.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::bat::{BatEntry, PAGE_ENTRIES, state};
use super::guid::Guid;
use super::metadata::{BlockLayout, EntryOwner, Metadata, VIRTUAL_SIZE, valid_items};
use super::offline::{CHUNK, Content, Offline, Pages, first_data, punch, read};
use super::{MAX_VIRTUAL_SIZE, MIB, strict};
use crate::{ByteSpan, ErrorKind, ImageError, Storage};

/// Whether the parent of a differencing image reads as zeroes throughout a span, which may lie beyond its end.
pub type ParentIsZero<'a> = &'a dyn Fn(ByteSpan) -> Result<bool, ImageError>;

/// Gives the disk another size, durably. A crash leaves the old size or the new one, and so does an error of the file: the
/// image says which. The content gets another id, so children of the image would not know it any more.
///
/// `new_size` is in bytes: a multiple of the logical sector size of at most 64 TiB. Making the disk smaller takes `shrink`
/// and a tail that holds nothing. A log that was left is replayed first.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] for a size that is not possible, for a smaller one without `shrink`, and when there is
/// data beyond the new end (with the offset of the first); [`ErrorKind::NeedsRepair`] for a differencing image that its user
/// did not close; what is wrong with the image, or what the file says.
pub fn resize(storage: &Arc<dyn Storage>, new_size: u64, shrink: bool) -> Result<(), ImageError> {
    resize_over(storage, new_size, shrink, &|_| Ok(false))
}

/// [`resize`] of a differencing image whose parent is known. Without knowing it, a tail through which the parent may be
/// seen counts as data, and is hidden by zeroes when the disk grows.
///
/// # Errors
/// As [`resize`], and what `parent_is_zero` says.
pub fn resize_over(
    storage: &Arc<dyn Storage>,
    new_size: u64,
    shrink: bool,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<(), ImageError> {
    resize_as(storage, new_size, shrink, parent_is_zero, Guid::random())
}

/// Makes the disk larger, as [`resize`] does, and gives its content this id: what a child that is to be merged into it knows
/// it by ([`crate::NewParentLink::next_id`]).
///
/// # Errors
/// As [`resize`].
pub fn grow_as(storage: &Arc<dyn Storage>, new_size: u64, content_id: Uuid) -> Result<(), ImageError> {
    resize_as(storage, new_size, false, &|_| Ok(false), Guid(content_id.to_bytes_le()))
}

fn resize_as(
    storage: &Arc<dyn Storage>,
    new_size: u64,
    shrink: bool,
    parent_is_zero: ParentIsZero<'_>,
    content_id: Guid,
) -> Result<(), ImageError> {
    if strict(storage)?.is_unfinished() {
        // The notes of sectors are bound to the size.
        let message = "the image was not closed, and its last writes may not all be in it yet: let blockd serve it again, or \
                       finish it with `blockctl image check --repair`, and then resize it";
        return Err(ImageError::new(ErrorKind::NeedsRepair, message));
    }
    let image = Offline::open(storage)?;
    let metadata = &image.parsed.metadata;
    let (old_size, sector) = (metadata.virtual_size, metadata.logical_sector);
    if new_size == 0 || new_size > MAX_VIRTUAL_SIZE || !new_size.is_multiple_of(sector.into()) {
        return Err(invalid(format!(
            "a disk of {new_size} bytes: a multiple of {sector} up to {MAX_VIRTUAL_SIZE} (64 TiB) is possible"
        )));
    }
    if new_size == old_size {
        // An earlier attempt may have ended before its last sync.
        return storage.sync().map_err(|e| ImageError::io("cannot sync the image", e));
    }
    let new = BlockLayout::new(&Metadata { virtual_size: new_size, ..metadata.clone() });
    let resize = Resize {
        old: image.layout(),
        new,
        old_size,
        new_size,
        differencing: metadata.has_parent,
        fixed: metadata.leave_allocated,
        sector: u64::from(sector),
        parent_is_zero,
        content_id,
        image,
        pages: Pages::default(),
        entries: BTreeMap::new(),
        first_new_block: 0,
    };
    if new_size > old_size {
        return resize.grow();
    }
    if !shrink {
        return Err(invalid(format!(
            "the disk has {old_size} bytes, and {new_size} is smaller: making it smaller has to be asked for (--shrink)"
        )));
    }
    resize.shrink()
}

fn invalid(message: String) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, message)
}

struct Resize<'a> {
    image: Offline,
    old: BlockLayout,
    new: BlockLayout,
    old_size: u64,
    new_size: u64,
    differencing: bool,
    fixed: bool,
    sector: u64,
    parent_is_zero: ParentIsZero<'a>,
    /// Of the content from now on.
    content_id: Guid,
    /// What the transaction changes.
    pages: Pages,
    /// Entries of the old table that change: raw, by their index.
    entries: BTreeMap<u64, u64>,
    /// The unit where the first new block of a fixed image lies; the others follow.
    first_new_block: u64,
}

impl Resize<'_> {
    fn storage(&self) -> Arc<dyn Storage> {
        self.image.storage.clone()
    }

    // --- growing -----------------------------------------------------------------------------------------------------

    fn grow(mut self) -> Result<(), ImageError> {
        self.image.begin(Content::Changes(self.content_id))?;
        self.settle_tail()?;
        let needed = (self.new.entries * 8).next_multiple_of(MIB);
        let region = self.image.parsed.regions.bat;
        let moved = if needed > u64::from(region.len) { Some(self.image.extend(needed)?) } else { None };
        if self.fixed {
            let blocks = self.new.blocks - self.old.blocks;
            self.first_new_block = self.image.extend(blocks * self.new.block_size)? / MIB;
        }
        match moved {
            Some(offset) => {
                self.write_moved_table(offset)?;
                self.image.put_region(&mut self.pages, region, offset, needed as u32)?;
            }
            None => {
                let pages = self.table_pages();
                let logged = self.log_shared_pages(&pages)?;
                self.write_other_pages(&pages, &logged)?;
            }
        }
        self.put_size()?;
        self.image.commit(std::mem::take(&mut self.pages))?;
        let storage = self.storage();
        self.image.close()?;
        if moved.is_some() { punch(&*storage, region.offset, region.len.into()) } else { Ok(()) }
    }

    /// Makes what lies behind the old end in the last block read as zeroes once the disk reaches there.
    fn settle_tail(&mut self) -> Result<(), ImageError> {
        if self.old.last_block_len == self.old.block_size {
            return Ok(());
        }
        let block = self.old.blocks - 1;
        let index = self.old.index_of(block);
        let entry = self.image.entry(index)?;
        let (from, to) = (self.old.last_block_len, self.old.block_size);
        match entry.state() {
            state::FULLY_PRESENT => punch(&*self.storage(), entry.unit() * MIB + from, to - from),
            state::PARTIALLY_PRESENT => {
                punch(&*self.storage(), entry.unit() * MIB + from, to - from)?;
                self.own_tail(block, false)
            }
            state::NOT_PRESENT if self.differencing => {
                let end = ((block + 1) * to).min(self.new_size);
                if (self.parent_is_zero)(ByteSpan::new(self.old_size, end - self.old_size))? {
                    return Ok(());
                }
                let unit = self.image.extend(to)? / MIB;
                self.entries.insert(index, unit << 20 | u64::from(state::PARTIALLY_PRESENT));
                self.own_tail(block, true)
            }
            _ => Ok(()),
        }
    }

    /// Marks the sectors of the last block from the old end up to the new one as the image's own; with `anew` they are the
    /// only ones.
    fn own_tail(&mut self, block: u64, anew: bool) -> Result<(), ImageError> {
        let bits = self.old.block_size / self.sector;
        let chunk = block / self.old.chunk_ratio;
        let index = (chunk + 1) * self.old.chunk_ratio + chunk;
        let within = (block % self.old.chunk_ratio) * bits / 8;
        let entry = self.image.entry(index)?;
        let storage = self.storage();
        let fresh = entry.state() != state::FULLY_PRESENT;
        let place = if fresh { self.image.extend(MIB)? } else { entry.unit() * MIB };
        if fresh {
            self.entries.insert(index, BatEntry::present(place / MIB).0);
        }
        let mut bitmap = vec![0; (bits / 8) as usize];
        if !anew {
            read(&*storage, &mut bitmap, place + within)?;
        }
        let end = (self.new_size - block * self.old.block_size).min(self.old.block_size) / self.sector;
        for bit in self.old.last_block_len / self.sector..end {
            bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        if fresh {
            let written = storage.write_at(&bitmap, place + within);
            return written.map_err(|e| ImageError::io("writing a sector bitmap", e));
        }
        self.pages.put(&*storage, place + within, &bitmap)
    }

    // --- the table ---------------------------------------------------------------------------------------------------

    /// The raw entry at `index` as it is to become, if it is another one than now.
    fn changed_entry(&self, index: u64) -> Option<u64> {
        if let Some(raw) = self.entries.get(&index) {
            return Some(*raw);
        }
        let chunks = self.old.blocks.min(self.new.blocks).div_ceil(self.new.chunk_ratio);
        match self.new.owner_of(index) {
            Some(EntryOwner::Payload(block)) if block < self.old.blocks => None,
            Some(EntryOwner::Payload(block)) if self.fixed => {
                let unit = self.first_new_block + (block - self.old.blocks) * self.new.units_per_block();
                Some(BatEntry::present(unit).0)
            }
            Some(EntryOwner::Payload(_)) if self.differencing => Some(BatEntry::ZERO.0),
            Some(EntryOwner::Payload(_)) => Some(0),
            Some(EntryOwner::Bitmap(chunk)) if self.differencing && chunk < chunks => None,
            Some(EntryOwner::Bitmap(_)) | None => Some(0),
        }
    }

    /// The first entry that may change because of the size.
    fn first_changed(&self) -> u64 {
        let blocks = self.old.blocks.min(self.new.blocks);
        // The entry of a sector bitmap may come before that of the first new block.
        self.new.index_of(blocks).min(self.old.entries).min(self.new.entries)
    }

    /// One past the last entry that may change.
    fn end_changed(&self) -> u64 {
        self.old.entries.max(self.new.entries)
    }

    /// The pages of the table that change, in order, but for those of single entries of the old one.
    fn table_pages(&self) -> std::ops::Range<u64> {
        let (first, end) = (self.first_changed(), self.end_changed());
        if first < end { first / PAGE_ENTRIES..end.div_ceil(PAGE_ENTRIES) } else { 0..0 }
    }

    /// Puts what changes on pages of the table that also hold what stays into the transaction. These pages.
    fn log_shared_pages(&mut self, pages: &std::ops::Range<u64>) -> Result<Vec<u64>, ImageError> {
        let kept = self.old.blocks.min(self.new.blocks);
        let mut shared: Vec<u64> = self.entries.keys().map(|index| index / PAGE_ENTRIES).collect();
        if !pages.is_empty() {
            shared.push(pages.start);
            // The bitmap entry of the last chunk that stays lies behind the entries that do not.
            let chunk = (kept - 1) / self.new.chunk_ratio;
            shared.push(((chunk + 1) * self.new.chunk_ratio + chunk) / PAGE_ENTRIES);
        }
        shared.sort_unstable();
        shared.dedup();
        let storage = self.storage();
        let table = u64::from(self.image.parsed.regions.bat.len) / 8;
        for page in &shared {
            for index in page * PAGE_ENTRIES..((page + 1) * PAGE_ENTRIES).min(table) {
                if let Some(raw) = self.changed_entry(index) {
                    self.pages.put(&*storage, self.image.entry_place(index), &raw.to_le_bytes())?;
                }
            }
        }
        Ok(shared)
    }

    /// Writes the pages of the table that hold nothing that stays, which the disk of the smaller size does not have.
    fn write_other_pages(&self, pages: &std::ops::Range<u64>, logged: &[u64]) -> Result<(), ImageError> {
        let storage = self.storage();
        let mut at = pages.start;
        while at < pages.end {
            let stop = logged.iter().copied().filter(|page| *page >= at).min().unwrap_or(pages.end);
            let stop = stop.min(pages.end).min(at + CHUNK / 4096);
            if stop == at {
                at += 1;
                continue;
            }
            let entries = at * PAGE_ENTRIES..stop * PAGE_ENTRIES;
            let raw: Vec<u8> =
                entries.flat_map(|index| self.changed_entry(index).unwrap_or(0).to_le_bytes()).collect();
            let place = self.image.entry_place(at * PAGE_ENTRIES);
            if raw.iter().all(|b| *b == 0) {
                punch(&*storage, place, raw.len() as u64)?;
            } else {
                storage.write_at(&raw, place).map_err(|e| ImageError::io("writing the BAT", e))?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Writes the whole table to a place that nothing uses yet, and which reads as zeroes.
    fn write_moved_table(&self, offset: u64) -> Result<(), ImageError> {
        let storage = self.storage();
        let first = self.first_changed();
        let mut at = 0;
        while at < self.new.entries {
            let stop = (at + CHUNK / 8).min(self.new.entries);
            let mut raw = vec![0; (stop - at) as usize * 8];
            let old = self.old.entries.clamp(at, stop);
            read(&*storage, &mut raw[..(old - at) as usize * 8], self.image.entry_place(at))?;
            let changed = (at.max(first)..stop).chain(self.entries.range(at..stop).map(|(index, _)| *index));
            for index in changed {
                if let Some(entry) = self.changed_entry(index) {
                    raw[(index - at) as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
                }
            }
            if raw.iter().any(|b| *b != 0) {
                storage
                    .write_at(&raw, offset + at * 8)
                    .map_err(|e| ImageError::io("writing the new BAT", e))?;
            }
            at = stop;
        }
        Ok(())
    }

    fn put_size(&mut self) -> Result<(), ImageError> {
        let region = self.image.parsed.regions.metadata;
        let storage = self.storage();
        let items = valid_items(&*storage, region)?;
        let item = items.iter().find(|item| item.id == VIRTUAL_SIZE && !item.is_user());
        let item = item.expect("validated with the image");
        self.pages.put(&*storage, region.offset + u64::from(item.offset), &self.new_size.to_le_bytes())
    }

    // --- shrinking ---------------------------------------------------------------------------------------------------

    fn shrink(mut self) -> Result<(), ImageError> {
        let dropped = self.look_for_data()?;
        self.image.begin(Content::Changes(self.content_id))?;
        let pages = self.table_pages();
        let logged = self.log_shared_pages(&pages)?;
        self.put_size()?;
        self.image.commit(std::mem::take(&mut self.pages))?;
        // From here on these are behind the table's end.
        self.write_other_pages(&pages, &logged)?;
        let storage = self.storage();
        self.image.close()?;
        for (at, len) in dropped {
            punch(&*storage, at, len)?;
        }
        // What is left at the end is cut off when a session begins.
        let mut image = Offline::open(&storage)?;
        if image.slack() > 0 {
            image.begin(Content::Stays)?;
        }
        image.close()
    }

    /// Makes sure that nothing is lost with the tail. The places that its blocks have: (offset, bytes).
    fn look_for_data(&self) -> Result<Vec<(u64, u64)>, ImageError> {
        let first = self.new_size / self.old.block_size;
        let storage = self.storage();
        let mut next = first;
        let mut dropped = Vec::new();
        self.image.parsed.table.stream(&*storage, |index, entry| {
            let owner = self.old.owner_of(index);
            let place = (entry.unit() * MIB, self.old.block_size);
            match owner {
                Some(EntryOwner::Payload(block)) if block >= first => {
                    self.check_absent(next, block)?;
                    self.check_block(block, entry)?;
                    next = block + 1;
                    let placed = matches!(entry.state(), state::FULLY_PRESENT | state::PARTIALLY_PRESENT);
                    dropped.extend((placed && block >= self.new.blocks).then_some(place));
                }
                Some(EntryOwner::Bitmap(chunk))
                    if chunk >= self.new.blocks.div_ceil(self.new.chunk_ratio) =>
                {
                    dropped.extend((entry.state() == state::FULLY_PRESENT).then_some((place.0, MIB)));
                }
                _ => {}
            }
            Ok(())
        })?;
        self.check_absent(next, self.old.blocks)?;
        Ok(dropped)
    }

    /// The part of a block that the shrinking takes away: from where to where in the block.
    fn lost_part(&self, block: u64) -> (u64, u64) {
        let start = block * self.old.block_size;
        let from = self.new_size.saturating_sub(start);
        (from, (self.old_size - start).min(self.old.block_size))
    }

    /// Blocks `from..to` have no entry but 0.
    fn check_absent(&self, from: u64, to: u64) -> Result<(), ImageError> {
        if !self.differencing || from >= to {
            return Ok(());
        }
        let start = (from * self.old.block_size).max(self.new_size);
        self.check_parent(start, (to * self.old.block_size).min(self.old_size))
    }

    fn check_parent(&self, start: u64, end: u64) -> Result<(), ImageError> {
        if start >= end || (self.parent_is_zero)(ByteSpan::new(start, end - start))? {
            return Ok(());
        }
        Err(invalid(format!(
            "the {} bytes at {start} of the disk, beyond the new size of {}, show what the parent holds there: merge the \
             image into its parent first, or zero that range",
            end - start,
            self.new_size
        )))
    }

    fn check_block(&self, block: u64, entry: BatEntry) -> Result<(), ImageError> {
        let (from, to) = self.lost_part(block);
        let start = block * self.old.block_size;
        match entry.state() {
            state::NOT_PRESENT => return self.check_absent(block, block + 1),
            state::PARTIALLY_PRESENT if !self.all_own(block, from, to)? => {
                self.check_parent(start + from, start + to)?;
            }
            state::FULLY_PRESENT | state::PARTIALLY_PRESENT => {}
            _ => return Ok(()),
        }
        let place = entry.unit() * MIB;
        match first_data(&*self.storage(), place + from, place + to)? {
            None => Ok(()),
            Some(at) => {
                let offset = (start + at - place) / self.sector * self.sector;
                Err(invalid(format!(
                    "the disk holds data at {offset}, beyond the new size of {}: move it or zero it first, or choose a \
                     size that includes it",
                    self.new_size
                )))
            }
        }
    }

    /// Whether the image has all sectors of a part of a partially present block.
    fn all_own(&self, block: u64, from: u64, to: u64) -> Result<bool, ImageError> {
        let chunk = block / self.old.chunk_ratio;
        let entry = self.image.entry((chunk + 1) * self.old.chunk_ratio + chunk)?;
        let bits = self.old.block_size / self.sector;
        let mut bitmap = vec![0; (bits / 8) as usize];
        let within = (block % self.old.chunk_ratio) * bits / 8;
        read(&*self.storage(), &mut bitmap, entry.unit() * MIB + within)?;
        let is_own = |bit: u64| bitmap[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
        Ok((from / self.sector..to / self.sector).all(is_own))
    }
}

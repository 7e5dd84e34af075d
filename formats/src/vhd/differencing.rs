//! The map of a differencing disk: what it has of its own, sector by sector, over a parent that it does not know.
//!
//! ```text
//!   block without a place                    the parent's
//!   block with a place: bitmap, sector by sector    0  the parent's        1  its own
//! ```
//!
//! **A sector's way.** A write finds or makes a place for its block: a slot whose bitmap is zero, durably, so that nothing
//! changes for readers (see `grow`). The payload is written there, then [`Differencing::wrote`] says so: from here on the
//! sector is its own, in memory and in the notes file. Its bit in the file waits for a sync that began after that, since
//! a power cut could keep the bit and lose the payload, which would be neither the old content nor the new. The table
//! entry was handed to the kernel before, so the same sync has made it durable too.
//!
//! ```text
//!   sync_begin ── sync: payload, table ── sync_done: bits to the page cache ── sync: bits ── sync_done: nothing left
//! ```
//!
//! **Orders.** Bits in the file only ever change from 0 to 1, under the lock of `bitmaps`; a block that has a place keeps
//! it. A reader takes no lock: it loads the block's entry (acquire; the entry was released after its slot was made) and
//! asks the own sectors, which answer 1 for all that [`Differencing::wrote`] was done with before the reader began. One
//! that sees 0 goes to the parent, whose content is the old one; one that sees 1 finds a payload that is written. A
//! bitmap that is read while bits are written to it gives old bits or new ones: new ones count as pending until
//! `recorded` is called after the write, and loads that are under way then get them on top.
//!
//! **Two syncs at most.** A flush has to wait for a further sync when bits were written after its own sync began,
//! by itself or by another flush that took the same sectors. `bitmaps` holds the number of the last token that was given
//! when bits were written last; a sync with a later token has them. What a flush owes is recorded before it asks for
//! its second sync, so that one is the last.
//!
//! The format has no way to say that a sector reads as zeroes: zeroes over a parent's content are written (as holes of
//! the file where the host can).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::flat::state_in_file;
use crate::own::{OwnSectors, PAGE_SECTORS, PAGES_MAX, PageBits, Wrote};
use crate::{AllocState, ByteSpan, Extent, ImageError, NotesFile, Piece, Pieces, Place, Storage, SyncToken};

use super::SECTOR;
use super::dynamic::{Dynamic, Part};

/// Set in the token of a flush's second sync, after which nothing is left to do.
const LAST: u64 = 1 << 63;
/// Sectors that a sector of a bitmap stands for.
const BITS: u64 = SECTOR * 8;

/// An open differencing disk.
#[derive(Debug)]
pub(super) struct Differencing {
    blocks: Dynamic,
    own: OwnSectors,
    /// The last token that was given.
    tokens: AtomicU64,
    /// Held while bits are written to the file: the last token that was given when that was done last.
    bitmaps: Mutex<u64>,
    /// Whether it was said that notes cannot be written.
    notes_failed: AtomicBool,
    /// Whether the last attempt to write bits failed: maintenance leaves it to the next flush to try again.
    record_failed: AtomicBool,
}

impl Differencing {
    /// The disk whose blocks are `blocks`, with the notes of its pending sectors under the disk's `id`.
    pub(super) fn new(blocks: Dynamic, notes: Option<NotesFile>, id: uuid::Uuid) -> Result<Self, ImageError> {
        let sectors = blocks.shape().virtual_size / SECTOR;
        let own = OwnSectors::new(sectors, PAGES_MAX, notes.map(|file| (file, id.into_bytes())))?;
        let disk = Self {
            blocks,
            own,
            tokens: AtomicU64::new(0),
            bitmaps: Mutex::new(0),
            notes_failed: AtomicBool::new(false),
            record_failed: AtomicBool::new(false),
        };
        disk.forget_impossible_notes();
        Ok(disk)
    }

    /// Forgets what notes say of blocks that have no place: a place is given before anything is noted of it, so somebody
    /// has put another file in this one's stead.
    fn forget_impossible_notes(&self) {
        let recovered = self.own.recovered();
        if !recovered.is_empty() {
            tracing::info!(
                ranges = recovered.len(),
                "VHD: sectors that a killed process had written are kept"
            );
        }
        for range in recovered {
            for part in self.parts(range.start, range.end - range.start) {
                if self.blocks.entry(part.block).is_none() {
                    tracing::warn!(block = part.block, "VHD: notes of a block that has no place are ignored");
                    self.own.clear(self.sector(&part), part.len / SECTOR);
                }
            }
        }
    }

    pub(super) fn blocks(&self) -> &Dynamic {
        &self.blocks
    }

    fn storage(&self) -> &dyn Storage {
        &*self.blocks.files()[0]
    }

    /// The parts of these sectors, block by block.
    fn parts(&self, first: u64, count: u64) -> impl Iterator<Item = Part> + use<> {
        self.blocks.parts(ByteSpan::new(first * SECTOR, count * SECTOR))
    }

    /// The first sector of a part.
    fn sector(&self, part: &Part) -> u64 {
        (part.block * self.blocks.shape().block_size + part.within) / SECTOR
    }

    pub(super) fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.blocks.check_span(at)?;
        for mut part in self.blocks.parts(at) {
            let Some(entry) = self.blocks.entry(part.block) else {
                out.push(Piece { len: part.len, place: Place::Parent });
                continue;
            };
            let (first, count) = (self.sector(&part), part.len / SECTOR);
            self.own.runs(first, count, &|page, bits| self.load(page, bits), &mut |sectors, own| {
                part.len = sectors * SECTOR;
                let piece = self.blocks.piece(entry, &part);
                out.push(if own { piece } else { Piece { place: Place::Parent, ..piece } });
                part.within += part.len;
            })?;
        }
        Ok(())
    }

    pub(super) fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.blocks.check_writable()?;
        self.blocks.check_span(at)?;
        for part in self.blocks.parts(at) {
            let entry = self.blocks.entry_for_writing(part.block)?;
            out.push(self.blocks.piece(entry, &part));
        }
        Ok(())
    }

    /// Everything is for the caller to zero, but blocks that have no place over a parent that reads as zeroes there. (A
    /// block may get its place right after that: then `wrote` makes sectors its own that were not zeroed. They lie in a
    /// slot that reads as zeroes, or hold what somebody else has written to them at the same time.)
    pub(super) fn map_zero_over(
        &self,
        at: ByteSpan,
        below: &dyn Fn(ByteSpan) -> Result<bool, ImageError>,
        out: &mut Pieces,
    ) -> Result<(), ImageError> {
        self.blocks.check_writable()?;
        self.blocks.check_span(at)?;
        for part in self.blocks.parts(at) {
            let entry = match self.blocks.entry(part.block) {
                Some(entry) => entry,
                None if below(ByteSpan::new(self.sector(&part) * SECTOR, part.len))? => continue,
                None => self.blocks.entry_for_writing(part.block)?,
            };
            out.push(self.blocks.piece(entry, &part));
        }
        Ok(())
    }

    pub(super) fn wrote(&self, at: ByteSpan) -> Result<(), ImageError> {
        self.blocks.check_writable()?;
        self.blocks.check_span(at)?;
        for part in self.blocks.parts(at) {
            // Zeroes over zeroes of the parent have left the block without a place.
            if self.blocks.entry(part.block).is_some() {
                self.own_now(self.sector(&part), part.len / SECTOR)?;
            }
        }
        Ok(())
    }

    /// Makes sectors own whose payload is written.
    fn own_now(&self, first: u64, count: u64) -> Result<(), ImageError> {
        loop {
            match self.own.wrote(first, count, &|page, bits| self.load(page, bits))? {
                Wrote::Already | Wrote::Noted => return Ok(()),
                Wrote::NotNoted(e) => {
                    if !self.notes_failed.swap(true, Ordering::Relaxed) {
                        tracing::warn!(error = %e, "VHD: notes cannot be written, so first writes wait for the disk");
                    }
                    return self.settle();
                }
                Wrote::Crowded => self.settle()?,
            }
        }
    }

    /// Writes the bits of all that was written before, after a sync that makes that durable: the death of the process does
    /// not lose them any more.
    fn settle(&self) -> Result<(), ImageError> {
        let token = self.sync_begin();
        self.blocks.sync()?;
        self.sync_done(token).map(drop)
    }

    pub(super) fn sync_begin(&self) -> SyncToken {
        let token = self.tokens.fetch_add(1, Ordering::SeqCst) + 1;
        self.own.begin(token);
        SyncToken(token)
    }

    pub(super) fn sync_done(&self, token: SyncToken) -> Result<Option<SyncToken>, ImageError> {
        if self.blocks.is_read_only() || token.0 & LAST != 0 {
            return Ok(None);
        }
        self.blocks.check_writable()?;
        let mut written_at = self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = self.own.take(token.0);
        if !ranges.is_empty() {
            self.record(&mut written_at, &ranges)?;
        }
        Ok((*written_at >= token.0).then_some(SyncToken(token.0 | LAST)))
    }

    pub(super) fn sync_failed(&self, why: &str) {
        self.blocks.sync_failed(why);
    }

    /// Writes the bits of sectors whose payload is durable.
    fn record(
        &self,
        written_at: &mut MutexGuard<'_, u64>,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<(), ImageError> {
        let done = self.write_bits(ranges);
        // After the writing, and also where a part of it failed: tokens up to this one were given before.
        **written_at = self.tokens.load(Ordering::SeqCst);
        self.record_failed.store(done.is_err(), Ordering::Relaxed);
        match done {
            Ok(()) => self.own.recorded(ranges),
            // What was written of it is written again.
            Err(_) => self.own.give_back(ranges),
        }
        done
    }

    /// Sets bits in the bitmaps of the file, a sector of a bitmap at a time; all others stay as they are.
    fn write_bits(&self, ranges: &[std::ops::Range<u64>]) -> Result<(), ImageError> {
        let mut open: Option<BitmapSector> = None;
        for range in ranges {
            for part in self.parts(range.start, range.end - range.start) {
                let entry = self.blocks.entry(part.block).expect("what was written has a place");
                let (mut bit, end) = (part.within / SECTOR, (part.within + part.len) / SECTOR);
                while bit < end {
                    let count = (BITS - bit % BITS).min(end - bit);
                    let at = u64::from(entry) * SECTOR + bit / BITS * SECTOR;
                    let mut sector = match open.take() {
                        Some(sector) if sector.at == at => sector,
                        other => {
                            other.map_or(Ok(()), |done| self.write_bitmap(&done))?;
                            self.read_bitmap(at)?
                        }
                    };
                    sector.set(bit % BITS, count);
                    open = Some(sector);
                    bit += count;
                }
            }
        }
        open.map_or(Ok(()), |last| self.write_bitmap(&last))
    }

    fn read_bitmap(&self, at: u64) -> Result<BitmapSector, ImageError> {
        let mut sector = BitmapSector { at, bytes: [0; SECTOR as usize], changed: false };
        self.storage().read_at(&mut sector.bytes, at).map_err(|e| bitmap_unread(at, e))?;
        Ok(sector)
    }

    fn write_bitmap(&self, sector: &BitmapSector) -> Result<(), ImageError> {
        if !sector.changed {
            return Ok(());
        }
        let at = sector.at;
        self.storage()
            .write_at(&sector.bytes, at)
            .map_err(|e| self.blocks.fatal(ImageError::io(format!("writing the sector bitmap at {at}"), e)))
    }

    /// Reads the bits of a page of 4096 sectors from the bitmaps of the file.
    fn load(&self, page: u64, bits: &mut PageBits) -> Result<(), ImageError> {
        let first = page * PAGE_SECTORS;
        let sectors = self.blocks.shape().virtual_size / SECTOR;
        let mut raw = [0; SECTOR as usize];
        for part in self.parts(first, PAGE_SECTORS.min(sectors.saturating_sub(first))) {
            let Some(entry) = self.blocks.entry(part.block) else { continue };
            // Pages and blocks are powers of two: a part begins at a whole byte of its bitmap.
            let (bit, count) = (part.within / SECTOR, part.len / SECTOR);
            let raw = &mut raw[..count.div_ceil(8) as usize];
            let at = u64::from(entry) * SECTOR + bit / 8;
            self.storage().read_at(raw, at).map_err(|e| bitmap_unread(at, e))?;
            put_bits(bits, self.sector(&part) - first, raw, count);
        }
        Ok(())
    }

    /// Whether so much is pending that it is time to settle it, in an image that takes writes.
    fn wants_settling(&self) -> bool {
        self.own.is_crowded()
            && !self.record_failed.load(Ordering::Relaxed)
            && self.blocks.check_writable().is_ok()
    }

    pub(super) fn wants_maintenance(&self) -> bool {
        self.wants_settling() || self.blocks.wants_maintenance()
    }

    pub(super) fn maintain(&self) -> Result<(), ImageError> {
        if self.wants_settling() {
            self.settle()?;
        }
        self.blocks.maintain()
    }

    pub(super) fn commit(&self) -> Result<(), ImageError> {
        if self.blocks.is_read_only() {
            return Ok(());
        }
        let mut token = Some(self.sync_begin());
        while let Some(begun) = token {
            self.blocks.sync()?;
            token = self.sync_done(begun)?;
        }
        Ok(())
    }

    pub(super) fn close(&self) -> Result<(), ImageError> {
        if self.blocks.is_read_only() {
            return Ok(());
        }
        self.commit()?;
        if !self.own.has_pending() {
            self.own.drop_notes()?;
        }
        self.blocks.close()
    }

    pub(super) fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        let shape = self.blocks.shape();
        if offset >= shape.virtual_size {
            return Ok(None);
        }
        let (block, within) = (offset / shape.block_size, offset % shape.block_size);
        let Some(entry) = self.blocks.entry(block) else { return self.blocks.next_extent(offset) };
        let block_end = ((block + 1) * shape.block_size).min(shape.virtual_size);
        let (own, sectors) = self.run(offset / SECTOR, block_end / SECTOR)?;
        let len = sectors * SECTOR - offset % SECTOR;
        let (state, len) = if own {
            state_in_file(self.storage(), shape.data_at(entry) + within, len)?
        } else {
            (AllocState::Absent, len)
        };
        Ok(Some(Extent { span: ByteSpan::new(offset, len), state }))
    }

    /// Whether sector `first` is own, and how many from it on are alike, up to `end`. Looks at more and more at a time, so
    /// that going through a block takes time in its size, however it is torn.
    fn run(&self, first: u64, end: u64) -> Result<(bool, u64), ImageError> {
        let (mut own, mut len, mut over, mut window) = (false, 0, false, 64);
        while !over && first + len < end {
            let count = (end - first - len).min(window);
            self.own.runs(
                first + len,
                count,
                &|page, bits| self.load(page, bits),
                &mut |sectors, is_own| {
                    if len == 0 {
                        own = is_own;
                    }
                    over |= own != is_own;
                    len += if over { 0 } else { sectors };
                },
            )?;
            window *= 2;
        }
        Ok((own, len))
    }

    pub(super) fn files(&self) -> &[Arc<dyn Storage>] {
        self.blocks.files()
    }
}

fn bitmap_unread(at: u64, e: std::io::Error) -> ImageError {
    ImageError::io(format!("reading the sector bitmap at {at}"), e)
}

/// A sector of a bitmap. The first bit of a byte is its highest.
#[derive(Debug)]
struct BitmapSector {
    at: u64,
    bytes: [u8; SECTOR as usize],
    changed: bool,
}

impl BitmapSector {
    fn set(&mut self, first: u64, count: u64) {
        for bit in first..first + count {
            let byte = &mut self.bytes[(bit / 8) as usize];
            let with = *byte | 0x80 >> (bit % 8);
            self.changed |= *byte != with;
            *byte = with;
        }
    }
}

/// Puts the first `count` bits of a part of a bitmap at bit `at` of a page. Whole bytes, or a power of two of bits that do not
/// cross a word.
fn put_bits(bits: &mut PageBits, at: u64, raw: &[u8], count: u64) {
    for (n, byte) in (0u64..).zip(raw) {
        let in_byte = (count - 8 * n).min(8);
        let word = u64::from(byte.reverse_bits()) & (u64::MAX >> (64 - in_byte));
        let to = at + 8 * n;
        bits[(to / 64) as usize] |= word << (to % 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_bit_of_a_byte_is_the_first_sector() {
        let mut bits = [0; 64];
        put_bits(&mut bits, 64, &[0b1000_0001, 0b0100_0000], 16);
        assert_eq!(bits[1], 1 | 1 << 7 | 1 << 9);
        let mut bits = [0; 64];
        put_bits(&mut bits, 60, &[0xff], 4);
        assert_eq!((bits[0], bits[1]), (0xf << 60, 0));
        let mut sector = BitmapSector { at: 0, bytes: [0; 512], changed: false };
        sector.set(6, 4);
        assert_eq!(sector.bytes[..2], [0b0000_0011, 0b1100_0000]);
    }

    #[test]
    fn setting_what_is_set_changes_nothing() {
        let mut sector = BitmapSector { at: 0, bytes: [0xff; 512], changed: false };
        sector.set(0, BITS);
        assert!(!sector.changed);
    }
}

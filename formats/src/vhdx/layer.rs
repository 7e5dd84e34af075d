//! A differencing image: which of its sectors are its own, and how they become so.
//!
//! ```text
//!   NOT_PRESENT ──map_write──► PARTIALLY_PRESENT, no bit set ──wrote──► own in memory, noted
//!        │                         │      ▲                                  │ sync: payload durable
//!        │                         │      └────── log entry with bits ◄──────┤
//!        └──zeroed──► ZERO ◄───────┴──zeroed── FULLY_PRESENT ◄── log entry ◄─┘ all bits of the block
//!                       └──────────map_write──────────▲
//! ```
//!
//! **A block never goes back.** Nothing becomes NOT_PRESENT again (that would reveal the parent), and PARTIALLY_PRESENT comes
//! from NOT_PRESENT only. So a block is partially present once in its life, in one place, and its bits are only ever set
//! while it is. What of them is left over afterwards (in the file, in memory, in notes) is never looked at again.
//!
//! **Readers take no lock.** A reader takes the entry, then the bits, then looks whether the entry is still the same. Who
//! changes the entry shows the new one before bits are forgotten, so a reader that has seen too few bits sees the new entry
//! too, and begins again; entries change twice at most. Bits that were set meanwhile do no harm: what they name was written
//! by somebody who has not been told so yet when the reader began.
//!
//! **A write beside a discard.** `wrote` looks at the entry without a lock. If the block is discarded before or after, it is
//! not PARTIALLY_PRESENT when bits are to be recorded, and never will be: what `wrote` left is dropped then.
//!
//! **A flush** takes what was written before it began, which is durable when its sync ends, and records it under the lock. If
//! anything at all was recorded after its sync began, by whomever, it needs another sync. That one is marked in its token and
//! records nothing, so it is the last.
//!
//! **Old bits.** A block that is not present may have bits in the file from somebody else's hands. They are not loaded
//! ([`Vhdx::load_bits`]), and the log entry that makes the block partially present clears them.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::bat::{Bat, BatEntry, PAGE_ENTRIES, TABLE_PAGES_MAX, state};
use super::bitmap::{BitSpan, Bitmaps, CHUNK_SECTORS, Edit};
use super::log_entry::SECTOR;
use super::log_writer::PAGES_MAX;
use super::parse::Parsed;
use super::session::{Changes, Inner};
use super::{Vhdx, on_sectors};
use crate::own::{OwnSectors, PAGE_SECTORS, PageBits, Wrote};
use crate::{
    AllocState, ByteSpan, ErrorKind, FileIndex, ImageError, Layer, ParentLink, Piece, Pieces, Place, Storage,
    SyncToken, ZeroMode,
};

/// Marks the token of a flush's second sync.
const SECOND: u64 = 1 << 63;
/// So often a write gives way to others that fill the notes before it gives up.
const CROWDED_MAX: usize = 100;

/// Ranges of own sectors that are looked at for one entry of the log.
const RANGES_MAX: usize = 1024;

/// Sectors whose bits are looked at together.
const WORD_SECTORS: u64 = 64;

/// What a differencing image has more than others.
#[derive(Debug)]
pub(super) struct Differences {
    pub(super) own: OwnSectors,
    pub(super) bitmaps: Bitmaps,
    pub(super) link: ParentLink,
}

impl Vhdx {
    fn sector(&self) -> u64 {
        u64::from(self.metadata.logical_sector)
    }

    /// Sectors of a block that belong to the disk.
    pub(super) fn sectors_of(&self, block: u64) -> u64 {
        self.block_len(block) / self.sector()
    }

    fn bit_spans(
        &self,
        diff: &Differences,
        block: u64,
    ) -> Result<impl Iterator<Item = BitSpan> + use<>, ImageError> {
        let bitmap = self.bat.bitmap_offset(self.chunk_of(block))?;
        let spans = bitmap.map(|bitmap| diff.bitmaps.spans(block, self.sectors_of(block), bitmap));
        Ok(spans.into_iter().flatten())
    }

    fn chunk_of(&self, block: u64) -> u64 {
        block / self.bat.layout().chunk_ratio
    }

    /// Reads the bits of one page of own sectors as they are recorded. Blocks that are not partially present have none: the
    /// entry is looked at first, so that a block which becomes so meanwhile is seen without old bits.
    fn load_bits(&self, diff: &Differences, page: u64, bits: &mut PageBits) -> Result<(), ImageError> {
        let (first, per_block) = (page * PAGE_SECTORS, diff.bitmaps.block_sectors);
        let blocks =
            first / per_block..(first + PAGE_SECTORS).div_ceil(per_block).min(self.bat.layout().blocks);
        for block in blocks {
            if self.bat.block(block)?.state() != state::PARTIALLY_PRESENT {
                continue;
            }
            for span in self.bit_spans(diff, block)? {
                let (from, to) =
                    (span.sector.max(first), (span.sector + span.count).min(first + PAGE_SECTORS));
                if from >= to {
                    continue;
                }
                let at = ((span.bit + from - span.sector) / 8) as usize;
                let mut bytes = vec![0; (to - from).div_ceil(8) as usize];
                diff.bitmaps.bytes(span.page, at, &mut bytes)?;
                for (i, byte) in bytes.into_iter().enumerate() {
                    let bit = from - first + i as u64 * 8;
                    bits[(bit / 64) as usize] |= u64::from(byte) << (bit % 64);
                }
            }
        }
        Ok(())
    }

    /// The runs of own sectors and others within a block; `None` when its entry changed meanwhile.
    fn runs(
        &self,
        diff: &Differences,
        (block, entry): (u64, BatEntry),
        (first, count): (u64, u64),
        each: &mut dyn FnMut(u64, bool),
    ) -> Result<Option<()>, ImageError> {
        diff.own.runs(first, count, &|page, bits| self.load_bits(diff, page, bits), each)?;
        // Bits that were forgotten were so after the new entry was shown.
        fence(Ordering::Acquire);
        Ok((self.bat.block(block)? == entry).then_some(()))
    }

    // --- reading -----------------------------------------------------------------------------------------------------

    /// Appends where a part of a block is: in the file, zero, or the parent's.
    pub(super) fn read_block(
        &self,
        diff: &Differences,
        (block, within, len): (u64, u64, u64),
        out: &mut Pieces,
    ) -> Result<(), ImageError> {
        let place = loop {
            let entry = self.bat.block(block)?;
            break match (entry.state(), entry.data_offset()) {
                (state::PARTIALLY_PRESENT, Some(offset)) => {
                    let sector = self.sector();
                    let first = (block * self.block_size() + within) / sector;
                    let mut at = offset + within;
                    let mut settled = None;
                    let pieces = out.apart(|out| {
                        let mut push = |sectors: u64, own: bool| {
                            let len = sectors * sector;
                            if own {
                                self.push_payload(at, len, out);
                            } else {
                                out.push(Piece { len, place: Place::Parent });
                            }
                            at += len;
                        };
                        settled = self.runs(diff, (block, entry), (first, len / sector), &mut push)?;
                        Ok::<(), ImageError>(())
                    })?;
                    if settled.is_some() {
                        pieces.iter().for_each(|piece| out.push(*piece));
                    }
                    out.put_back(pieces);
                    if settled.is_none() {
                        continue;
                    }
                    return Ok(());
                }
                (_, Some(offset)) => {
                    self.push_payload(offset + within, len, out);
                    return Ok(());
                }
                (state::NOT_PRESENT, _) => Place::Parent,
                _ => Place::Zero,
            };
        };
        out.push(Piece { len, place });
        Ok(())
    }

    /// The run of one state that begins at `offset` in a partially present block, up to the end of a page of bits.
    pub(super) fn extent_in_partial(
        &self,
        diff: &Differences,
        (block, entry): (u64, BatEntry),
        offset: u64,
    ) -> Result<Option<(u64, AllocState)>, ImageError> {
        let sector = self.sector();
        let (first, within) = (offset / sector, offset % self.block_size());
        let left = (self.block_len(block) - within) / sector;
        let run_within = |count: u64| {
            let mut run = None;
            let settled = self.runs(diff, (block, entry), (first, count), &mut |len, own| {
                run.get_or_insert((len, own));
            })?;
            Ok::<_, ImageError>(settled.map(|()| run.expect("a run of at least one sector")))
        };
        // Single sectors in turn are common, and so are long runs: not all of a page is looked at for each of the former.
        let few = (WORD_SECTORS - first % WORD_SECTORS).min(left);
        let mut run = run_within(few)?;
        if run.is_some_and(|(len, _)| len == few) {
            run = run_within((PAGE_SECTORS - first % PAGE_SECTORS).min(left))?;
        }
        let Some((sectors, own)) = run else { return Ok(None) };
        let len = sectors * sector;
        if !own {
            return Ok(Some((len, AllocState::Absent)));
        }
        let start = entry.data_offset().expect("it is partially present") + within;
        let (len, state) = self.state_in_file(start, len)?;
        // Holes of the file need not lie on the disk's sectors; what is data is never told as zero.
        let whole = on_sectors(offset, len, sector);
        Ok(Some(match state {
            AllocState::Data => ((offset + len).next_multiple_of(sector) - offset, state),
            _ if whole > 0 => (whole, state),
            _ => (sector, AllocState::Data),
        }))
    }

    // --- writing -----------------------------------------------------------------------------------------------------

    /// Plans a place for every block of the range that has none, as many as fit an entry of the log. What was the parent's is
    /// so still; what was zero is all the block's own.
    pub(super) fn plan_places(
        &self,
        diff: &Differences,
        inner: &mut Inner,
        blocks: std::ops::RangeInclusive<u64>,
        changes: &mut Changes,
    ) -> Result<(), ImageError> {
        let layout = *self.bat.layout();
        let mut edit = Edit::new(&diff.bitmaps);
        let mut bat_pages = BTreeSet::new();
        for block in blocks {
            let (entry, index) = (self.bat.block(block)?, layout.index_of(block));
            if entry.data_offset().is_some() {
                continue;
            }
            let chunk = self.chunk_of(block);
            let spans = self.bit_spans(diff, block)?.collect::<Vec<_>>();
            bat_pages.extend([index / PAGE_ENTRIES, layout.bitmap_index(chunk) / PAGE_ENTRIES]);
            if bat_pages.len() + edit.len() + spans.len() > PAGES_MAX
                || changes.entries.len() as u64 >= PAGE_ENTRIES
            {
                break;
            }
            let units = layout.units_per_block();
            if entry.state() != state::NOT_PRESENT {
                let place = changes.take_block(inner, units);
                changes.entries.push((index, BatEntry::present(place)));
                continue;
            }
            let bitmap_planned = changes.new_chunks.contains(&chunk);
            if spans.is_empty() && !bitmap_planned {
                // Shown before the block that needs it.
                let place = changes.take_bitmap(inner);
                changes.entries.push((layout.bitmap_index(chunk), BatEntry::present(place)));
                changes.new_chunks.push(chunk);
            } else if !bitmap_planned && !inner.new_chunks.contains(&chunk) {
                clear_old_bits(&mut edit, &spans)?;
            }
            let place = changes.take_block(inner, units);
            changes.entries.push((index, BatEntry::partial(place)));
        }
        changes.bitmaps = edit.into_pages();
        Ok(())
    }

    /// Says that a part of a block is written.
    pub(super) fn wrote_in(
        &self,
        diff: &Differences,
        (block, within, len): (u64, u64, u64),
    ) -> Result<(), ImageError> {
        let first = (block * self.block_size() + within) / self.sector();
        for _ in 0..CROWDED_MAX {
            if self.bat.block(block)?.state() != state::PARTIALLY_PRESENT {
                return Ok(());
            }
            let load = |page, bits: &mut PageBits| self.load_bits(diff, page, bits);
            match diff.own.wrote(first, len / self.sector(), &load)? {
                Wrote::Already => return Ok(()),
                Wrote::Noted => {
                    if diff.own.is_crowded() {
                        self.wants_maintenance.store(true, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                // What is not noted has to be safe before the guest is told.
                Wrote::NotNoted(_) => return self.sync_and_record(),
                Wrote::Crowded => self.sync_and_record()?,
            }
        }
        Err(ImageError::new(
            ErrorKind::Io,
            format!(
                "own sectors could not be noted: {CROWDED_MAX} times others were faster to fill the notes"
            ),
        ))
    }

    /// [`crate::Image::map_zero`], for layers and for images without parent (whose `below` is not asked).
    pub(super) fn zero(
        &self,
        at: ByteSpan,
        mode: ZeroMode,
        below: &dyn Fn(ByteSpan) -> Result<bool, ImageError>,
        out: &mut Pieces,
    ) -> Result<(), ImageError> {
        self.check_span(at)?;
        self.check_writable()?;
        self.begin_session()?;
        let may_unmap = mode == ZeroMode::Unmap && !self.metadata.leave_allocated;
        let mut whole = Vec::new();
        self.for_each_block(at, |block, within, len| {
            let mut entry = self.bat.block(block)?;
            let is_whole = len == self.block_len(block);
            if self.diff.is_some() && entry.state() == state::NOT_PRESENT {
                if below(ByteSpan::new(block * self.block_size() + within, len))? {
                    return Ok(());
                }
                if is_whole {
                    whole.push(block);
                    return Ok(());
                }
                self.allocate(block..=block)?;
                entry = self.bat.block(block)?;
            }
            let Some(offset) = entry.data_offset() else { return Ok(()) };
            if may_unmap && is_whole {
                whole.push(block);
            } else {
                // All of it, also what is not own: it will be, and what lies there may be left of a write that failed.
                let place = Place::File { file: FileIndex::TOP, offset: offset + within };
                out.push(Piece { len, place });
            }
            Ok(())
        })?;
        if whole.is_empty() { Ok(()) } else { self.unmap(&whole) }
    }

    // --- making it durable -------------------------------------------------------------------------------------------

    pub(super) fn begin_sync(&self, diff: &Differences) -> SyncToken {
        if self.read_only || !diff.own.has_pending() {
            return SyncToken(self.events.load(Ordering::Acquire));
        }
        // An event, so that no other sync has the same token.
        let _inner = self.inner();
        let event = self.next_event();
        diff.own.begin(event);
        self.happened(event);
        SyncToken(event)
    }

    pub(super) fn end_sync(
        &self,
        diff: &Differences,
        token: SyncToken,
    ) -> Result<Option<SyncToken>, ImageError> {
        let is_second = token.0 & SECOND != 0;
        let token = SyncToken(token.0 & !SECOND);
        self.note_synced(token);
        if is_second || self.read_only {
            return Ok(None);
        }
        self.record(diff, token)?;
        // Whatever was taken by others was recorded before the lock was given back.
        let recorded = self.inner().recorded;
        let is_durable = recorded <= self.durable.load(Ordering::Acquire);
        Ok((!is_durable).then(|| SyncToken(SECOND | self.events.load(Ordering::Acquire))))
    }

    /// Makes everything durable, with what has to be recorded for it.
    pub(super) fn sync_and_record(&self) -> Result<(), ImageError> {
        let Some(diff) = &self.diff else { return self.sync_file() };
        let mut token = Some(self.begin_sync(diff));
        while let Some(begun) = token {
            self.sync_file()?;
            token = self.end_sync(diff, begun)?;
        }
        Ok(())
    }

    /// Writes the bits of what the sync of `token` has made durable into the log.
    fn record(&self, diff: &Differences, token: SyncToken) -> Result<(), ImageError> {
        loop {
            let mut inner = self.inner();
            let ranges = diff.own.take_some(token.0, RANGES_MAX);
            if ranges.is_empty() {
                return Ok(());
            }
            let recorded = self.record_some(diff, &mut inner, &ranges);
            // What is left is taken again by whoever comes next.
            let end = recorded.as_ref().map_or(0, |step| step.end());
            let rest =
                ranges.iter().filter(|r| r.end > end).map(|r| r.start.max(end)..r.end).collect::<Vec<_>>();
            diff.own.give_back(&rest);
            drop(inner);
            match recorded? {
                Step::UpTo(_) => {}
                Step::NoSession => self.begin_session()?,
                Step::NoRoom => self.checkpoint(true)?,
            }
        }
    }

    fn record_some(
        &self,
        diff: &Differences,
        inner: &mut Inner,
        ranges: &[Range<u64>],
    ) -> Result<Step, ImageError> {
        self.check_writable()?;
        if !self.started.load(Ordering::Acquire) {
            return Ok(Step::NoSession);
        }
        if !self.has_room(inner) {
            return Ok(Step::NoRoom);
        }
        let mut changes = Changes::default();
        let mut recorded = Vec::new();
        let end = self.plan_record(diff, ranges, &mut changes, &mut recorded)?;
        if !changes.is_empty() {
            self.log_changes(inner, &changes)?;
            inner.recorded = self.events.load(Ordering::Acquire);
        }
        // Readers that find fewer bits from here on find the new entry too.
        fence(Ordering::Release);
        diff.own.recorded(&recorded);
        let dropped = ranges.iter().map(|r| r.start..r.end.min(end)).filter(|r| !r.is_empty());
        for range in dropped.flat_map(|r| without(r, &recorded)) {
            diff.own.clear(range.start, range.end - range.start);
        }
        Ok(Step::UpTo(end))
    }

    /// Plans as much as fits an entry of the log; the sector up to which that is. What is to be recorded goes to `recorded`,
    /// sorted and disjoint.
    fn plan_record(
        &self,
        diff: &Differences,
        ranges: &[Range<u64>],
        changes: &mut Changes,
        recorded: &mut Vec<Range<u64>>,
    ) -> Result<u64, ImageError> {
        let per_block = diff.bitmaps.block_sectors;
        let mut edit = Edit::new(&diff.bitmaps);
        let mut bat_pages = BTreeSet::new();
        let mut at = 0;
        let mut rest = ranges;
        while let Some(range) = rest.first() {
            let block = range.start.max(at) / per_block;
            let end = (block + 1) * per_block;
            let parts: Vec<_> = rest
                .iter()
                .map(|r| r.start.max(at)..r.end.min(end))
                .take_while(|part| part.start < end)
                .filter(|part| !part.is_empty())
                .collect();
            let entry = self.bat.block(block)?;
            if entry.state() == state::PARTIALLY_PRESENT {
                let spans = self.bit_spans(diff, block)?.collect::<Vec<_>>();
                let index = self.bat.layout().index_of(block);
                bat_pages.insert(index / PAGE_ENTRIES);
                if bat_pages.len() + edit.len() + spans.len() > PAGES_MAX {
                    changes.bitmaps = edit.into_pages();
                    return Ok(block * per_block);
                }
                if set_bits(&mut edit, &spans, &parts)? {
                    // Its bitmap is not looked at any more.
                    changes.entries.push((index, BatEntry::present(entry.unit())));
                }
                recorded.extend(parts);
            }
            at = end;
            while rest.first().is_some_and(|r| r.end <= at) {
                rest = &rest[1..];
            }
        }
        changes.bitmaps = edit.into_pages();
        Ok(u64::MAX)
    }

    /// Drops what a killed process had noted of blocks that have no bits (any more).
    pub(super) fn drop_stale_notes(&self, diff: &Differences) -> Result<(), ImageError> {
        let per_block = diff.bitmaps.block_sectors;
        for range in diff.own.recovered() {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min((at / per_block + 1) * per_block);
                if self.bat.block(at / per_block)?.state() != state::PARTIALLY_PRESENT {
                    diff.own.clear(at, end - at);
                }
                at = end;
            }
        }
        Ok(())
    }
}

/// Writes the bits of sectors that a killed process has noted in their places, durably. The log of the file was applied, so
/// its payload is durable, and is still there; bits are only ever set, so any part of them may reach the disk.
pub(super) fn bring_home(
    storage: &Arc<dyn Storage>,
    parsed: &Parsed,
    noted: &[Range<u64>],
) -> Result<(), ImageError> {
    let bat = Bat::new(parsed.view.clone(), parsed.table, &parsed.census, TABLE_PAGES_MAX);
    let bitmaps = Bitmaps::new(parsed.view.clone(), &parsed.metadata);
    let per_block = bitmaps.block_sectors;
    let sectors = parsed.metadata.virtual_size / u64::from(parsed.metadata.logical_sector);
    let io = |e| ImageError::io("bringing home what a killed process has noted", e);
    for range in noted {
        let mut at = range.start;
        while at < range.end {
            let block = at / per_block;
            let part = at..range.end.min((block + 1) * per_block);
            at = part.end;
            if bat.block(block)?.state() != state::PARTIALLY_PRESENT {
                continue;
            }
            let Some(bitmap) = bat.bitmap_offset(block / bat.layout().chunk_ratio)? else { continue };
            let of_block = per_block.min(sectors - block * per_block);
            for span in bitmaps.spans(block, of_block, bitmap).filter(|span| span.touches(&part)) {
                let mut page = [0; SECTOR];
                storage.read_at(&mut page, span.page).map_err(io)?;
                span.set(&mut page, &part);
                let bytes = span.bytes();
                storage.write_at(&page[bytes.clone()], span.page + bytes.start as u64).map_err(io)?;
            }
        }
    }
    storage.sync().map_err(io)
}

/// What came of recording a part.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Everything below this sector is recorded.
    UpTo(u64),
    /// Nothing: no session has begun.
    NoSession,
    /// Nothing: the log has no room.
    NoRoom,
}

impl Step {
    fn end(self) -> u64 {
        if let Self::UpTo(end) = self { end } else { 0 }
    }
}

/// Sets bits of one block; `true`, and nothing is changed, when that makes all of them set.
fn set_bits(edit: &mut Edit<'_>, spans: &[BitSpan], parts: &[Range<u64>]) -> Result<bool, ImageError> {
    let covers = |span: &BitSpan| {
        parts.iter().any(|part| part.start <= span.sector && part.end >= span.sector + span.count)
    };
    if spans.iter().all(covers) {
        return Ok(true);
    }
    let (touched, others): (Vec<&BitSpan>, Vec<&BitSpan>) =
        spans.iter().partition(|span| parts.iter().any(|part| span.touches(part)));
    let mut full = true;
    let mut pages = Vec::new();
    for span in touched {
        let mut page = edit.page(span.page)?;
        let bits = Arc::make_mut(&mut page);
        parts.iter().for_each(|part| span.set(bits, part));
        full &= span.is_full(bits);
        pages.push((span.page, page));
    }
    for span in others {
        full = full && span.is_full(&*edit.page(span.page)?);
    }
    if !full {
        pages.into_iter().for_each(|(offset, page)| edit.put(offset, page));
    }
    Ok(full)
}

/// Clears what bits a block has in the file from before it was present.
fn clear_old_bits(edit: &mut Edit<'_>, spans: &[BitSpan]) -> Result<(), ImageError> {
    for span in spans {
        let mut page = edit.page(span.page)?;
        if page[span.bytes()].iter().any(|byte| *byte != 0) {
            Arc::make_mut(&mut page)[span.bytes()].fill(0);
            edit.put(span.page, page);
        }
    }
    Ok(())
}

/// What of `range` none of the others has; they are sorted and disjoint.
fn without(range: Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut at = range.start;
    let from = others.partition_point(|other| other.end <= range.start);
    for other in others[from..].iter().take_while(|other| other.start < range.end) {
        if other.start > at {
            rest.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        rest.push(at..range.end);
    }
    rest
}

impl Layer for Vhdx {
    fn map_zero_over(
        &self,
        at: ByteSpan,
        mode: ZeroMode,
        below: &dyn Fn(ByteSpan) -> Result<bool, ImageError>,
        out: &mut Pieces,
    ) -> Result<(), ImageError> {
        self.zero(at, mode, below, out)
    }
}

const _: () = assert!(CHUNK_SECTORS.is_multiple_of(PAGE_SECTORS));

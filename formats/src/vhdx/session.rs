//! Changing an image: allocating, zeroing, the log, checkpoints.
//!
//! ```text
//!   map_write ─► take space ─► log entry (written, not synced) ─► BAT in memory ─► caller writes payload ─► guest told
//!   flush     ─► one sync: payload and log entry durable
//!   maintain  ─► sync ─► BAT pages in place ─► sync ─► later entries say: replay from here on
//! ```
//!
//! Locks, in this order: `checkpointing`, then `inner`. `inner` is held only for work in memory and for writing the log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, MutexGuard, PoisonError};

use super::bat::{BatEntry, PAGE_ENTRIES, state};
use super::bitmap::BitmapPage;
use super::guid::Guid;
use super::header::{HeaderWriteError, Headers};
use super::log_writer::{LogWriter, PAGES_MAX};
use super::space::Space;
use super::{MAX_FILE_SIZE, MIB, Vhdx};
use crate::{ErrorKind, ImageError, SyncToken};

/// The file is extended by at least this much at once: 64 MiB, which costs nothing as long as it is a hole.
const GROWTH_MIN: u64 = 64 << 20;
/// The file is extended by this part of its size, where that is more.
const GROWTH_PART: u64 = 16;

/// Gaps that are zeroed at once.
const GAPS_MAX: usize = 64;

/// What changes of an open image.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) headers: Headers,
    pub(super) space: Space,
    /// The file's size as we set it, in bytes.
    pub(super) file_len: u64,
    /// A size that is durable, in bytes.
    durable_len: u64,
    /// Sizes that are not yet known to be durable: (event, size).
    growths: Vec<(u64, u64)>,
    log: Option<LogWriter>,
    /// Pages of the BAT that are newer in the log than in their place: the last entry that has them. They are pinned.
    dirty: BTreeMap<u64, u64>,
    /// Blocks that are out of the map but may still be written to: (first unit, units).
    freed: Vec<(u64, u64)>,
    /// Chunks that got their sector bitmap from us: it has no old bits.
    pub(super) new_chunks: BTreeSet<u64>,
    /// The last entry that recorded bits of own sectors, as an event.
    pub(super) recorded: u64,
    ids: SessionIds,
}

/// The ids that the first change of a session writes into the headers (2.2.2).
#[derive(Debug, Clone, Copy)]
pub(super) struct SessionIds {
    /// FileWriteGuid: one for as long as the image is open.
    pub(super) file_write: Guid,
    /// DataWriteGuid of the first session, where it is given.
    pub(super) data_write: Option<Guid>,
}

/// Changes of metadata that one entry of the log makes.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Entries of the BAT by index, in the order in which they are to be shown.
    pub(super) entries: Vec<(u64, BatEntry)>,
    /// Pages of sector bitmaps, by their offset in the file.
    pub(super) bitmaps: Vec<(u64, Arc<BitmapPage>)>,
    /// Chunks that get their sector bitmap.
    pub(super) new_chunks: Vec<u64>,
    /// Space that was taken for them: (first unit, units).
    taken: Vec<(u64, u64)>,
    /// Space that nothing uses any more when they are made.
    freed: Vec<(u64, u64)>,
    /// Blocks whose own sectors are forgotten.
    forgotten: Vec<u64>,
}

impl Changes {
    /// Takes room for a payload block; its first unit.
    pub(super) fn take_block(&mut self, inner: &mut Inner, units: u64) -> u64 {
        let start = inner.space.allocate();
        self.taken.push((start, units));
        start
    }

    /// Takes room for a sector bitmap block; its unit.
    pub(super) fn take_bitmap(&mut self, inner: &mut Inner) -> u64 {
        let unit = inner.space.allocate_units(1);
        self.taken.push((unit, 1));
        unit
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.bitmaps.is_empty()
    }
}

impl Inner {
    pub(super) fn new(headers: Headers, space: Space, file_len: u64, ids: SessionIds) -> Self {
        Self {
            headers,
            space,
            file_len,
            durable_len: file_len,
            growths: Vec::new(),
            log: None,
            dirty: BTreeMap::new(),
            freed: Vec::new(),
            new_chunks: BTreeSet::new(),
            recorded: 0,
            ids,
        }
    }

    /// Takes note of what is durable now.
    fn note_durable(&mut self, event: u64) {
        let durable_len = &mut self.durable_len;
        self.growths.retain(|(at, len)| {
            if *at <= event {
                *durable_len = *len;
            }
            *at > event
        });
        if let Some(log) = &mut self.log {
            log.release(event);
        }
    }

    fn log(&mut self) -> &mut LogWriter {
        self.log.as_mut().expect("a session has a log")
    }
}

impl Vhdx {
    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next event in the order that tokens count; the caller holds `inner`, and says when it has happened.
    pub(super) fn next_event(&self) -> u64 {
        self.events.load(Ordering::Relaxed) + 1
    }

    pub(super) fn happened(&self, event: u64) {
        self.events.store(event, Ordering::Release);
    }

    pub(super) fn poison(&self, error: &ImageError) {
        let _ = self.poisoned.set(error.message.clone());
    }

    pub(super) fn check_writable(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Err(ImageError::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        match self.poisoned.get() {
            None => Ok(()),
            Some(why) => Err(ImageError::new(
                ErrorKind::Poisoned,
                format!("the image can't be written any more since an earlier failure: {why}"),
            )),
        }
    }

    pub(super) fn sync_file(&self) -> Result<(), ImageError> {
        let token = self.events.load(Ordering::Acquire);
        self.storage.sync().map_err(|e| {
            let error = ImageError::io("syncing the image", e);
            // What a failed sync has lost is not known, and no later one brings it back.
            self.poison(&error);
            error
        })?;
        self.note_synced(SyncToken(token));
        Ok(())
    }

    pub(super) fn note_synced(&self, token: SyncToken) {
        self.durable.fetch_max(token.0, Ordering::AcqRel);
    }

    // --- sessions ----------------------------------------------------------------------------------------------------

    /// The first change of a session: the file's and the data's ids change and the log begins, before anything else is
    /// written (2.2.2).
    pub(super) fn begin_session(&self) -> Result<(), ImageError> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut inner = self.inner();
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_writable()?;
        let end = inner.space.end() * MIB;
        if end < inner.file_len {
            // What lies behind the last structure may be what a crash has left of blocks that were never recorded. New
            // blocks go there, and have to read as zeroes.
            self.storage
                .set_len(end)
                .map_err(|e| ImageError::io("cutting off what is behind the last block", e))?;
            (inner.file_len, inner.durable_len) = (end, end);
        }
        let current = inner.headers.current;
        let mut log = LogWriter::new(Guid::random(), current.log_offset, current.log_len);
        let event = self.next_event();
        // The log has to hold a valid entry before a header says that there is one to replay.
        let (flushed, last) = (inner.durable_len / MIB * MIB, inner.space.end() * MIB);
        log.append(&*self.storage, event, flushed, last, &[])?;
        self.happened(event);
        self.sync_file()?;
        let (guid, file_write) = (log.guid(), inner.ids.file_write);
        let data_write = inner.ids.data_write.unwrap_or_else(Guid::random);
        let updated = inner.headers.update_both(&*self.storage, |h| {
            (h.log_guid, h.file_write, h.data_write) = (guid, file_write, data_write);
        });
        self.header_written(updated)?;
        inner.ids.data_write = None;
        inner.log = Some(log);
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    fn header_written(&self, result: Result<(), HeaderWriteError>) -> Result<(), ImageError> {
        result.map_err(|e| {
            // A header that could not be written may have been written all the same, or one of the two was: then the file
            // names another log than the one we write to, and going on would lose what is flushed.
            let untouched = matches!(e, HeaderWriteError::Refused(_));
            let error = ImageError::from(e);
            if !untouched {
                self.poison(&error);
            }
            error
        })
    }

    // --- changes of the BAT ------------------------------------------------------------------------------------------

    /// Gives a place to every block of the range that has none.
    pub(super) fn allocate(&self, blocks: std::ops::RangeInclusive<u64>) -> Result<(), ImageError> {
        self.change(|inner, changes| {
            if let Some(diff) = &self.diff {
                return self.plan_places(diff, inner, blocks.clone(), changes);
            }
            let layout = self.bat.layout();
            for block in blocks.clone() {
                if self.bat.block(block)?.data_offset().is_none() {
                    let place = changes.take_block(inner, layout.units_per_block());
                    changes.entries.push((layout.index_of(block), BatEntry::present(place)));
                    if changes.entries.len() as u64 == PAGE_ENTRIES {
                        break;
                    }
                }
            }
            Ok(())
        })
    }

    /// Takes the places of blocks away, which then read as zeroes, whatever the parent holds.
    pub(super) fn unmap(&self, blocks: &[u64]) -> Result<(), ImageError> {
        // As many blocks at once as have their entries on the pages that fit an entry of the log.
        let page_of = |block: &u64| self.bat.layout().index_of(*block) / PAGE_ENTRIES;
        for some in blocks.chunk_by(|a, b| page_of(a) / PAGES_MAX as u64 == page_of(b) / PAGES_MAX as u64) {
            self.change(|_, changes| {
                for &block in some {
                    let entry = self.bat.block(block)?;
                    let is_parents = self.diff.is_some() && entry.state() == state::NOT_PRESENT;
                    if entry.data_offset().is_some() || is_parents {
                        changes.entries.push((self.bat.layout().index_of(block), BatEntry::ZERO));
                    }
                    if entry.data_offset().is_some() {
                        changes.freed.push((entry.unit(), self.bat.layout().units_per_block()));
                    }
                    if entry.state() == state::PARTIALLY_PRESENT {
                        changes.forgotten.push(block);
                    }
                }
                Ok(())
            })?;
            self.wants_maintenance.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether the log has room for an entry of any size.
    pub(super) fn has_room(&self, inner: &mut Inner) -> bool {
        inner.note_durable(self.durable.load(Ordering::Acquire));
        inner.log().has_room(PAGES_MAX)
    }

    /// Logs and shows the changes that `plan` asks for, until it asks for none. Makes room in the log where there is none.
    fn change(
        &self,
        plan: impl Fn(&mut Inner, &mut Changes) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        loop {
            self.check_writable()?;
            let mut inner = self.inner();
            if !self.has_room(&mut inner) {
                drop(inner);
                self.checkpoint(true)?;
                continue;
            }
            let mut changes = Changes::default();
            let planned = plan(&mut inner, &mut changes);
            if planned.is_ok() && changes.is_empty() {
                return Ok(());
            }
            if let Err(e) = planned.and_then(|()| self.log_changes(&mut inner, &changes)) {
                // Puts back what was taken. Nothing was written there.
                changes.taken.iter().for_each(|(start, units)| inner.space.give_zeroed(*start, *units));
                return Err(e);
            }
            if inner.log().is_half_full() {
                self.wants_maintenance.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Writes one entry of the log, and shows what it changes.
    pub(super) fn log_changes(&self, inner: &mut Inner, changes: &Changes) -> Result<(), ImageError> {
        let ends = changes.taken.iter().map(|(start, units)| (start + units) * MIB);
        self.grow(inner, ends.max().unwrap_or(0))?;
        let mut pages: Vec<u64> = changes.entries.iter().map(|(index, _)| index / PAGE_ENTRIES).collect();
        pages.sort_unstable();
        pages.dedup();
        assert!(
            pages.len() + changes.bitmaps.len() <= PAGES_MAX,
            "changes are planned so that their pages fit an entry"
        );
        let event = self.next_event();
        let (pinned, logged) = self.append_entry(inner, event, &pages, changes);
        if logged.is_err() {
            // Nothing was changed, so of these the file has all, but for what earlier entries have.
            self.bat.release(pinned.iter().copied().filter(|page| !inner.dirty.contains_key(page)));
        }
        logged?;
        let sequence = inner.log().sequence();
        inner.dirty.extend(pages.into_iter().map(|page| (page, sequence)));
        if let Some(diff) = &self.diff {
            diff.bitmaps.logged(changes.bitmaps.iter().cloned(), sequence);
        }
        for (index, entry) in &changes.entries {
            self.bat.publish(*index, *entry);
        }
        self.happened(event);
        inner.freed.extend(&changes.freed);
        inner.new_chunks.extend(&changes.new_chunks);
        // Readers that find fewer bits from here on find the new entry too.
        fence(Ordering::Release);
        for (diff, block) in
            self.diff.iter().flat_map(|diff| changes.forgotten.iter().map(move |b| (diff, *b)))
        {
            diff.own.clear(block * diff.bitmaps.block_sectors, self.sectors_of(block));
        }
        Ok(())
    }

    /// Writes an entry of the log that has these pages of the BAT and what else changes. Also the pages that were pinned for
    /// it, whatever came of it.
    fn append_entry<'a>(
        &self,
        inner: &mut Inner,
        event: u64,
        pages: &'a [u64],
        changes: &Changes,
    ) -> (&'a [u64], Result<(), ImageError>) {
        for (n, page) in pages.iter().enumerate() {
            if let Err(e) = self.bat.pin(*page) {
                return (&pages[..n], Err(e));
            }
        }
        let encoded = pages
            .iter()
            .map(|&page| (self.bat.page_offset(page), self.bat.encode_page(page, &changes.entries)))
            .chain(changes.bitmaps.iter().map(|(offset, page)| (*offset, page.to_vec())))
            .collect::<Vec<_>>();
        let (flushed, last) = (inner.durable_len / MIB * MIB, inner.space.end() * MIB);
        let written = inner.log().append(&*self.storage, event, flushed, last, &encoded);
        if let Err(e) = &written
            && (e.kind != ErrorKind::NoSpace || !inner.log().forget_failed(&*self.storage))
        {
            self.poison(e);
        }
        (pages, written)
    }

    /// Extends the file, ahead of need, so that it holds `end` bytes. What is new is a hole that reads as zeroes.
    fn grow(&self, inner: &mut Inner, end: u64) -> Result<(), ImageError> {
        if end <= inner.file_len {
            return Ok(());
        }
        let ahead = GROWTH_MIN.max(inner.file_len / GROWTH_PART / MIB * MIB);
        let wanted = (end + ahead).min(MAX_FILE_SIZE / MIB * MIB);
        if wanted < end {
            return Err(ImageError::new(
                ErrorKind::NoSpace,
                format!("the image would be longer than {MAX_FILE_SIZE} bytes"),
            ));
        }
        let event = self.next_event();
        let grown = self
            .storage
            .set_len(wanted)
            .map(|()| wanted)
            .or_else(|_| self.storage.set_len(end).map(|()| end));
        inner.file_len = grown.map_err(|e| ImageError::io("extending the image", e))?;
        inner.growths.push((event, inner.file_len));
        self.happened(event);
        Ok(())
    }

    // --- checkpoints -------------------------------------------------------------------------------------------------

    /// Applies what is logged. With `urgent`, the room that this makes in the log can be used at once.
    pub(super) fn checkpoint(&self, urgent: bool) -> Result<(), ImageError> {
        let _one = self.checkpointing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_writable()?;
        let (pages, bitmaps, sequence) = {
            let mut inner = self.inner();
            let Some(log) = &inner.log else { return Ok(()) };
            let sequence = log.sequence();
            if urgent && log.has_room(PAGES_MAX) && !log.is_half_full() {
                // Somebody else has just made room.
                return Ok(());
            }
            let encode = |page: &u64| (self.bat.page_offset(*page), self.bat.encode_page(*page, &[]));
            let encoded = inner.dirty.keys().map(encode).collect::<Vec<_>>();
            let bitmaps = self.diff.as_ref().map(|diff| diff.bitmaps.all_dirty()).unwrap_or_default();
            inner.note_durable(self.durable.load(Ordering::Acquire));
            (encoded, bitmaps, sequence)
        };
        // Log entries first: a page in its place must not be newer than what replay ends with.
        self.sync_file()?;
        for (offset, page) in &pages {
            let written = self.storage.write_at(page, *offset);
            written.map_err(|e| ImageError::io(format!("writing the BAT at {offset:#x}"), e))?;
        }
        for (offset, page) in &bitmaps {
            let written = self.storage.write_at(&page[..], *offset);
            written.map_err(|e| ImageError::io(format!("writing the sector bitmap at {offset:#x}"), e))?;
        }
        if !pages.is_empty() || !bitmaps.is_empty() {
            self.sync_file()?;
        }
        self.advance_tail(sequence)?;
        if urgent {
            self.sync_file()?;
        }
        self.inner().note_durable(self.durable.load(Ordering::Acquire));
        Ok(())
    }

    /// Says in the log that everything up to this entry is in its place.
    fn advance_tail(&self, sequence: u64) -> Result<(), ImageError> {
        let mut inner = self.inner();
        inner.note_durable(self.durable.load(Ordering::Acquire));
        let is_applied = |last: &u64| *last <= sequence;
        self.bat.release(inner.dirty.iter().filter(|(_, last)| is_applied(last)).map(|(page, _)| *page));
        inner.dirty.retain(|_, last| !is_applied(last));
        if let Some(diff) = &self.diff {
            diff.bitmaps.applied(sequence);
        }
        inner.log().applied(sequence);
        let event = self.next_event();
        let (flushed, last) = (inner.durable_len / MIB * MIB, inner.space.end() * MIB);
        inner.log().append(&*self.storage, event, flushed, last, &[])?;
        self.happened(event);
        Ok(())
    }

    /// Turns blocks that were unmapped, and gaps whose content is not known, into space that may be used.
    pub(super) fn reclaim(&self, quiesce: &dyn Fn()) -> Result<(), ImageError> {
        let freed = {
            let mut inner = self.inner();
            let mut freed = std::mem::take(&mut inner.freed);
            if inner.space.wants_gaps() {
                freed.extend(inner.space.take_gaps(GAPS_MAX));
            }
            freed
        };
        if freed.is_empty() {
            return Ok(());
        }
        let reclaimed = (|| {
            // That the blocks are not mapped has to be durable before their content goes.
            self.sync_file()?;
            quiesce();
            for (start, units) in &freed {
                let punched = self.storage.punch(start * MIB, units * MIB);
                punched.map_err(|e| {
                    ImageError::io(format!("giving back {units} MiB at {:#x}", start * MIB), e)
                })?;
            }
            // And their zeroes before anything else may be put there.
            self.sync_file()
        })();
        let mut inner = self.inner();
        match reclaimed {
            Ok(()) => freed.iter().for_each(|(start, units)| inner.space.give_zeroed(*start, *units)),
            Err(_) => inner.freed.extend(freed),
        }
        reclaimed
    }

    /// Ends the session: everything in its place, the log empty, no slack at the end.
    pub(super) fn end_session(&self) -> Result<(), ImageError> {
        if self.diff.as_ref().is_some_and(|diff| diff.own.has_pending()) {
            self.sync_and_record()?;
        }
        if !self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.reclaim(&|| ())?;
        self.checkpoint(false)?;
        self.sync_file()?;
        let mut inner = self.inner();
        let bitmaps_clean = self.diff.as_ref().is_none_or(|diff| diff.bitmaps.is_clean());
        assert!(inner.dirty.is_empty() && bitmaps_clean, "nothing may be mapped while an image is closed");
        let updated = inner.headers.update_both(&*self.storage, |h| h.log_guid = Guid::ZERO);
        self.header_written(updated)?;
        inner.log = None;
        self.started.store(false, Ordering::Release);
        let end = inner.space.trim() * MIB;
        if end < inner.file_len {
            self.storage.set_len(end).map_err(|e| ImageError::io("cutting the slack off", e))?;
            (inner.file_len, inner.durable_len) = (end, end);
            inner.growths.clear();
            self.sync_file()?;
        }
        if let Some(diff) = &self.diff
            && let Err(e) = diff.own.drop_notes()
        {
            // What they say is recorded, and for this FileWriteGuid it stays true.
            tracing::warn!("dropping the notes of a closed image: {e}");
        }
        Ok(())
    }

    /// Whether everything that is logged is in its place.
    fn is_applied(&self) -> bool {
        let inner = self.inner();
        inner.dirty.is_empty() && self.diff.as_ref().is_none_or(|diff| diff.bitmaps.is_clean())
    }

    /// What `maintain` does when it is wanted.
    pub(super) fn look_after(&self, quiesce: &dyn Fn()) -> Result<(), ImageError> {
        let pending = self.diff.as_ref().is_some_and(|diff| diff.own.has_pending());
        if !pending && !self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.wants_maintenance.store(false, Ordering::Relaxed);
        let done = if pending { self.sync_and_record() } else { Ok(()) }
            .and_then(|()| if self.is_applied() { Ok(()) } else { self.checkpoint(false) })
            .and_then(|()| self.reclaim(quiesce));
        if done.is_err() {
            // To be tried again when somebody next asks.
            self.wants_maintenance.store(true, Ordering::Relaxed);
        }
        done
    }
}

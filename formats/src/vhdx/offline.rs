//! Changing an image that nobody uses, one transaction of the log after the other.
//!
//! ```text
//!   Offline::open ─► validated, a log that was left replayed
//!   begin  ─► header: new FileWriteGuid ─► slack cut off ─► empty log ─► headers: LogGuid
//!   commit ─► sync ─► entry ─► sync ─► pages in their places ─► sync          (as often as it takes)
//!   close  ─► headers: no log
//! ```
//!
//! Each commit is one entry of the log, so a crash leaves what was there before it or all of it. What an entry makes
//! reachable (payload, a table in a new place) is written to space that nothing uses and is durable before the entry is.
//! A crash between two commits leaves an image that opens; the same operation, done again, goes on from there.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::bat::{BatEntry, PAGE_ENTRIES};
use super::guid::Guid;
use super::le::u64_at;
use super::log_entry::{SECTOR, SECTOR_LEN};
use super::log_writer::{LogWriter, PAGES_MAX};
use super::metadata::BlockLayout;
use super::parse::Parsed;
use super::region::{Region, TABLE_OFFSETS, table_with_region};
use super::{MIB, replay_as, strict};
use crate::{ImageError, Storage};

/// Bytes that are read or copied at once.
pub(super) const CHUNK: u64 = 1 << 20;

/// Whether what the disk is, or what a child of it would read, changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// It does, and the content gets this id (2.2.2, DataWriteGuid).
    Changes(Guid),
    /// Only the file's layout does.
    Stays,
}

/// A closed image that is being changed.
#[derive(Debug)]
pub(super) struct Offline {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) parsed: Parsed,
    /// Bytes of the file as we set them.
    file_len: u64,
    /// One past the last byte that a structure takes.
    end: u64,
    log: Option<LogWriter>,
    /// Counts log entries.
    event: u64,
    /// Whether the FileWriteGuid stays, see [`Parsed::is_unfinished`].
    keeps_id: bool,
}

impl Offline {
    /// Reads and validates the image, after replaying a log that was left into the file.
    ///
    /// # Errors
    /// What is wrong with the image, or keeps it from being written; what the file says.
    pub(super) fn open(storage: &Arc<dyn Storage>) -> Result<Self, ImageError> {
        Self::open_again(storage, false)
    }

    /// The same for a further part of an operation, whose first part says whether the image is an unfinished one.
    pub(super) fn open_again(storage: &Arc<dyn Storage>, is_unfinished: bool) -> Result<Self, ImageError> {
        let mut parsed = strict(storage)?;
        parsed.headers.current.validate_for_writing()?;
        let was_dirty = parsed.overlay.is_some();
        let keeps_id = is_unfinished || parsed.is_unfinished();
        if was_dirty {
            let file_write = if keeps_id { parsed.headers.current.file_write } else { Guid::random() };
            replay_as(file_write, storage, parsed)?;
            parsed = strict(storage)?;
        }
        let file_len = storage.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
        let end = parsed.space.end() * MIB;
        Ok(Self { storage: storage.clone(), parsed, file_len, end, log: None, event: 0, keeps_id })
    }

    /// Whether a process that died may still count on what the file held, see [`Parsed::is_unfinished`].
    pub(super) fn is_unfinished(&self) -> bool {
        self.keeps_id
    }

    pub(super) fn layout(&self) -> BlockLayout {
        self.parsed.table.layout
    }

    /// Bytes behind the last structure.
    pub(super) fn slack(&self) -> u64 {
        self.file_len.saturating_sub(self.end)
    }

    /// Begins to change the file. Does nothing when that was done.
    pub(super) fn begin(&mut self, content: Content) -> Result<(), ImageError> {
        if self.log.is_some() {
            return Ok(());
        }
        let current = self.parsed.headers.current.file_write;
        let file_write = if self.keeps_id { current } else { Guid::random() };
        self.parsed.headers.update(&*self.storage, |h| h.file_write = file_write)?;
        // What lies behind the last structure may be what a crash has left of blocks that were never recorded; what is put
        // there has to begin as zeroes. A last block that is cut short by the end of the file becomes whole.
        if self.file_len != self.end {
            set_len(&*self.storage, self.end)?;
            self.file_len = self.end;
        }
        let current = self.parsed.headers.current;
        let log_guid = if self.keeps_id { Guid::random() } else { log_guid_of(file_write) };
        let mut log = LogWriter::new(log_guid, current.log_offset, current.log_len);
        self.event += 1;
        // The log has to hold a valid entry before a header says that there is one to replay.
        sync(&*self.storage)?;
        log.append(&*self.storage, self.event, self.file_len / MIB * MIB, self.end, &[])?;
        sync(&*self.storage)?;
        self.parsed.headers.update_both(&*self.storage, |h| {
            h.log_guid = log_guid;
            if let Content::Changes(id) = content {
                h.data_write = id;
            }
        })?;
        self.log = Some(log);
        Ok(())
    }

    /// Takes `len` bytes (a multiple of 1 MiB) behind the last structure; they read as zeroes. The offset in the file.
    pub(super) fn extend(&mut self, len: u64) -> Result<u64, ImageError> {
        assert!(self.log.is_some() && len.is_multiple_of(MIB), "a session has begun, and all is on MiB");
        let at = self.end;
        let end = at.checked_add(len).filter(|end| *end <= super::MAX_FILE_SIZE).ok_or_else(|| {
            let message = format!("the image would be longer than {} bytes", super::MAX_FILE_SIZE);
            ImageError::new(crate::ErrorKind::NoSpace, message)
        })?;
        set_len(&*self.storage, end)?;
        (self.file_len, self.end) = (end, end);
        Ok(at)
    }

    /// Makes the pages what they are to be, all of them or none. Everything that was written before is durable by then.
    pub(super) fn commit(&mut self, pages: Pages) -> Result<(), ImageError> {
        if pages.is_empty() {
            return Ok(());
        }
        assert!(pages.len() <= PAGES_MAX, "a transaction is one entry");
        let log = self.log.as_mut().expect("a session has begun");
        let pages: Vec<(u64, Vec<u8>)> = pages.0.into_iter().collect();
        sync(&*self.storage)?;
        self.event += 1;
        log.append(&*self.storage, self.event, self.file_len / MIB * MIB, self.end, &pages)?;
        sync(&*self.storage)?;
        log.release(self.event);
        for (offset, page) in &pages {
            let written = self.storage.write_at(page, *offset);
            written.map_err(|e| ImageError::io(format!("writing metadata at {offset:#x}"), e))?;
        }
        sync(&*self.storage)?;
        log.applied(log.sequence());
        Ok(())
    }

    /// Leaves the file as a cleanly closed image.
    pub(super) fn close(mut self) -> Result<(), ImageError> {
        if self.log.is_none() {
            return Ok(());
        }
        sync(&*self.storage)?;
        self.parsed.headers.update_both(&*self.storage, |h| h.log_guid = Guid::ZERO)?;
        Ok(())
    }

    /// The entry of the BAT at `index`, as the file has it.
    pub(super) fn entry(&self, index: u64) -> Result<BatEntry, ImageError> {
        let mut raw = [0; 8];
        read(&*self.storage, &mut raw, self.entry_place(index))?;
        Ok(BatEntry(u64_at(&raw, 0)))
    }

    /// Where the entry of the BAT at `index` is in the file.
    pub(super) fn entry_place(&self, index: u64) -> u64 {
        self.parsed.regions.bat.offset + index * 8
    }

    /// Makes every entry of the BAT that is not 0 what `decide` says, as many at once as fit a transaction.
    pub(super) fn rewrite_entries(
        &mut self,
        mut decide: impl FnMut(u64, BatEntry) -> Result<BatEntry, ImageError>,
    ) -> Result<(), ImageError> {
        let (storage, table) = (self.storage.clone(), self.parsed.table);
        let (mut pages, mut last_page) = (Pages::default(), None);
        table.stream(&*storage, |index, entry| {
            let changed = decide(index, entry)?;
            if changed == entry {
                return Ok(());
            }
            self.begin(Content::Stays)?;
            if pages.len() == PAGES_MAX && last_page != Some(index / PAGE_ENTRIES) {
                self.commit(std::mem::take(&mut pages))?;
            }
            last_page = Some(index / PAGE_ENTRIES);
            Ok(pages.put(&*storage, self.entry_place(index), &changed.0.to_le_bytes())?)
        })?;
        self.commit(pages)
    }

    /// Puts the changes of both region tables that give a region another place and length to `pages`.
    pub(super) fn put_region(
        &self,
        pages: &mut Pages,
        region: Region,
        offset: u64,
        len: u32,
    ) -> Result<(), ImageError> {
        let table = table_with_region(&*self.storage, region.guid, offset, len)?;
        for at in TABLE_OFFSETS {
            let mut old = vec![0; table.len()];
            read(&*self.storage, &mut old, at)?;
            for (n, (new, old)) in table.chunks(SECTOR).zip(old.chunks(SECTOR)).enumerate() {
                if new != old {
                    pages.put(&*self.storage, at + (n * SECTOR) as u64, new)?;
                }
            }
        }
        Ok(())
    }
}

impl Parsed {
    /// Whether this is a differencing image that somebody wrote payload to and did not close. He may have died and left notes
    /// of sectors, which he finds again by the FileWriteGuid: to them all that is done here is the same session.
    pub(super) fn is_unfinished(&self) -> bool {
        let current = &self.headers.current;
        let anothers = self.overlay.is_some() && current.log_guid != log_guid_of(current.file_write);
        anothers && self.metadata.has_parent
    }
}

/// The LogGuid of a session of ours. By it a session that was interrupted is told from one of somebody who wrote payload and
/// may have left notes.
fn log_guid_of(file_write: Guid) -> Guid {
    let mut guid = file_write;
    guid.0[15] = !guid.0[15];
    guid
}

/// Pages of metadata as they are to become, by their place in the file.
#[derive(Debug, Default)]
pub(super) struct Pages(BTreeMap<u64, Vec<u8>>);

impl Pages {
    /// Puts bytes of metadata that will be at `at`; what surrounds them on their pages stays as the file has it.
    pub(super) fn put(
        &mut self,
        storage: &dyn Storage,
        mut at: u64,
        mut bytes: &[u8],
    ) -> Result<(), ImageError> {
        while !bytes.is_empty() {
            let (page, inner) = (at / SECTOR_LEN * SECTOR_LEN, (at % SECTOR_LEN) as usize);
            let (part, rest) = bytes.split_at(bytes.len().min(SECTOR - inner));
            let slot = match self.0.entry(page) {
                std::collections::btree_map::Entry::Occupied(slot) => slot.into_mut(),
                std::collections::btree_map::Entry::Vacant(slot) => {
                    let mut old = vec![0; SECTOR];
                    read(storage, &mut old, page)?;
                    slot.insert(old)
                }
            };
            slot[inner..inner + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(super) fn read(storage: &dyn Storage, buf: &mut [u8], at: u64) -> Result<(), ImageError> {
    storage.read_at(buf, at).map_err(|e| ImageError::io(format!("reading the image at {at:#x}"), e))
}

pub(super) fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(|e| ImageError::io("syncing the image", e))
}

pub(super) fn set_len(storage: &dyn Storage, len: u64) -> Result<(), ImageError> {
    storage.set_len(len).map_err(|e| ImageError::io(format!("setting the image's length to {len}"), e))
}

pub(super) fn punch(storage: &dyn Storage, at: u64, len: u64) -> Result<(), ImageError> {
    storage.punch(at, len).map_err(|e| ImageError::io(format!("zeroing {len} bytes at {at:#x}"), e))
}

/// Calls `each` with the runs of `[from, to)` that may hold data, in pieces of [`CHUNK`] bytes at most.
pub(super) fn for_each_data(
    storage: &dyn Storage,
    from: u64,
    to: u64,
    mut each: impl FnMut(u64, u64) -> Result<bool, ImageError>,
) -> Result<(), ImageError> {
    let io = |e| ImageError::io("looking for holes", e);
    let mut at = from;
    while at < to {
        let Some((start, end)) = storage.next_data(at).map_err(io)?.filter(|(start, _)| *start < to) else {
            break;
        };
        at = start.max(at);
        let end = end.min(to);
        while at < end {
            let n = (end - at).min(CHUNK);
            if !each(at, n)? {
                return Ok(());
            }
            at += n;
        }
    }
    Ok(())
}

/// The first byte of `[from, to)` that is not zero.
pub(super) fn first_data(storage: &dyn Storage, from: u64, to: u64) -> Result<Option<u64>, ImageError> {
    let mut buf = vec![0; CHUNK.min(to.saturating_sub(from)) as usize];
    let mut found = None;
    for_each_data(storage, from, to, |at, len| {
        let part = &mut buf[..len as usize];
        read(storage, part, at)?;
        found = part.iter().position(|b| *b != 0).map(|n| at + n as u64);
        Ok(found.is_none())
    })?;
    Ok(found)
}

/// Makes the `len` bytes at `to`, which nothing uses, what those at `from` are. The two do not overlap.
pub(super) fn copy_within(storage: &dyn Storage, from: u64, to: u64, len: u64) -> Result<(), ImageError> {
    let mut buf = vec![0; CHUNK.min(len) as usize];
    let mut done = from;
    for_each_data(storage, from, from + len, |at, n| {
        if at > done {
            punch(storage, to + (done - from), at - done)?;
        }
        let part = &mut buf[..n as usize];
        read(storage, part, at)?;
        let written = storage.write_at(part, to + (at - from));
        written.map_err(|e| ImageError::io(format!("moving {n} bytes to {:#x}", to + (at - from)), e))?;
        done = at + n;
        Ok(true)
    })?;
    if done < from + len { punch(storage, to + (done - from), from + len - done) } else { Ok(()) }
}

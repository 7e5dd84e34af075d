//! Writing the log (2.3): entries are handed to the operating system without a sync, and the space of older ones is used
//! again only when a durable entry says that they are not needed.

use std::collections::VecDeque;

use super::guid::Guid;
use super::log_entry::{NewEntry, SECTOR_LEN, encode_entry, entry_len};
use crate::{ImageError, Storage};

/// Pages of one entry at most.
pub(super) const PAGES_MAX: usize = 64;
/// No more of a log than this is used, in bytes: what is logged and not yet applied is in memory too, and has to be replayed.
pub(super) const USED_MAX: u64 = 8 << 20;
/// Bytes that stay free for an empty entry, which is what makes room.
const RESERVE: u64 = 2 * SECTOR_LEN;

#[derive(Debug, Clone, Copy)]
struct Written {
    sequence: u64,
    /// The event that it was, in the image's order.
    event: u64,
    at: u32,
    len: u32,
    /// Where its tail is.
    tail: u32,
}

/// The log of a session of changes.
#[derive(Debug)]
pub(super) struct LogWriter {
    guid: Guid,
    offset: u64,
    len: u32,
    /// Entries whose space is not free, oldest first.
    entries: VecDeque<Written>,
    used: u64,
    next: u32,
    sequence: u64,
    /// The first entry that replay has to begin with, as new entries say.
    tail_sequence: u64,
}

impl LogWriter {
    /// A log that is empty.
    pub(super) fn new(guid: Guid, offset: u64, len: u32) -> Self {
        Self { guid, offset, len, entries: VecDeque::new(), used: 0, next: 0, sequence: 0, tail_sequence: 1 }
    }

    pub(super) fn guid(&self) -> Guid {
        self.guid
    }

    /// The number of the last entry.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Frees the space of entries that no durable entry needs any more.
    pub(super) fn release(&mut self, durable_event: u64) {
        let Some(last) = self.entries.iter().rev().find(|e| e.event <= durable_event).copied() else {
            return;
        };
        while let Some(front) =
            self.entries.front().filter(|e| e.at != last.tail && e.sequence < last.sequence)
        {
            self.used -= u64::from(front.len);
            self.entries.pop_front();
        }
    }

    /// Whether an entry of so many pages has room.
    pub(super) fn has_room(&self, pages: usize) -> bool {
        self.used + entry_len(pages) + RESERVE <= u64::from(self.len).min(USED_MAX)
    }

    /// Whether it is time to apply what is logged.
    pub(super) fn is_half_full(&self) -> bool {
        self.used * 2 >= u64::from(self.len).min(USED_MAX)
    }

    /// Writes an entry, without a sync. When it fails the log is as before.
    pub(super) fn append(
        &mut self,
        storage: &dyn Storage,
        event: u64,
        flushed: u64,
        last: u64,
        pages: &[(u64, Vec<u8>)],
    ) -> Result<(), ImageError> {
        let len = entry_len(pages.len());
        assert!(self.used + len <= u64::from(self.len), "room was made before");
        let sequence = self.sequence + 1;
        let tail = self.entries.iter().find(|e| e.sequence >= self.tail_sequence).map_or(self.next, |e| e.at);
        let entry = NewEntry { guid: self.guid, sequence, tail, flushed, last };
        let bytes = encode_entry(&entry, pages);
        let before_wrap = ((self.len - self.next) as usize).min(bytes.len());
        let io = |e| ImageError::io("writing the log", e);
        storage.write_at(&bytes[..before_wrap], self.offset + u64::from(self.next)).map_err(io)?;
        if before_wrap < bytes.len() {
            storage.write_at(&bytes[before_wrap..], self.offset).map_err(io)?;
        }
        self.entries.push_back(Written { sequence, event, at: self.next, len: len as u32, tail });
        self.used += len;
        self.next = ((u64::from(self.next) + len) % u64::from(self.len)) as u32;
        self.sequence = sequence;
        Ok(())
    }

    /// Makes sure that an entry whose writing failed cannot come to life: its changes were refused. `false`: not sure.
    pub(super) fn forget_failed(&self, storage: &dyn Storage) -> bool {
        storage.write_at(&[0; SECTOR_LEN as usize], self.offset + u64::from(self.next)).is_ok()
    }

    /// Everything up to this entry is applied and durable in its place.
    pub(super) fn applied(&mut self, sequence: u64) {
        self.tail_sequence = self.tail_sequence.max(sequence + 1);
    }
}

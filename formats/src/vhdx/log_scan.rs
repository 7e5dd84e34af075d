//! Finding the active sequence of a log (2.3.3), in time linear in the log's length.
//!
//! The specification's algorithm looks at every 4 KiB sector as the possible beginning of an entry and takes checksums over
//! entries as it goes, which a hostile log can make quadratic. But the sectors inside a valid entry begin with "desc",
//! "zero" or "data", so an entry that contains another one's beginning is not valid, and needs no checksum to be told so.
//! What remains is disjoint, so each sector is summed once. Disjoint entries also have at most one predecessor each, so
//! the sequences are chains, of which only whole ones need to be looked at: a sequence is valid when its head's tail lies
//! within it, and the whole chain contains every tail that a part of it does.

use std::collections::{BTreeMap, HashMap};

use super::corruption::{Corruption, Stop};
use super::header::Header;
use super::log_entry::{
    Descriptor, EntryChecksum, EntryHeader, SECTOR, SECTOR_LEN, descriptor_area, is_data_sector,
};
use crate::{ImageError, Storage};

/// Sectors that are read at once.
const BATCH: u64 = 64;

/// The log of a file, as replay sees it.
pub(super) struct LogReader<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
}

/// The entries that are to be replayed.
#[derive(Debug, Clone)]
pub(super) struct ActiveSequence {
    /// Offset in the log and header of each entry, oldest first.
    pub(super) entries: Vec<(u32, EntryHeader)>,
}

impl ActiveSequence {
    /// The newest entry.
    pub(super) fn head(&self) -> &EntryHeader {
        let (_, header) = self.entries.last().expect("an active sequence has at least one entry");
        header
    }
}

impl<'a> LogReader<'a> {
    pub(super) fn new(storage: &'a dyn Storage, header: &'a Header) -> Self {
        Self { storage, header }
    }

    fn len(&self) -> u64 {
        self.header.log_len.into()
    }

    /// Reads `buf` from an offset in the ring.
    fn read(&self, buf: &mut [u8], at: u64) -> Result<(), ImageError> {
        let io = |e| ImageError::io("reading the log", e);
        let first = ((self.len() - at) as usize).min(buf.len());
        let (head, wrapped) = buf.split_at_mut(first);
        self.storage.read_at(head, self.header.log_offset + at).map_err(io)?;
        if !wrapped.is_empty() {
            self.storage.read_at(wrapped, self.header.log_offset).map_err(io)?;
        }
        Ok(())
    }

    /// The active sequence.
    ///
    /// # Errors
    /// [`Corruption::LogEmpty`] when there is none.
    pub(super) fn active_sequence(&self) -> Result<ActiveSequence, Stop> {
        let mut valid = HashMap::new();
        let candidates = self.candidates()?;
        for (&at, header) in &candidates {
            if !contains_another(&candidates, at, header, self.header.log_len) && self.is_valid(at, header)? {
                valid.insert(at, *header);
            }
        }
        let best = self.newest_chain(&valid);
        best.ok_or_else(|| Corruption::LogEmpty { guid: self.header.log_guid }.into())
    }

    /// Every sector that looks like the beginning of an entry. Holes of the file are skipped.
    fn candidates(&self) -> Result<BTreeMap<u32, EntryHeader>, ImageError> {
        let mut found = BTreeMap::new();
        let mut buf = vec![0; BATCH as usize * SECTOR];
        let base = self.header.log_offset;
        let mut at = 0;
        while at < self.len() {
            let data = self.storage.next_data(base + at).map_err(|e| ImageError::io("reading the log", e))?;
            let Some((start, end)) = data.filter(|(start, _)| *start < base + self.len()) else { break };
            at = (start - base) / SECTOR_LEN * SECTOR_LEN;
            let end = (end - base).min(self.len());
            while at < end {
                let n = (self.len() - at).min(BATCH * SECTOR_LEN) as usize;
                self.read(&mut buf[..n], at)?;
                for (index, sector) in buf[..n].chunks_exact(SECTOR).enumerate() {
                    let header = EntryHeader::decode(sector, self.header.log_guid, self.header.log_len);
                    if let Some(header) = header {
                        found.insert((at as usize + index * SECTOR) as u32, header);
                    }
                }
                at += n as u64;
            }
        }
        Ok(found)
    }

    fn is_valid(&self, at: u32, header: &EntryHeader) -> Result<bool, ImageError> {
        let mut checksum = EntryChecksum::default();
        let mut walk = EntryWalk::new(header);
        self.walk(at, header, |_, sector| {
            checksum.add(sector);
            walk.sector(sector, &mut |_| {})
        })
        .map(|complete| complete && walk.is_complete() && checksum.value() == header.checksum)
    }

    /// Calls `each` with the offset in the log of each sector of an entry and its bytes, until it says no.
    fn walk(
        &self,
        at: u32,
        header: &EntryHeader,
        mut each: impl FnMut(u64, &[u8]) -> bool,
    ) -> Result<bool, ImageError> {
        let mut buf = vec![0; (BATCH * SECTOR_LEN).min(header.len.into()) as usize];
        let mut done = 0;
        while done < u64::from(header.len) {
            let n = (u64::from(header.len) - done).min(buf.len() as u64) as usize;
            let start = (u64::from(at) + done) % self.len();
            self.read(&mut buf[..n], start)?;
            for (index, sector) in buf[..n].chunks_exact(SECTOR).enumerate() {
                if !each((start + (index * SECTOR) as u64) % self.len(), sector) {
                    return Ok(false);
                }
            }
            done += n as u64;
        }
        Ok(true)
    }

    /// Calls `each` with every descriptor of a valid entry, data ones with the offset in the log of their sector.
    pub(super) fn descriptors(
        &self,
        at: u32,
        header: &EntryHeader,
        mut each: impl FnMut(Descriptor, u64),
    ) -> Result<(), ImageError> {
        let mut walk = EntryWalk::new(header);
        let mut data = header.descriptor_sectors() * SECTOR_LEN;
        let descriptor_part = EntryHeader { len: data as u32, ..*header };
        self.walk(at, &descriptor_part, |_, sector| {
            walk.sector(sector, &mut |descriptor| {
                each(descriptor, (u64::from(at) + data) % self.len());
                data += if matches!(descriptor, Descriptor::Data { .. }) { SECTOR_LEN } else { 0 };
            })
        })?;
        Ok(())
    }

    fn newest_chain(&self, valid: &HashMap<u32, EntryHeader>) -> Option<ActiveSequence> {
        let next = |at: u32, header: &EntryHeader| {
            let end = ((u64::from(at) + u64::from(header.len)) % self.len()) as u32;
            let follower = valid.get(&end)?;
            (header.sequence.checked_add(1) == Some(follower.sequence)).then_some(end)
        };
        let followers: std::collections::HashSet<u32> =
            valid.iter().filter_map(|(at, h)| next(*at, h)).collect();
        let mut best: Option<(u64, u32, u32)> = None;
        for (&first, header) in valid.iter().filter(|(at, _)| !followers.contains(at)) {
            let (mut at, mut head) = (first, header);
            while let Some(follower) = next(at, head) {
                (at, head) = (follower, &valid[&follower]);
            }
            let tail_sequence = valid.get(&head.tail).map(|t| t.sequence);
            let inside = tail_sequence.is_some_and(|s| s >= header.sequence && s <= head.sequence)
                && self.leads_to(valid, first, head.tail, head.sequence);
            if inside && best.is_none_or(|(sequence, ..)| head.sequence > sequence) {
                best = Some((head.sequence, head.tail, at));
            }
        }
        let (_, tail, head) = best?;
        let mut entries = vec![(tail, valid[&tail])];
        let mut at = tail;
        while at != head {
            at = next(at, &valid[&at])?;
            entries.push((at, valid[&at]));
        }
        Some(ActiveSequence { entries })
    }

    /// Whether the chain from `first` goes through `tail` before sequence number `until` ends.
    fn leads_to(&self, valid: &HashMap<u32, EntryHeader>, first: u32, tail: u32, until: u64) -> bool {
        let mut at = first;
        loop {
            if at == tail {
                return true;
            }
            let header = &valid[&at];
            if header.sequence >= until {
                return false;
            }
            at = ((u64::from(at) + u64::from(header.len)) % self.len()) as u32;
        }
    }
}

/// Whether another candidate begins inside the entry at `at`, which may wrap.
fn contains_another(
    candidates: &BTreeMap<u32, EntryHeader>,
    at: u32,
    header: &EntryHeader,
    log_len: u32,
) -> bool {
    let end = u64::from(at) + u64::from(header.len);
    let unwrapped = end.min(log_len.into());
    let inside = |from: u64, to: u64| candidates.range(from as u32..to as u32).next().is_some();
    inside(u64::from(at) + 1, unwrapped.max(u64::from(at) + 1))
        || (end > u64::from(log_len) && inside(0, end - u64::from(log_len)))
}

/// Follows an entry's sectors and checks what the checksum does not.
struct EntryWalk {
    sequence: u64,
    /// Descriptor sectors still to come.
    descriptor_sectors: u64,
    descriptors: u64,
    /// Data sectors still to come.
    data: u64,
    index: u64,
}

impl EntryWalk {
    fn new(header: &EntryHeader) -> Self {
        Self {
            sequence: header.sequence,
            descriptor_sectors: header.descriptor_sectors(),
            descriptors: header.descriptors.into(),
            data: 0,
            index: 0,
        }
    }

    fn sector(&mut self, sector: &[u8], found: &mut impl FnMut(Descriptor)) -> bool {
        let index = self.index;
        self.index += 1;
        if self.descriptor_sectors == 0 {
            let expected = self.data > 0;
            self.data = self.data.saturating_sub(1);
            return expected && is_data_sector(sector, self.sequence);
        }
        self.descriptor_sectors -= 1;
        for raw in sector[descriptor_area(index)].chunks_exact(32).take(self.descriptors as usize) {
            self.descriptors -= 1;
            let Some(descriptor) = Descriptor::decode(raw, self.sequence) else { return false };
            self.data += u64::from(matches!(descriptor, Descriptor::Data { .. }));
            found(descriptor);
        }
        true
    }

    fn is_complete(&self) -> bool {
        self.descriptor_sectors == 0 && self.descriptors == 0 && self.data == 0
    }
}

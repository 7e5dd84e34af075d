//! Log entries as they lie in the file (2.3.1).

use super::guid::Guid;
use super::le::{bytes_at, put, u32_at, u64_at};

/// The unit of the log and of what it changes, in bytes.
pub(super) const SECTOR: usize = 4096;
pub(super) const SECTOR_LEN: u64 = SECTOR as u64;
const SIGNATURE: &[u8; 4] = b"loge";
const ZERO: &[u8; 4] = b"zero";
const DATA: &[u8; 4] = b"desc";
const DATA_SECTOR: &[u8; 4] = b"data";
const HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// Descriptors that fit beside the header in the first sector.
const FIRST: u64 = 126;
/// Descriptors of each further sector.
const FURTHER: u64 = 128;

/// The header of a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryHeader {
    pub(super) checksum: u32,
    /// Bytes of the whole entry.
    pub(super) len: u32,
    /// Offset in the log of the entry at which the sequence begins that ends here.
    pub(super) tail: u32,
    pub(super) sequence: u64,
    pub(super) descriptors: u32,
    pub(super) flushed: u64,
    pub(super) last: u64,
}

impl EntryHeader {
    /// Decodes the first 64 bytes of a sector, if they are the plausible header of an entry of this log.
    pub(super) fn decode(buf: &[u8], guid: Guid, log_len: u32) -> Option<Self> {
        if buf[..4] != SIGNATURE[..] || Guid(bytes_at(buf, 32)) != guid {
            return None;
        }
        let header = Self {
            checksum: u32_at(buf, 4),
            len: u32_at(buf, 8),
            tail: u32_at(buf, 12),
            sequence: u64_at(buf, 16),
            descriptors: u32_at(buf, 24),
            flushed: u64_at(buf, 48),
            last: u64_at(buf, 56),
        };
        let sectors = u64::from(header.len) / SECTOR_LEN;
        let plausible = header.len != 0
            && u64::from(header.len).is_multiple_of(SECTOR_LEN)
            && header.len <= log_len
            && u64::from(header.tail).is_multiple_of(SECTOR_LEN)
            && header.tail < log_len
            && header.sequence != 0
            && header.descriptor_sectors() <= sectors
            && sectors - header.descriptor_sectors() <= u64::from(header.descriptors);
        plausible.then_some(header)
    }

    /// Sectors that header and descriptors take.
    pub(super) fn descriptor_sectors(&self) -> u64 {
        descriptor_sectors(self.descriptors.into())
    }
}

fn descriptor_sectors(descriptors: u64) -> u64 {
    1 + descriptors.saturating_sub(FIRST).div_ceil(FURTHER)
}

/// What one descriptor changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Descriptor {
    /// A range becomes zeroes.
    Zero { offset: u64, len: u64 },
    /// One sector is written; its first 8 and last 4 bytes are here.
    Data { offset: u64, leading: [u8; 8], trailing: [u8; 4] },
}

/// The range in a descriptor sector that holds descriptors.
pub(super) fn descriptor_area(sector: u64) -> std::ops::Range<usize> {
    if sector == 0 { HEADER..SECTOR } else { 0..SECTOR }
}

impl Descriptor {
    /// Decodes 32 bytes that must belong to entry `sequence`.
    pub(super) fn decode(buf: &[u8], sequence: u64) -> Option<Self> {
        if u64_at(buf, 24) != sequence {
            return None;
        }
        let offset = u64_at(buf, 16);
        let aligned = |value: u64| value.is_multiple_of(SECTOR_LEN);
        let descriptor = if buf[..4] == ZERO[..] {
            Self::Zero { offset, len: Some(u64_at(buf, 8)).filter(|len| aligned(*len))? }
        } else if buf[..4] == DATA[..] {
            Self::Data { offset, leading: bytes_at(buf, 8), trailing: bytes_at(buf, 4) }
        } else {
            return None;
        };
        aligned(offset).then_some(descriptor)
    }
}

/// Whether a sector is the data sector of an entry.
pub(super) fn is_data_sector(buf: &[u8], sequence: u64) -> bool {
    let high = u64::from(u32_at(buf, 4)) << 32;
    buf[..4] == DATA_SECTOR[..] && high | u64::from(u32_at(buf, SECTOR - 4)) == sequence
}

/// A checksum over sectors that come one after the other.
#[derive(Debug, Default)]
pub(super) struct EntryChecksum {
    sum: u32,
    begun: bool,
}

impl EntryChecksum {
    pub(super) fn add(&mut self, sector: &[u8]) {
        if self.begun {
            self.sum = crc32c::crc32c_append(self.sum, sector);
            return;
        }
        self.begun = true;
        let sum = crc32c::crc32c(&sector[..4]);
        let sum = crc32c::crc32c_append(sum, &[0; 4]);
        self.sum = crc32c::crc32c_append(sum, &sector[8..]);
    }

    pub(super) fn value(&self) -> u32 {
        self.sum
    }
}

/// What a new entry says besides its pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewEntry {
    pub(super) guid: Guid,
    pub(super) sequence: u64,
    /// Offset in the log.
    pub(super) tail: u32,
    pub(super) flushed: u64,
    pub(super) last: u64,
}

/// Bytes of an entry that writes this many sectors.
pub(super) fn entry_len(pages: usize) -> u64 {
    (descriptor_sectors(pages as u64) + pages as u64) * SECTOR_LEN
}

/// The entry that writes `pages` (their place in the file, and 4 KiB each).
pub(super) fn encode_entry(entry: &NewEntry, pages: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut buf = vec![0; entry_len(pages.len()) as usize];
    put(&mut buf, 0, SIGNATURE);
    let len = buf.len() as u32;
    put(&mut buf, 8, &len.to_le_bytes());
    put(&mut buf, 12, &entry.tail.to_le_bytes());
    put(&mut buf, 16, &entry.sequence.to_le_bytes());
    put(&mut buf, 24, &(pages.len() as u32).to_le_bytes());
    put(&mut buf, 32, &entry.guid.0);
    put(&mut buf, 48, &entry.flushed.to_le_bytes());
    put(&mut buf, 56, &entry.last.to_le_bytes());
    let data = descriptor_sectors(pages.len() as u64) as usize * SECTOR;
    for (index, (offset, page)) in pages.iter().enumerate() {
        assert_eq!(page.len(), SECTOR, "the log takes whole sectors");
        let at = HEADER + index * DESCRIPTOR;
        put(&mut buf, at, DATA);
        put(&mut buf, at + 4, &page[SECTOR - 4..]);
        put(&mut buf, at + 8, &page[..8]);
        put(&mut buf, at + 16, &offset.to_le_bytes());
        put(&mut buf, at + 24, &entry.sequence.to_le_bytes());
        let sector = &mut buf[data + index * SECTOR..][..SECTOR];
        sector.copy_from_slice(page);
        put(sector, 0, DATA_SECTOR);
        put(sector, 4, &((entry.sequence >> 32) as u32).to_le_bytes());
        put(sector, SECTOR - 4, &(entry.sequence as u32).to_le_bytes());
    }
    let sum = crc32c::crc32c(&buf);
    put(&mut buf, 4, &sum.to_le_bytes());
    buf
}

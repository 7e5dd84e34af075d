//! The map that blktap keeps behind the block table: a bit for each block whose sectors are all its own. It is no part of
//! the specification, but software that expects one does not open a disk without it, so it is kept where it is, and moves
//! with the table.
//!
//! ```text
//!   block table | "tdbatmap" header (one sector) ... | map
//! ```

use crate::{ImageError, Storage};

use super::SECTOR;
use super::bytes::{put, u32_at, u64_at};
use super::header::Header;

const COOKIE: &[u8; 8] = b"tdbatmap";
/// The most that is read of a map: as much as the largest table needs.
const MAP_MAX: u64 = 1 << 20;

/// Such a map, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batmap {
    header: [u8; SECTOR as usize],
    /// Where its header is: right behind the table.
    pub(super) header_at: u64,
    /// Where the map is.
    pub(super) map_at: u64,
    map: Vec<u8>,
}

impl Batmap {
    /// Looks for one behind the table, in what precedes `limit`. What is not whole is none.
    pub(super) fn find(
        storage: &dyn Storage,
        header: &Header,
        limit: u64,
    ) -> Result<Option<Self>, ImageError> {
        let table_end = header.table_offset.saturating_add(u64::from(header.table_entries) * 4);
        let header_at = table_end.next_multiple_of(SECTOR);
        if header_at.saturating_add(SECTOR) > limit {
            return Ok(None);
        }
        let mut raw = [0; SECTOR as usize];
        read(storage, &mut raw, header_at)?;
        let (map_at, sectors) = (u64_at(&raw, 8), u64::from(u32_at(&raw, 16)));
        let len = sectors * SECTOR;
        let enough = len * 8 >= u64::from(header.table_entries);
        let inside = map_at >= header_at + SECTOR && map_at.checked_add(len).is_some_and(|end| end <= limit);
        if &raw[..8] != COOKIE || len > MAP_MAX || !enough || !inside || !map_at.is_multiple_of(SECTOR) {
            return Ok(None);
        }
        let mut map = vec![0; len as usize];
        read(storage, &mut map, map_at)?;
        Ok(Some(Self { header: raw, header_at, map_at, map }))
    }

    /// Where the map ends.
    pub(super) fn end(&self) -> u64 {
        self.map_at + self.map.len() as u64
    }

    /// Whether the block is said to hold all its sectors.
    pub(super) fn is_set(&self, block: u64) -> bool {
        self.map.get((block / 8) as usize).is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
    }

    /// Whether the checksum of the map is right.
    pub(super) fn is_intact(&self) -> bool {
        !self.map.iter().map(|&b| u32::from(b)).sum::<u32>() == u32_at(&self.header, 24)
    }

    /// The bytes of header and map for a table of `entries` entries that ends at `table_end`: the same bits, and none for
    /// what is new. Bytes of zero do not change the checksum.
    pub(super) fn moved(&self, table_end: u64, entries: u32) -> Vec<u8> {
        let len = u64::from(entries).div_ceil(8).next_multiple_of(SECTOR).max(self.map.len() as u64);
        let mut bytes = vec![0; (SECTOR + len) as usize];
        put(&mut bytes, 0, &self.header);
        put(&mut bytes, 8, &(table_end + SECTOR).to_be_bytes());
        put(&mut bytes, 16, &((len / SECTOR) as u32).to_be_bytes());
        put(&mut bytes, SECTOR as usize, &self.map);
        bytes
    }
}

fn read(storage: &dyn Storage, buf: &mut [u8], at: u64) -> Result<(), ImageError> {
    storage.read_at(buf, at).map_err(|e| ImageError::io(format!("looking for blktap's block map at {at}"), e))
}

//! The header of dynamic and differencing disks: 1024 bytes (specification, "Dynamic Disk Header Format").

use uuid::Uuid;

use super::bytes::{put, u32_at, u64_at};
use super::footer::checksum;
use super::locator::{self, Locator};
use super::{Corruption, MAX_BLOCK_SIZE, MAX_TABLE_ENTRIES};

/// Length of the header in bytes.
pub(super) const HEADER_LEN: u64 = 1024;
pub(super) const COOKIE: &[u8; 8] = b"cxsparse";
/// Where its checksum is.
pub(super) const CHECKSUM_AT: usize = 36;

/// A header that was validated by itself; where it points to is for the reader to check.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) table_offset: u64,
    pub(super) table_entries: u32,
    pub(super) block_size: u32,
    pub(super) parent_id: Uuid,
    pub(super) parent_name: String,
    pub(super) locators: Vec<Locator>,
}

impl Header {
    /// Parses and checks the header that was read at `offset`.
    pub(super) fn parse(raw: &[u8; HEADER_LEN as usize], offset: u64) -> Result<Self, Corruption> {
        if &raw[..8] != COOKIE {
            return Err(Corruption::HeaderCookie { offset });
        }
        let stored = u32_at(raw, CHECKSUM_AT);
        let computed = checksum(raw, CHECKSUM_AT);
        if stored != computed {
            return Err(Corruption::HeaderChecksum { offset, stored, computed });
        }
        let version = u32_at(raw, 24);
        if version >> 16 != 1 {
            return Err(Corruption::HeaderVersion { version });
        }
        let block_size = u32_at(raw, 32);
        if !block_size.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(Corruption::BlockSize { size: block_size });
        }
        let table_entries = u32_at(raw, 28);
        if table_entries > MAX_TABLE_ENTRIES {
            return Err(Corruption::TableTooLarge { entries: table_entries });
        }
        let table_offset = u64_at(raw, 16);
        if !table_offset.is_multiple_of(512) {
            return Err(Corruption::TableUnaligned { offset: table_offset });
        }
        Ok(Self {
            table_offset,
            table_entries,
            block_size,
            parent_id: locator::parent_id(raw),
            parent_name: locator::parent_name(raw),
            locators: Locator::all(raw),
        })
    }

    /// The bytes of a dynamic disk's header.
    pub(super) fn dynamic(
        table_offset: u64,
        table_entries: u32,
        block_size: u32,
    ) -> [u8; HEADER_LEN as usize] {
        let mut raw = [0; HEADER_LEN as usize];
        put(&mut raw, 0, COOKIE);
        put(&mut raw, 8, &u64::MAX.to_be_bytes());
        put(&mut raw, 16, &table_offset.to_be_bytes());
        put(&mut raw, 24, &0x0001_0000u32.to_be_bytes());
        put(&mut raw, 28, &table_entries.to_be_bytes());
        put(&mut raw, 32, &block_size.to_be_bytes());
        let sum = checksum(&raw, CHECKSUM_AT);
        put(&mut raw, CHECKSUM_AT, &sum.to_be_bytes());
        raw
    }
}

//! The header of dynamic and differencing disks: 1024 bytes (specification, "Dynamic Disk Header Format").

use uuid::Uuid;

use super::bytes::{put, u32_at, u64_at};
use super::footer::checksum;
use super::{Corruption, MAX_BLOCK_SIZE, MAX_TABLE_ENTRIES};

/// Length of the header in bytes.
pub(super) const HEADER_LEN: u64 = 1024;
const COOKIE: &[u8; 8] = b"cxsparse";
const CHECKSUM_AT: usize = 36;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 512;
const LOCATORS_AT: usize = 576;
const LOCATOR_COUNT: usize = 8;
/// Longest path of a parent in bytes of UTF-16: 4096 characters.
pub(super) const MAX_LOCATOR_LEN: u32 = 8192;

/// Where one of the parent's paths is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Locator {
    /// Which of the eight.
    pub(super) index: usize,
    /// Platform code, such as `W2ru`.
    pub(super) code: [u8; 4],
    /// Length of the path in bytes. (The space reserved for it is given in bytes by some writers and in sectors by
    /// others, so it is not looked at.)
    pub(super) len: u32,
    /// Where the path is in the file.
    pub(super) offset: u64,
}

impl Locator {
    /// Whether it is a path of Windows in UTF-16, relative or absolute.
    pub(super) fn is_utf16(&self) -> bool {
        matches!(&self.code, b"W2ru" | b"W2ku")
    }
}

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
        let mut id = [0; 16];
        id.copy_from_slice(&raw[40..56]);
        Ok(Self {
            table_offset,
            table_entries,
            block_size,
            parent_id: Uuid::from_bytes(id),
            parent_name: parent_name(&raw[NAME_AT..NAME_AT + NAME_LEN]),
            locators: (0..LOCATOR_COUNT).filter_map(|index| locator(raw, index)).collect(),
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

/// The parent's name, UTF-16 big-endian up to a NUL. Only shown to people, never opened, so what is not valid is
/// replaced.
fn parent_name(field: &[u8]) -> String {
    let units: Vec<u16> = field
        .chunks_exact(2)
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
        .take_while(|&unit| unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}

fn locator(raw: &[u8; HEADER_LEN as usize], index: usize) -> Option<Locator> {
    let entry = &raw[LOCATORS_AT + 24 * index..][..24];
    let code = [entry[0], entry[1], entry[2], entry[3]];
    (code != [0; 4]).then(|| Locator { index, code, len: u32_at(entry, 8), offset: u64_at(entry, 16) })
}

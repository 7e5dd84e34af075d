//! Region tables (2.2.3): where the BAT and the metadata are.

use std::collections::BTreeSet;

use super::MIB;
use super::corruption::{Corruption, Stop};
use super::guid::Guid;
use super::le::{bytes_at, put, u32_at, u64_at};
use super::parse::OnIssue;
use crate::{ImageError, Storage};

const SIGNATURE: &[u8; 4] = b"regi";
/// Bytes of a region table; its checksum covers all of them.
pub(super) const TABLE_SIZE: usize = 64 << 10;
/// Where the two region tables are.
pub(super) const TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
const MAX_ENTRIES: u32 = 2047;
/// The BAT of a disk of 64 TiB in blocks of 1 MiB takes 513 MiB.
const MAX_BAT: u32 = 513 << 20;
const MAX_METADATA: u32 = 128 << 20;

const BAT: Guid = Guid::from_digits(0x2DC27766_F623_4200_9D64_115E9BFD4A08);
const METADATA: Guid = Guid::from_digits(0x8B7CA206_4790_4B9A_B8FE_575F050F886E);

/// A part of the file that a region takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) guid: Guid,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// The regions of a file.
#[derive(Debug, Clone)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
    /// Those that are not known and may be ignored; their space is theirs all the same.
    pub(super) unknown: Vec<Region>,
    /// What is wrong with the spare copy, for `check`.
    pub(super) spare: Option<Corruption>,
}

impl Regions {
    /// All regions, with their names.
    pub(super) fn all(&self) -> impl Iterator<Item = (&'static str, Region)> {
        let known = [("the BAT region", self.bat), ("the metadata region", self.metadata)];
        known.into_iter().chain(self.unknown.iter().map(|r| ("an unknown region", *r)))
    }
}

/// The raw tables, each or what is wrong with it.
pub(super) fn read_tables(storage: &dyn Storage) -> Result<[Result<Vec<u8>, &'static str>; 2], ImageError> {
    let mut tables = [const { Err("") }; 2];
    for (table, offset) in tables.iter_mut().zip(TABLE_OFFSETS) {
        let mut buf = vec![0; TABLE_SIZE];
        storage.read_at(&mut buf, offset).map_err(|e| ImageError::io("reading the region tables", e))?;
        *table = if buf[..4] != SIGNATURE[..] {
            Err("bad signature")
        } else if checksum(&buf) != u32_at(&buf, 4) {
            Err("bad checksum")
        } else if u32_at(&buf, 8) > MAX_ENTRIES {
            Err("EntryCount above 2047")
        } else {
            Ok(buf)
        };
    }
    Ok(tables)
}

/// Reads the first valid region table. `None` where the place of a known region is not known; what is wrong goes to `issue`.
pub(super) fn read_regions(storage: &dyn Storage, issue: OnIssue<'_>) -> Result<Option<Regions>, Stop> {
    let bad = |index: u8, reason| Corruption::RegionTable {
        index,
        offset: TABLE_OFFSETS[usize::from(index) - 1],
        reason,
    };
    let (table, spare) = match read_tables(storage)? {
        [Ok(a), Ok(b)] => {
            let differ = (a != b).then_some(Corruption::RegionTablesDiffer);
            (a, differ)
        }
        [Ok(a), Err(reason)] => (a, Some(bad(2, reason))),
        [Err(reason), Ok(b)] => (b, Some(bad(1, reason))),
        [Err(first), Err(second)] => {
            return issue(Corruption::NoValidRegionTable { first, second }).map(|()| None);
        }
    };
    let file_len = storage.len().map_err(|e| ImageError::io("reading the size", e))?;
    let regions = parse(&table, file_len, issue)?;
    Ok(regions.map(|regions| Regions { spare, ..regions }))
}

fn parse(table: &[u8], file_len: u64, issue: OnIssue<'_>) -> Result<Option<Regions>, Stop> {
    let (mut bat, mut metadata, mut unknown) = (None, None, Vec::new());
    let mut seen = BTreeSet::new();
    for index in 0..u32_at(table, 8) as usize {
        let entry = &table[16 + index * 32..48 + index * 32];
        let region =
            Region { guid: Guid(bytes_at(entry, 0)), offset: u64_at(entry, 16), len: u32_at(entry, 24) };
        if !seen.insert(region.guid) {
            issue(Corruption::RegionDuplicate { guid: region.guid })?;
            continue;
        }
        let required = u32_at(entry, 28) & 1 != 0;
        if required && region.guid != BAT && region.guid != METADATA {
            issue(Corruption::RegionUnknown { guid: region.guid })?;
        }
        let placed = validate_place(&region, file_len).and_then(|()| match region.guid {
            BAT => limit(region, "BAT", MAX_BAT),
            METADATA => limit(region, "metadata", MAX_METADATA),
            _ => Ok(region),
        });
        match placed {
            Err(corruption) => issue(corruption)?,
            Ok(region) if region.guid == BAT => bat = Some(region),
            Ok(region) if region.guid == METADATA => metadata = Some(region),
            Ok(region) => unknown.push(region),
        }
    }
    for (guid, what) in [(BAT, "BAT"), (METADATA, "metadata")] {
        if !seen.contains(&guid) {
            issue(Corruption::RegionMissing { what })?;
        }
    }
    let known = bat.zip(metadata);
    Ok(known.map(|(bat, metadata)| Regions { bat, metadata, unknown, spare: None }))
}

fn validate_place(region: &Region, file_len: u64) -> Result<(), Corruption> {
    let Region { guid, offset, len } = *region;
    let aligned = offset.is_multiple_of(MIB) && u64::from(len).is_multiple_of(MIB);
    let end = offset.checked_add(len.into()).filter(|end| *end < 1 << 63);
    let Some(end) = end.filter(|_| aligned && offset >= MIB && len != 0) else {
        return Err(Corruption::RegionPlace { guid, offset, len });
    };
    if end > file_len {
        let what = format!("region {guid}");
        return Err(Corruption::BeyondEnd { what, offset, len: len.into(), file_len });
    }
    Ok(())
}

fn limit(region: Region, what: &'static str, max: u32) -> Result<Region, Corruption> {
    if region.len > max {
        return Err(Corruption::RegionTooLarge { what, len: region.len, max });
    }
    Ok(region)
}

fn checksum(table: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&table[..4]);
    let sum = crc32c::crc32c_append(sum, &[0; 4]);
    crc32c::crc32c_append(sum, &table[8..TABLE_SIZE])
}

/// The table of a new file.
pub(super) fn encode_table(bat: (u64, u32), metadata: (u64, u32)) -> Vec<u8> {
    let mut table = vec![0; TABLE_SIZE];
    put(&mut table, 0, SIGNATURE);
    put(&mut table, 8, &2_u32.to_le_bytes());
    for (index, (guid, (offset, len))) in [(BAT, bat), (METADATA, metadata)].into_iter().enumerate() {
        let at = 16 + index * 32;
        put(&mut table, at, &guid.0);
        put(&mut table, at + 16, &offset.to_le_bytes());
        put(&mut table, at + 24, &len.to_le_bytes());
        // QEMU leaves it 0, but VirtualBox refuses that.
        put(&mut table, at + 28, &1_u32.to_le_bytes());
    }
    let sum = checksum(&table);
    put(&mut table, 4, &sum.to_le_bytes());
    table
}

/// The valid table, with another place and length for the region `guid`.
pub(super) fn table_with_region(
    storage: &dyn Storage,
    guid: Guid,
    offset: u64,
    len: u32,
) -> Result<Vec<u8>, ImageError> {
    let [first, second] = read_tables(storage)?;
    let mut table = first.or(second).map_err(|reason| {
        let stop: Stop = Corruption::NoValidRegionTable { first: reason, second: reason }.into();
        ImageError::from(stop)
    })?;
    for index in 0..u32_at(&table, 8) as usize {
        let at = 16 + index * 32;
        if Guid(bytes_at(&table, at)) == guid {
            put(&mut table, at + 16, &offset.to_le_bytes());
            put(&mut table, at + 24, &len.to_le_bytes());
        }
    }
    put(&mut table, 4, &[0; 4]);
    let sum = checksum(&table);
    put(&mut table, 4, &sum.to_le_bytes());
    Ok(table)
}

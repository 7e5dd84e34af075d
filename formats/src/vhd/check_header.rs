//! The part of a check that looks at the dynamic header, and at what it says of a parent.

use crate::ImageError;

use super::bytes::{put, u32_at, u64_at};
use super::check::{Exam, is_ones};
use super::corruption::Fault;
use super::footer::{DiskType, FOOTER_LEN, checksum};
use super::header::{CHECKSUM_AT, COOKIE, HEADER_LEN, Header};
use super::layout::{self, Found, Shape, Structure};
use super::locator::{Locator, RawHeader};
use super::{Corruption, MAX_BLOCK_SIZE, MAX_TABLE_ENTRIES, SECTOR};

/// What is known of a disk whose header makes sense.
pub(super) struct Known {
    pub(super) header: Header,
    pub(super) shape: Shape,
    pub(super) structures: Vec<Structure>,
}

/// Looks at the header. Returns what it says if that is enough to go on to the blocks.
pub(super) fn look_at_header(
    exam: &mut Exam<'_>,
    found: &Found,
    size: Option<u64>,
) -> Result<Option<Known>, Fault> {
    let (at, limit) = (found.footer.data_offset(), found.limit());
    let raw = match read(exam, at, limit) {
        Ok(raw) => raw,
        Err(Fault::Corrupt(c)) => {
            exam.damage(&c);
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    if raw[..8] != *COOKIE {
        exam.damage(&Corruption::HeaderCookie { offset: at });
        return Ok(None);
    }
    look_at_fields(exam, &raw, at);
    let mut structures = vec![
        Structure { name: "footer's copy", offset: 0, end: FOOTER_LEN },
        Structure { name: "dynamic header", offset: at, end: at + HEADER_LEN },
    ];
    if found.disk_type == DiskType::Differencing {
        look_at_parent(exam, found, &raw, &mut structures)?;
    } else if raw[40..60].iter().chain(&raw[64..768]).any(|&b| b != 0) {
        exam.note(
            "vhd-parent-unused",
            "dynamic header",
            at,
            "a disk that is not differencing names a parent",
        );
    }
    // What is wrong with checksum and version was said; the fields are believed as far as they are possible.
    let mut plain = raw;
    put(&mut plain, 24, &0x0001_0000u32.to_be_bytes());
    let sum = checksum(&plain, CHECKSUM_AT);
    put(&mut plain, CHECKSUM_AT, &sum.to_be_bytes());
    let header = Header::parse(&plain, at).ok();
    let whole = match &header {
        Some(header) => look_at_table(exam, header, limit, &mut structures),
        None => false,
    };
    look_for_overlaps(exam, &mut structures);
    let (Some(header), Some(size), true) = (header, size, whole) else { return Ok(None) };
    let shape = Shape::new(size, header.block_size, header.table_offset);
    let (entries, needed) = (header.table_entries, shape.blocks);
    if u64::from(entries) < needed {
        exam.damage(&Corruption::TableTooSmall { entries, needed });
        return Ok(None);
    }
    if u64::from(entries) > needed {
        let message = format!("max table entries {entries}: the disk has {needed} blocks");
        exam.note("vhd-table-entries", "dynamic header", at, message);
    }
    Ok(Some(Known { header, shape, structures }))
}

fn read(exam: &Exam<'_>, offset: u64, limit: u64) -> Result<RawHeader, Fault> {
    if !offset.is_multiple_of(SECTOR) {
        return Err(Corruption::HeaderUnaligned { offset }.into());
    }
    if offset.checked_add(HEADER_LEN).is_none_or(|end| end > limit) {
        return Err(Corruption::HeaderOutside { offset, limit }.into());
    }
    let mut raw = [0; HEADER_LEN as usize];
    let failed = |e| ImageError::io(format!("reading the dynamic header at {offset}"), e);
    exam.storage.read_at(&mut raw, offset).map_err(failed)?;
    Ok(raw)
}

/// The fields that can be wrong by themselves.
fn look_at_fields(exam: &mut Exam<'_>, raw: &RawHeader, offset: u64) {
    let (stored, computed) = (u32_at(raw, CHECKSUM_AT), checksum(raw, CHECKSUM_AT));
    if stored != computed {
        exam.damage(&Corruption::HeaderChecksum { offset, stored, computed });
    }
    let version = u32_at(raw, 24);
    if version >> 16 != 1 {
        exam.damage(&Corruption::HeaderVersion { version });
    }
    let size = u32_at(raw, 32);
    if !size.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&size) {
        exam.damage(&Corruption::BlockSize { size });
    }
    let entries = u32_at(raw, 28);
    if entries > MAX_TABLE_ENTRIES {
        exam.damage(&Corruption::TableTooLarge { entries });
    }
    let table_offset = u64_at(raw, 16);
    if !table_offset.is_multiple_of(SECTOR) {
        exam.damage(&Corruption::TableUnaligned { offset: table_offset });
    }
    let data_offset = u64_at(raw, 8);
    if !is_ones(data_offset) {
        let message = format!("data offset {data_offset:#x} should be all ones");
        exam.note("vhd-data-offset", "dynamic header", offset, message);
    }
    if raw[60..64].iter().chain(&raw[768..]).any(|&b| b != 0) {
        exam.note("vhd-reserved", "dynamic header", offset, "reserved bytes are not zero");
    }
}

/// Whether the table is in the file.
fn look_at_table(exam: &mut Exam<'_>, header: &Header, limit: u64, structures: &mut Vec<Structure>) -> bool {
    let (offset, len) = (header.table_offset, u64::from(header.table_entries) * 4);
    match offset.checked_add(len) {
        Some(end) if end <= limit => {
            structures.push(Structure { name: "block table", offset, end: end.next_multiple_of(SECTOR) });
            true
        }
        _ => {
            exam.damage(&Corruption::TableOutside { offset, len, limit });
            false
        }
    }
}

fn look_for_overlaps(exam: &mut Exam<'_>, structures: &mut Vec<Structure>) {
    structures.retain(|s| s.offset < s.end);
    structures.sort_by_key(|s| s.offset);
    for pair in structures.windows(2).filter(|pair| pair[0].end > pair[1].offset) {
        let (first, second, offset) = (pair[0].name, pair[1].name, pair[1].offset);
        exam.damage(&Corruption::StructuresOverlap { first, second, offset });
    }
}

/// Looks at what a differencing disk says of its parent.
fn look_at_parent(
    exam: &mut Exam<'_>,
    found: &Found,
    raw: &RawHeader,
    structures: &mut Vec<Structure>,
) -> Result<(), Fault> {
    let at = found.footer.data_offset();
    let id = super::locator::parent_id(raw);
    if id == found.footer.unique_id() {
        let message = format!("the parent's unique id {id} is the disk's own");
        exam.warn("vhd-parent-self", "dynamic header", at + 40, message);
    }
    if id.is_nil() {
        exam.warn("vhd-parent-unknown", "dynamic header", at + 40, "the parent's unique id is zero");
    }
    let locators = Locator::all(raw);
    if locators.is_empty() && super::locator::parent_name(raw).is_empty() {
        let message = "there is neither a name of the parent nor a path to it";
        exam.warn("vhd-parent-unknown", "dynamic header", at + 64, message);
    }
    for index in 0..8u64 {
        let entry = &raw[(576 + 24 * index) as usize..][..24];
        let (used, space, len) = (entry[..4] != [0; 4], u32_at(entry, 4), u32_at(entry, 8));
        let odd = if used {
            // Some give the space in bytes and others in sectors.
            u64::from(space) * SECTOR < u64::from(len) || u32_at(entry, 12) != 0
        } else {
            entry.iter().any(|&b| b != 0)
        };
        if odd {
            let message = format!(
                "parent locator {index}: platform code, data space {space}, data length {len} or the reserved field do \
                 not go together"
            );
            exam.note("vhd-locator-fields", "parent locator", at + 576 + 24 * index, message);
        }
    }
    for locator in &locators {
        look_at_locator(exam, found, locator, structures)?;
    }
    Ok(())
}

fn look_at_locator(
    exam: &mut Exam<'_>,
    found: &Found,
    locator: &Locator,
    structures: &mut Vec<Structure>,
) -> Result<(), Fault> {
    let range = match layout::locator_range(locator, found.limit()) {
        Ok(range) => range,
        Err(c) => {
            exam.damage(&c);
            return Ok(());
        }
    };
    structures.push(range);
    if !matches!(&locator.code, b"W2ru" | b"W2ku" | b"MacX") {
        let code: String =
            locator.code.iter().flat_map(|&b| std::ascii::escape_default(b)).map(char::from).collect();
        let message =
            format!("parent locator {}: the platform code {code:?} is not read here", locator.index);
        exam.note("vhd-locator-unknown", "parent locator", range.offset, message);
    }
    match locator.path(exam.storage) {
        Ok(_) => Ok(()),
        Err(Fault::Corrupt(c)) => {
            exam.damage(&c);
            Ok(())
        }
        Err(e) => Err(e),
    }
}

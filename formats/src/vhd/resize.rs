//! Changing the size of a closed disk.
//!
//! ```text
//!   fixed, growing     footer (old size) to the new end │ zeroes up to there │ footer (new size) in its place │ cut
//!   fixed, shrinking   footer (new size) in its place │ the same right behind the content │ cut
//!   dynamic, growing   zeroes behind the end of the disk in its last block │ entries that say "absent":
//!                      unused ones of the table, or a longer table (in place, or a new one at the end of the
//!                      file, and the header's first sector pointed to it) │ copy │ footer
//!   dynamic, shrinking entries beyond the new end "absent" │ copy │ footer │ header │ cut
//! ```
//!
//! Each `│` is a sync, and what is on its left changes nothing of the content, so a crash leaves the old size or the new
//! one, and doing it again completes it.
//!
//! What comes with growing reads as zeroes, also where the parent of a differencing disk holds something (see `hide`). Only a
//! tail of zeroes is cut off, whoever holds them.

use std::ops::Range;
use std::sync::Arc;

use crate::{ByteSpan, ErrorKind, ImageError, Storage};

use super::footer::DiskType;
use super::grow::PAGE;
use super::hide::{ParentIsZero, hide_parent};
use super::layout::ABSENT;
use super::offline::{Blocks, Closed, bad_size, clear_entries, first_nonzero, first_set};
use super::{Corruption, MAX_TABLE_ENTRIES, MAX_VIRTUAL_SIZE, SECTOR};

/// Makes a disk that nobody uses `new_size` bytes large: a multiple of 512 up to [`MAX_VIRTUAL_SIZE`]. What is added reads as
/// zeroes. With `shrink` the disk may become smaller, if what is cut off holds nothing but zeroes.
///
/// Of a differencing disk the worst is taken for granted, that the parent holds data everywhere: to grow, it is given sectors
/// of its own for all that is new, which costs a bitmap for each block, and to shrink is refused where the parent would be
/// seen. [`resize_over()`] knows better.
///
/// A crash leaves the old size or the new one. What blocks that are cut off took up in the middle of the file is given back
/// by [`super::compact()`].
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] for a size that cannot be, or that would cut off data (it names the first offset of
/// such), [`ErrorKind::Corrupt`], [`ErrorKind::NeedsRepair`], [`ErrorKind::Unsupported`] where a virtual machine was suspended
/// with the disk, [`ErrorKind::NoSpace`], [`ErrorKind::Io`].
pub fn resize(storage: &Arc<dyn Storage>, new_size: u64, shrink: bool) -> Result<(), ImageError> {
    resize_over(storage, new_size, shrink, &|_| Ok(false))
}

/// [`resize()`] of a differencing disk whose parent can be asked what it holds.
///
/// # Errors
/// As [`resize()`], and what `parent_is_zero` says.
pub fn resize_over(
    storage: &Arc<dyn Storage>,
    new_size: u64,
    shrink: bool,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<(), ImageError> {
    if new_size == 0 || !new_size.is_multiple_of(SECTOR) {
        return Err(invalid(format!(
            "the new size {new_size} must be a multiple of {SECTOR} from {SECTOR} to {MAX_VIRTUAL_SIZE} (2040 GiB)"
        )));
    }
    if new_size > MAX_VIRTUAL_SIZE {
        return Err(bad_size(&Corruption::SizeTooLarge { size: new_size }));
    }
    let (mut disk, blocks) = Closed::open_tidy(&**storage)?;
    let smaller = new_size < disk.size;
    if smaller && !shrink {
        return Err(invalid(format!(
            "the disk has {} bytes and would become smaller, {new_size} bytes: that has to be asked for (--shrink), after \
             the guest's file systems were made smaller",
            disk.size
        )));
    }
    match &blocks {
        // What an earlier attempt may have left to do. Its sync may have failed, and a sync brings back only what is written
        // again.
        Some(blocks) if new_size == disk.size && !disk.is_copy_stale() => {
            disk.set_footer(disk.footer.clone())?;
            cut_table(&disk, blocks, u32::try_from(blocks.body.shape.blocks).expect("a table has as many"))
        }
        None if new_size == disk.size => {
            disk.set_footer(disk.footer.clone())?;
            disk.cut(new_size)
        }
        None if smaller => shrink_fixed(&mut disk, new_size),
        None => grow_fixed(&mut disk, new_size),
        Some(blocks) if smaller => shrink_blocks(&mut disk, blocks, new_size, parent_is_zero),
        Some(blocks) => grow_blocks(&mut disk, blocks, new_size, parent_is_zero),
    }
}

fn grow_fixed(disk: &mut Closed<'_>, new_size: u64) -> Result<(), ImageError> {
    disk.make_room(new_size)?;
    // What lies between the old size and the footer was never the guest's: the old footer, or what others left there.
    if first_nonzero(disk.storage, disk.size..new_size)?.is_some() {
        disk.punch(disk.size..new_size)?;
        disk.sync()?;
    }
    disk.set_footer(disk.footer.with_size(new_size))?;
    disk.cut(new_size)
}

fn shrink_fixed(disk: &mut Closed<'_>, new_size: u64) -> Result<(), ImageError> {
    if let Some(data) = first_nonzero(disk.storage, new_size..disk.size)? {
        return Err(in_use(new_size, data));
    }
    disk.set_footer(disk.footer.with_size(new_size))?;
    disk.cut(new_size)
}

fn grow_blocks(
    disk: &mut Closed<'_>,
    blocks: &Blocks,
    new_size: u64,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<(), ImageError> {
    let block_size = blocks.body.shape.block_size;
    let needed = new_size.div_ceil(block_size);
    let entries = u32::try_from(needed).ok().filter(|&n| n <= MAX_TABLE_ENTRIES).ok_or_else(|| {
        invalid(format!(
            "a disk of {new_size} bytes has {needed} blocks of {block_size} bytes, and at most {MAX_TABLE_ENTRIES} are \
             allowed; convert the image to one with larger blocks, or to VHDX"
        ))
    })?;
    clear_tail(disk, blocks)?;
    if entries > blocks.body.header.table_entries {
        lengthen_table(disk, blocks, entries)?;
    }
    if disk.disk_type == DiskType::Differencing
        && let (mut now, Some(blocks)) = Closed::open(disk.storage)?
    {
        hide_parent(&mut now, &blocks, new_size, parent_is_zero)?;
        *disk = now;
    }
    disk.set_footer(disk.footer.with_size(new_size))?;
    cut_table(disk, blocks, entries)
}

/// Takes entries that the disk does not need off the end of the table: 7-Zip and Azure want exactly as many as there are
/// blocks. Not where blktap keeps a map behind the table, which would not be found any more.
fn cut_table(disk: &Closed<'_>, blocks: &Blocks, entries: u32) -> Result<(), ImageError> {
    let header = &blocks.body.header;
    if entries >= header.table_entries || blocks.batmap.is_some() {
        return Ok(());
    }
    let [end, old_end] = [entries, header.table_entries].map(|n| table_end(header.table_offset, n));
    disk.set_table(header.table_offset, entries)?;
    disk.punch(end..old_end)
}

/// Zeroes what the last block has behind the end of the disk, which growing would show.
fn clear_tail(disk: &Closed<'_>, blocks: &Blocks) -> Result<(), ImageError> {
    let shape = &blocks.body.shape;
    let within = disk.size % shape.block_size;
    let last = blocks.body.table[shape.blocks as usize - 1];
    if within == 0 || last == ABSENT {
        return Ok(());
    }
    let data = shape.data_at(last);
    let tail = data + within..data + shape.block_size;
    if first_nonzero(disk.storage, tail.clone())?.is_some() {
        disk.punch(tail)?;
        disk.sync()?;
    }
    Ok(())
}

/// Makes the table `entries` long: where it is, if nothing is in the way, or else at the end of the file.
fn lengthen_table(disk: &mut Closed<'_>, blocks: &Blocks, entries: u32) -> Result<(), ImageError> {
    let offset = blocks.body.header.table_offset;
    let old_end = table_end(offset, blocks.body.header.table_entries);
    let new_end = table_end(offset, entries);
    let used_end = disk.used_end(blocks)?;
    if used_end <= old_end {
        disk.make_room(new_end)?;
    } else if !is_free(disk, blocks, old_end..new_end)? {
        return move_table(disk, blocks, entries, used_end);
    }
    // Entries behind the last block may hold anything, as may the padding: from that block's sector on all is written.
    let known = blocks.body.shape.blocks as usize / 128 * 128;
    write_table(disk, &blocks.body.table[known..], offset + known as u64 * 4, new_end)?;
    disk.sync()?;
    disk.set_table(offset, entries)
}

/// Whether nothing is in `range`, not even what nobody knows.
fn is_free(disk: &Closed<'_>, blocks: &Blocks, range: Range<u64>) -> Result<bool, ImageError> {
    let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
    let len = blocks.body.shape.block_len();
    let at = |entry| u64::from(entry) * SECTOR;
    Ok(range.end <= disk.at
        && !disk.structures(blocks).iter().any(meets)
        && !blocks.placed().any(|(_, entry)| meets(&(at(entry)..at(entry) + len)))
        && first_nonzero(disk.storage, range.clone())?.is_none())
}

/// Writes a longer table at the end of the file, and points the header to it.
fn move_table(disk: &mut Closed<'_>, blocks: &Blocks, entries: u32, used_end: u64) -> Result<(), ImageError> {
    let offset = used_end.next_multiple_of(PAGE);
    disk.make_room(offset + table_space(blocks, entries))?;
    place_table(disk, blocks, entries, offset)
}

/// The bytes that a table takes, with blktap's map if there is one.
pub(super) fn table_space(blocks: &Blocks, entries: u32) -> u64 {
    let map = blocks.batmap.as_ref().map_or(0, |map| map.moved(0, entries).len() as u64);
    table_end(0, entries) + map
}

/// Writes the table with room for `entries` at `offset`, where nothing is, points the header to it, and clears its old
/// place. blktap's map goes with it.
pub(super) fn place_table(
    disk: &Closed<'_>,
    blocks: &Blocks,
    entries: u32,
    offset: u64,
) -> Result<(), ImageError> {
    let end = table_end(offset, entries);
    write_table(disk, &blocks.body.table, offset, end)?;
    if let Some(map) = &blocks.batmap {
        disk.write(&map.moved(end, entries), end)?;
    }
    disk.sync()?;
    disk.set_table(offset, entries)?;
    let header = &blocks.body.header;
    disk.punch(header.table_offset..table_end(header.table_offset, header.table_entries))?;
    if let Some(map) = &blocks.batmap {
        disk.punch(map.header_at..map.header_at + SECTOR)?;
        disk.punch(map.map_at..map.end())?;
    }
    Ok(())
}

/// The end of a table, its padding included.
fn table_end(offset: u64, entries: u32) -> u64 {
    (offset + 4 * u64::from(entries)).next_multiple_of(SECTOR)
}

/// Writes `table` at `offset`, and entries without a place from there to `end`.
fn write_table(disk: &Closed<'_>, table: &[u32], offset: u64, end: u64) -> Result<(), ImageError> {
    const CHUNK: u64 = 1 << 20;
    let mut at = offset;
    while at < end {
        let len = (end - at).min(CHUNK);
        let first = (at - offset) / 4;
        let entry = |n: u64| table.get(n as usize).copied().unwrap_or(ABSENT);
        let bytes: Vec<u8> = (first..first + len / 4).flat_map(|n| entry(n).to_be_bytes()).collect();
        disk.write(&bytes, at)?;
        at += len;
    }
    Ok(())
}

fn shrink_blocks(
    disk: &mut Closed<'_>,
    blocks: &Blocks,
    new_size: u64,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<(), ImageError> {
    let block_size = blocks.body.shape.block_size;
    let first_gone = new_size.div_ceil(block_size);
    for block in new_size / block_size..blocks.body.shape.blocks {
        let start = block * block_size;
        let range = start.max(new_size)..(start + block_size).min(disk.size);
        if let Some(data) = first_data(disk, blocks, block, range, parent_is_zero)? {
            return Err(in_use(new_size, data));
        }
    }
    let gone: Vec<u32> = blocks.placed().filter(|&(block, _)| block >= first_gone).map(|(_, e)| e).collect();
    if disk.disk_type == DiskType::Differencing {
        // A block without a place would show the parent as long as the disk reaches there: entries behind its end come after.
        disk.set_footer(disk.footer.with_size(new_size))?;
        clear_entries(disk, blocks, first_gone)?;
        disk.sync()?;
    } else {
        clear_entries(disk, blocks, first_gone)?;
        disk.sync()?;
        disk.set_footer(disk.footer.with_size(new_size))?;
    }
    cut_table(disk, blocks, u32::try_from(first_gone).expect("fewer than there are"))?;
    for entry in gone {
        let at = u64::from(entry) * SECTOR;
        disk.punch(at..at + blocks.body.shape.block_len())?;
    }
    if let (mut disk, Some(blocks)) = Closed::open(disk.storage)? {
        disk.cut(disk.used_end(&blocks)?)?;
    }
    Ok(())
}

/// The first sector of a range of the disk, which lies in one block, that does not read as zeroes.
fn first_data(
    disk: &Closed<'_>,
    blocks: &Blocks,
    block: u64,
    range: Range<u64>,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<Option<u64>, ImageError> {
    let shape = &blocks.body.shape;
    let differencing = disk.disk_type == DiskType::Differencing;
    let of_parent = |range: Range<u64>| {
        let seen = parent_is_zero(ByteSpan::new(range.start, range.end - range.start))?;
        Ok((!seen).then_some(range.start))
    };
    let Some(place) = blocks.place_of(block) else {
        return if differencing { of_parent(range) } else { Ok(None) };
    };
    let start = block * shape.block_size;
    let data = place + shape.bitmap_len;
    let of_disk = |range: Range<u64>| {
        let found = first_nonzero(disk.storage, data + range.start - start..data + range.end - start)?;
        Ok(found.map(|at| start + at - data))
    };
    if !differencing {
        return of_disk(range);
    }
    let bitmap = blocks.bitmap(disk.storage, (place / SECTOR) as u32)?;
    let is_own = |at: u64| {
        let sector = (at - start) / SECTOR;
        first_set(&bitmap, sector, sector + 1).is_some()
    };
    let mut at = range.start;
    while at < range.end {
        let own = is_own(at);
        let mut end = at;
        while end < range.end && is_own(end) == own {
            end += SECTOR;
        }
        let found = if own { of_disk(at..end)? } else { of_parent(at..end)? };
        if found.is_some() {
            return Ok(found);
        }
        at = end;
    }
    Ok(None)
}

fn in_use(new_size: u64, data: u64) -> ImageError {
    invalid(format!(
        "the disk cannot be made {new_size} bytes large: there is data at {data}; make the guest's file systems and \
         partitions smaller first, and have the guest discard what it freed (of a differencing disk whose parents were not \
         named, what the parents may hold counts as data: name them)"
    ))
}

fn invalid(message: String) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, format!("VHD: {message}"))
}

//! Giving back the space that a closed disk does not need.
//!
//! ```text
//!   1  blocks that say nothing (all zeroes; of a differencing disk: no sector of its own) are cleared │ their entries
//!   2  a table that growing has put behind blocks is copied to a hole before them │ header │
//!   3  blocks from the end of the file are copied into holes │ their entries
//!   4  the footer right behind what is left │ the file is cut
//! ```
//!
//! Each `│` is a sync. An entry is four bytes in one sector, and what it points to before and after holds the same, so
//! a crash anywhere leaves the same content, and doing it again goes on.
//!
//! Holes are what lies between blocks, and what reads as zeroes before the first one: there other software keeps
//! structures of its own.

use std::ops::Range;
use std::sync::Arc;

use crate::{CompactOutcome, ImageError, Storage};

use super::SECTOR;
use super::footer::DiskType;
use super::layout::ABSENT;
use super::offline::{Blocks, Closed, first_nonzero, first_set};
use super::resize::{place_table, table_space};

/// How much is copied between two syncs, in bytes.
const BATCH: u64 = 64 << 20;

/// Makes the file of a disk that nobody uses as small as it can be: blocks that hold only zeroes (of a differencing disk:
/// no sector of its own) lose their place, and blocks are moved from the end of the file into holes. Of a fixed disk
/// only what lies behind its content is cut off. The content stays as it is, at every moment.
///
/// `progress` gets the bytes that were looked at or moved, and how many there are in all as far as is known by then.
///
/// # Errors
/// As [`super::resize()`].
pub fn compact(
    storage: &Arc<dyn Storage>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompactOutcome, ImageError> {
    let storage = &**storage;
    let (mut disk, blocks) = Closed::open_tidy(storage)?;
    let old_len = disk.file_len;
    let mut work = Work { done: 0, total: 0, progress };
    let Some(mut blocks) = blocks else {
        disk.cut(disk.size)?;
        return Ok(CompactOutcome { freed_bytes: old_len.saturating_sub(disk.file_len), moved_bytes: 0 });
    };
    let mut holes = drop_blocks(&disk, &mut blocks, &mut work)?;
    if bring_table_back(&disk, &blocks)?
        && let (_, Some(now)) = Closed::open(storage)?
    {
        blocks = now;
    }
    let moves = plan(&disk, &blocks)?;
    carry_out(&disk, &blocks, &moves, &mut work)?;
    holes.extend(moves.iter().map(|m| m.from.clone()));
    // Read anew, so that what was done is validated before the file is cut.
    let (mut disk, blocks) = Closed::open(storage)?;
    let mut freed = 0;
    if let Some(blocks) = &blocks {
        disk.cut(disk.used_end(blocks)?)?;
        freed = clear(&disk, blocks, holes)?;
    }
    freed += old_len.saturating_sub(disk.file_len);
    Ok(CompactOutcome { freed_bytes: freed, moved_bytes: moves.iter().map(Move::len).sum() })
}

/// Gives the space of those holes back that are still in the file and that nothing was put into. Returns how much it is.
fn clear(disk: &Closed<'_>, blocks: &Blocks, holes: Vec<Range<u64>>) -> Result<u64, ImageError> {
    let taken = taken(disk, blocks);
    let mut freed = 0;
    for hole in holes.into_iter().filter(|hole| hole.end <= disk.at) {
        let next = taken.partition_point(|range| range.end <= hole.start);
        if taken.get(next).is_none_or(|range| range.start >= hole.end) {
            freed += hole.end - hole.start;
            disk.punch(hole)?;
        }
    }
    Ok(freed)
}

/// What is in use before the footer, in order, joined where it meets.
fn taken(disk: &Closed<'_>, blocks: &Blocks) -> Vec<Range<u64>> {
    let len = blocks.body.shape.block_len();
    let mut ranges = disk.structures(blocks);
    ranges.extend(blocks.placed().map(|(_, entry)| u64::from(entry) * SECTOR).map(|at| at..at + len));
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What is told of the progress.
struct Work<'a> {
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Work<'_> {
    fn expect(&mut self, bytes: u64) {
        self.total += bytes;
        (self.progress)(self.done, self.total);
    }

    fn did(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }
}

/// Takes their place from blocks that say nothing. Returns where they were.
fn drop_blocks(
    disk: &Closed<'_>,
    blocks: &mut Blocks,
    work: &mut Work<'_>,
) -> Result<Vec<Range<u64>>, ImageError> {
    let shape = blocks.body.shape;
    let placed: Vec<_> = blocks.placed().collect();
    work.expect(placed.len() as u64 * shape.block_size);
    let (mut empty, mut places) = (Vec::new(), Vec::new());
    for (block, entry) in placed {
        // Whoever goes by blktap's map would look for such a block's data even after it got a new place.
        let mapped = blocks.batmap.as_ref().is_some_and(|map| map.is_set(block));
        if !mapped && says_nothing(disk, blocks, block, entry)? {
            let at = u64::from(entry) * SECTOR;
            empty.push(block);
            places.push(at..at + shape.block_len());
        }
        work.did(shape.block_size);
    }
    if empty.is_empty() {
        return Ok(places);
    }
    // First of all they are cleared, bitmaps included, so that nobody takes what is in them for anything.
    for place in &places {
        disk.punch(place.clone())?;
    }
    disk.sync()?;
    for &block in &empty {
        disk.write(&ABSENT.to_be_bytes(), blocks.entry_at(block))?;
        blocks.body.table[block as usize] = ABSENT;
    }
    disk.sync()?;
    Ok(places)
}

fn says_nothing(disk: &Closed<'_>, blocks: &Blocks, block: u64, entry: u32) -> Result<bool, ImageError> {
    let sectors = blocks.sectors_of(block);
    if disk.disk_type == DiskType::Differencing {
        return Ok(first_set(&blocks.bitmap(disk.storage, entry)?, 0, sectors).is_none());
    }
    let data = blocks.body.shape.data_at(entry);
    Ok(first_nonzero(disk.storage, data..data + sectors * SECTOR)?.is_none())
}

/// Moves a table that lies behind blocks, where growing the disk has put it, before them or into the first hole that takes
/// it. Returns whether it moved.
fn bring_table_back(disk: &Closed<'_>, blocks: &Blocks) -> Result<bool, ImageError> {
    let header = &blocks.body.header;
    let placed = sorted(blocks);
    if placed.first().is_some_and(|&(at, _)| header.table_offset < at) {
        return Ok(false);
    }
    let len = table_space(blocks, header.table_entries);
    let place = Place { before_data: 0, len, align: SECTOR };
    match Holes::new(disk, blocks, &placed, place).next()? {
        Some(to) if to < header.table_offset => {
            place_table(disk, blocks, header.table_entries, to)?;
            disk.sync()?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Where blocks are, and which, in the order of the file.
fn sorted(blocks: &Blocks) -> Vec<(u64, u64)> {
    let mut placed: Vec<_> =
        blocks.placed().map(|(block, entry)| (u64::from(entry) * SECTOR, block)).collect();
    placed.sort_unstable();
    placed
}

/// A block's way to a better place.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Move {
    block: u64,
    from: Range<u64>,
    to: u64,
}

impl Move {
    fn len(&self) -> u64 {
        self.from.end - self.from.start
    }
}

/// Which blocks go where: the last one of the file to the first hole that takes it, and so on until they meet.
fn plan(disk: &Closed<'_>, blocks: &Blocks) -> Result<Vec<Move>, ImageError> {
    let shape = &blocks.body.shape;
    let len = shape.block_len();
    let placed = sorted(blocks);
    // Moving what lies before the last structure makes the file no smaller.
    let floor = disk.structures(blocks).iter().map(|s| s.end).max().unwrap_or(0);
    let align = u64::from(blocks.body.payload_align());
    let place = Place { before_data: shape.bitmap_len, len, align };
    let mut holes = Holes::new(disk, blocks, &placed, place);
    let mut moves = Vec::new();
    for &(at, block) in placed.iter().rev().take_while(|(at, _)| at + len > floor) {
        match holes.next()? {
            Some(to) if to < at => moves.push(Move { block, from: at..at + len, to }),
            _ => break,
        }
    }
    Ok(moves)
}

/// What a place is to be like.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// How far behind its start it is aligned.
    before_data: u64,
    len: u64,
    align: u64,
}

/// The places that are free, from the start of the file on.
struct Holes<'a> {
    storage: &'a dyn Storage,
    gaps: std::vec::IntoIter<Range<u64>>,
    gap: Range<u64>,
    first_block: u64,
    place: Place,
}

impl<'a> Holes<'a> {
    fn new(disk: &Closed<'a>, blocks: &Blocks, placed: &[(u64, u64)], place: Place) -> Self {
        let gaps: Vec<_> = taken(disk, blocks).windows(2).map(|pair| pair[0].end..pair[1].start).collect();
        let first_block = placed.first().map_or(disk.at, |&(at, _)| at);
        Self { storage: disk.storage, gaps: gaps.into_iter(), gap: 0..0, first_block, place }
    }

    /// Where the next one begins.
    fn next(&mut self) -> Result<Option<u64>, ImageError> {
        let Place { before_data, len, align } = self.place;
        loop {
            let at = (self.gap.start + before_data).next_multiple_of(align) - before_data;
            if at + len > self.gap.end {
                let Some(gap) = self.gaps.next() else { return Ok(None) };
                self.gap = gap;
                self.gap.start = self.gap.start.next_multiple_of(SECTOR);
                continue;
            }
            self.gap.start = at + len;
            // Before the first block, what is not zero is somebody's.
            if at < self.first_block
                && let Some(unknown) = first_nonzero(self.storage, at..at + len)?
            {
                self.gap.start = unknown + SECTOR;
                continue;
            }
            return Ok(Some(at));
        }
    }
}

/// Copies blocks, and points their entries to the copies, a batch at a time.
fn carry_out(
    disk: &Closed<'_>,
    blocks: &Blocks,
    moves: &[Move],
    work: &mut Work<'_>,
) -> Result<(), ImageError> {
    work.expect(moves.iter().map(Move::len).sum());
    let per_batch = (BATCH / blocks.body.shape.block_len()).max(1) as usize;
    for batch in moves.chunks(per_batch) {
        for step in batch {
            disk.punch(step.to..step.to + step.len())?;
            copy(disk, step)?;
            work.did(step.len());
        }
        disk.sync()?;
        for step in batch {
            let entry = u32::try_from(step.to / SECTOR).expect("below the old place, which an entry names");
            disk.write(&entry.to_be_bytes(), blocks.entry_at(step.block))?;
        }
        disk.sync()?;
    }
    Ok(())
}

/// Copies a block, its bitmap first, to a place that reads as zeroes. Zeroes stay holes.
fn copy(disk: &Closed<'_>, step: &Move) -> Result<(), ImageError> {
    const CHUNK: u64 = 64 << 10;
    let failed = |e| ImageError::io(format!("reading block {} at {}", step.block, step.from.start), e);
    let mut buf = vec![0; CHUNK as usize];
    let mut at = step.from.start;
    while let Some((start, end)) = disk.storage.next_data(at).map_err(failed)? {
        at = start.max(at);
        if at >= step.from.end {
            break;
        }
        let part = &mut buf[..(end.min(step.from.end) - at).min(CHUNK) as usize];
        disk.storage.read_at(part, at).map_err(failed)?;
        if part.iter().any(|&b| b != 0) {
            disk.write(part, at - step.from.start + step.to)?;
        }
        at += part.len() as u64;
    }
    Ok(())
}

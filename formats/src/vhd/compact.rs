//! Giving back the space that a closed disk does not need.
//!
//! ```text
//!   1  blocks that say nothing (all zeroes; of a differencing disk: no sector of its own) are cleared │ their entries
//!   2  blocks from the end of the file are copied into holes │ their entries
//!   3  the footer right behind what is left │ the file is cut
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
    let moves = plan(&disk, &blocks)?;
    carry_out(&disk, &blocks, &moves, &mut work)?;
    // Read anew, so that what was done is validated before the file is cut.
    let (mut disk, blocks) = Closed::open(storage)?;
    if let Some(blocks) = &blocks {
        disk.cut(disk.used_end(blocks)?)?;
    }
    holes.extend(moves.iter().map(|m| m.from.clone()));
    // Moves are in the order of their targets.
    holes.retain(|hole| {
        let next = moves.partition_point(|m| m.to + m.len() <= hole.start);
        moves.get(next).is_none_or(|m| m.to >= hole.end)
    });
    let mut freed = old_len.saturating_sub(disk.file_len);
    for hole in holes.into_iter().filter(|hole| hole.end <= disk.at) {
        freed += hole.end - hole.start;
        disk.punch(hole)?;
    }
    Ok(CompactOutcome { freed_bytes: freed, moved_bytes: moves.iter().map(Move::len).sum() })
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
    let len = blocks.body.shape.block_len();
    let mut placed: Vec<(u64, u64)> =
        blocks.placed().map(|(block, entry)| (u64::from(entry) * SECTOR, block)).collect();
    placed.sort_unstable();
    let structures = disk.structures(blocks);
    // Moving what lies before the last structure makes the file no smaller.
    let floor = structures.last().map_or(0, |s| s.end);
    let mut holes = Holes::new(disk, blocks, &structures, &placed);
    let mut moves = Vec::new();
    for &(at, block) in placed.iter().rev().take_while(|(at, _)| at + len > floor) {
        match holes.next()? {
            Some(to) if to < at => moves.push(Move { block, from: at..at + len, to }),
            _ => break,
        }
    }
    Ok(moves)
}

/// The places for blocks that are free, from the start of the file on.
struct Holes<'a> {
    storage: &'a dyn Storage,
    gaps: std::vec::IntoIter<Range<u64>>,
    gap: Range<u64>,
    first_block: u64,
    bitmap_len: u64,
    len: u64,
    align: u64,
}

impl<'a> Holes<'a> {
    fn new(disk: &Closed<'a>, blocks: &Blocks, structures: &[Range<u64>], placed: &[(u64, u64)]) -> Self {
        let shape = &blocks.body.shape;
        let len = shape.block_len();
        let mut taken = structures.to_vec();
        taken.extend(placed.iter().map(|&(at, _)| at..at + len));
        taken.sort_by_key(|range| range.start);
        let gaps: Vec<_> = taken.windows(2).map(|pair| pair[0].end..pair[1].start).collect();
        Self {
            storage: disk.storage,
            gaps: gaps.into_iter(),
            gap: 0..0,
            first_block: placed.first().map_or(0, |&(at, _)| at),
            bitmap_len: shape.bitmap_len,
            len,
            align: u64::from(blocks.body.payload_align()),
        }
    }

    /// The next place: where the bitmap goes, so that the data behind it is aligned as that of all blocks is.
    fn next(&mut self) -> Result<Option<u64>, ImageError> {
        loop {
            let data = (self.gap.start + self.bitmap_len).next_multiple_of(self.align);
            let at = data - self.bitmap_len;
            if at + self.len > self.gap.end {
                let Some(gap) = self.gaps.next() else { return Ok(None) };
                self.gap = gap;
                self.gap.start = self.gap.start.next_multiple_of(SECTOR);
                continue;
            }
            self.gap.start = at + self.len;
            if at < self.first_block
                && let Some(unknown) = first_nonzero(self.storage, at..at + self.len)?
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

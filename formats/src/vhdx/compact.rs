//! Giving back the space of an image that holds nothing.
//!
//! ```text
//!   drop   blocks that read as zeroes lose their place; so do sector bitmaps that no block looks at
//!   pack   the last structure of the file moves into the first hole that takes it, as long as there is one:
//!          copied ─► synced ─► the entry logged ─► its old place is free
//!   trim   the file is cut behind its last structure, and what is left between structures becomes holes
//! ```
//!
//! What the disk holds stays as it is at every moment, so its content keeps its id, and children stay children. Partially
//! present blocks keep their places: a daemon that died may owe them sectors that its notes know of.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::MIB;
use super::bat::{BatEntry, state};
use super::log_writer::PAGES_MAX;
use super::metadata::EntryOwner;
use super::offline::{Content, Offline, Pages, copy_within, first_data, for_each_data, punch};
use super::region::Region;
use super::space::Space;
use crate::{CompactOutcome, ImageError, Storage};

/// So many structures and holes are looked at in one round.
const ROUND: usize = 1 << 16;
/// So many bytes are moved between two commits at most.
const BATCH_BYTES: u64 = 512 << 20;

/// Gives unused space of an image back, durably. What the disk holds does not change, whenever it is interrupted; done again
/// it goes on from there. Fixed images keep all their blocks.
///
/// `progress` is called with how many bytes are dealt with and how many there are, as far as is known (the second number may
/// grow).
///
/// # Errors
/// What is wrong with the image, or keeps it from being written; what the file says.
pub fn compact(
    storage: &Arc<dyn Storage>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompactOutcome, ImageError> {
    let before = data_bytes(&**storage)?;
    // Replays a log that was left.
    let image = Offline::open(storage)?;
    let unfinished = image.is_unfinished();
    let parsed = &image.parsed;
    let allocated = parsed.census.allocated * parsed.table.layout.block_size;
    let fixed = parsed.metadata.leave_allocated;
    let missing = parsed.census.allocated < parsed.table.layout.blocks;
    let mut meter = Meter { progress, done: 0, total: allocated };
    meter.step(0);
    let mut moved_bytes = 0;
    if !fixed {
        drop_unused(image, &mut meter)?;
    }
    // The file of a fixed image must not become smaller than all its blocks (2.6.2.1); where some have no place yet it is
    // left alone.
    if !fixed || !missing {
        while let Some(moved) = pack(Offline::open_again(storage, unfinished)?, &mut meter)? {
            moved_bytes += moved;
        }
        trim(Offline::open_again(storage, unfinished)?)?;
    }
    meter.end();
    let freed_bytes = before.saturating_sub(data_bytes(&**storage)?);
    Ok(CompactOutcome { freed_bytes, moved_bytes })
}

struct Meter<'a> {
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl Meter<'_> {
    fn step(&mut self, bytes: u64) {
        self.done += bytes;
        self.total = self.total.max(self.done);
        (self.progress)(self.done, self.total);
    }

    fn end(&mut self) {
        (self.progress)(self.total, self.total);
    }
}

/// Bytes of the file that are no holes.
fn data_bytes(storage: &dyn Storage) -> Result<u64, ImageError> {
    let end = storage.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
    let (mut sum, mut at) = (0, 0);
    while at < end {
        let run = storage.next_data(at).map_err(|e| ImageError::io("looking for holes", e))?;
        let Some((start, stop)) = run.filter(|(start, _)| *start < end) else { break };
        sum += stop.min(end) - start;
        at = stop;
    }
    Ok(sum)
}

// --- dropping --------------------------------------------------------------------------------------------------------

/// Takes their place from blocks that do not need it.
fn drop_unused(mut image: Offline, meter: &mut Meter<'_>) -> Result<(), ImageError> {
    let storage = image.storage.clone();
    let layout = image.layout();
    let mut last_partial = None;
    image.rewrite_entries(|index, entry| {
        let chunk = index / (layout.chunk_ratio + 1);
        Ok(match layout.owner_of(index) {
            None => entry,
            Some(EntryOwner::Bitmap(_)) if last_partial == Some(chunk) => entry,
            Some(EntryOwner::Bitmap(_)) => BatEntry(0),
            Some(EntryOwner::Payload(block)) => match entry.state() {
                state::PARTIALLY_PRESENT => {
                    last_partial = Some(chunk);
                    meter.step(layout.block_size);
                    entry
                }
                state::FULLY_PRESENT => {
                    let at = entry.unit() * MIB;
                    let last = block + 1 == layout.blocks;
                    let len = if last { layout.last_block_len } else { layout.block_size };
                    let empty = first_data(&*storage, at, at + len)?.is_none();
                    meter.step(layout.block_size);
                    if empty { BatEntry::ZERO } else { entry }
                }
                // The place of a block without data is not looked at, and keeps others from being put there.
                state => BatEntry(state.into()),
            },
        })
    })?;
    image.close()
}

// --- packing ---------------------------------------------------------------------------------------------------------

/// Something that takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Structure {
    unit: u64,
    units: u64,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The block that the entry of the BAT at this index names.
    Block {
        index: u64,
        raw: u64,
    },
    Bat,
    Metadata,
    /// What is not moved: the log, and regions that are not known.
    Immovable,
}

/// One round of moving. `None`: nothing could be moved any more.
fn pack(mut image: Offline, meter: &mut Meter<'_>) -> Result<Option<u64>, ImageError> {
    let storage = image.storage.clone();
    let block_units = image.layout().units_per_block();
    let mut holes = Holes::of(&image.parsed.space, block_units);
    let (mut moved, mut batch, mut pages) = (0, 0, Pages::default());
    for structure in last_structures(&image)? {
        let Structure { unit, units, what } = structure;
        let (index, raw) = match what {
            What::Immovable => break,
            // Alone in its round.
            What::Bat | What::Metadata if moved > 0 => break,
            What::Bat | What::Metadata => {
                if let Some(to) = holes.take(unit, units) {
                    move_region(&mut image, what, to * MIB)?;
                    moved = units * MIB;
                    meter.step(moved);
                }
                break;
            }
            What::Block { index, raw } => (index, raw),
        };
        let Some(to) = holes.take(unit, units) else { break };
        image.begin(Content::Stays)?;
        copy_within(&*storage, unit * MIB, to * MIB, units * MIB)?;
        let entry = BatEntry(to << 20 | raw & (MIB - 1));
        if pages.len() == PAGES_MAX || batch >= BATCH_BYTES {
            image.commit(std::mem::take(&mut pages))?;
            batch = 0;
        }
        pages.put(&*storage, image.entry_place(index), &entry.0.to_le_bytes())?;
        (moved, batch) = (moved + units * MIB, batch + units * MIB);
        meter.step(units * MIB);
    }
    image.commit(pages)?;
    image.close()?;
    Ok((moved > 0).then_some(moved))
}

/// The last structures of the file, the very last first.
fn last_structures(image: &Offline) -> Result<Vec<Structure>, ImageError> {
    let mut kept = BinaryHeap::new();
    let mut keep = |structure: Structure| {
        kept.push(Reverse(structure));
        if kept.len() > ROUND {
            kept.pop();
        }
    };
    let (header, regions) = (&image.parsed.headers.current, &image.parsed.regions);
    let region = |region: &Region, what| Structure {
        unit: region.offset / MIB,
        units: u64::from(region.len) / MIB,
        what,
    };
    keep(region(&regions.bat, What::Bat));
    keep(region(&regions.metadata, What::Metadata));
    regions.unknown.iter().for_each(|r| keep(region(r, What::Immovable)));
    let (unit, units) = (header.log_offset / MIB, u64::from(header.log_len) / MIB);
    keep(Structure { unit, units, what: What::Immovable });
    let layout = image.layout();
    image.parsed.table.stream(&*image.storage, |index, entry| {
        let units = match layout.owner_of(index) {
            Some(EntryOwner::Payload(_)) => layout.units_per_block(),
            Some(EntryOwner::Bitmap(_)) => 1,
            None => return Ok(()),
        };
        // Others have lost their places by now.
        if matches!(entry.state(), state::FULLY_PRESENT | state::PARTIALLY_PRESENT) {
            keep(Structure { unit: entry.unit(), units, what: What::Block { index, raw: entry.0 } });
        }
        Ok(())
    })?;
    Ok(kept.into_sorted_vec().into_iter().map(|Reverse(structure)| structure).collect())
}

/// Gives a region another place, which nothing uses.
fn move_region(image: &mut Offline, what: What, to: u64) -> Result<(), ImageError> {
    let regions = &image.parsed.regions;
    let region = if what == What::Bat { regions.bat } else { regions.metadata };
    image.begin(Content::Stays)?;
    copy_within(&*image.storage, region.offset, to, region.len.into())?;
    let mut pages = Pages::default();
    image.put_region(&mut pages, region, to, region.len)?;
    image.commit(pages)
}

/// Runs of unused units, the first of the file first.
struct Holes {
    runs: Vec<(u64, u64)>,
    /// Runs before this one are too short for a block.
    for_blocks: usize,
    block_units: u64,
}

impl Holes {
    fn of(space: &Space, block_units: u64) -> Self {
        Self { runs: space.gaps().take(ROUND).collect(), for_blocks: 0, block_units }
    }

    /// Takes room for `units` units before `below`. The smallest structures take what is too short for others first.
    fn take(&mut self, below: u64, units: u64) -> Option<u64> {
        let fits = |(start, len): &(u64, u64)| *len >= units && *start + units <= below;
        let found = if units == self.block_units {
            while self.runs.get(self.for_blocks).is_some_and(|(_, len)| *len < units) {
                self.for_blocks += 1;
            }
            (self.for_blocks..self.runs.len()).next().filter(|n| fits(&self.runs[*n]))
        } else {
            let short = |run: &(u64, u64)| run.1 < self.block_units && fits(run);
            self.runs.iter().position(short).or_else(|| self.runs.iter().position(fits))
        };
        let (start, len) = &mut self.runs[found?];
        let taken = *start;
        (*start, *len) = (*start + units, *len - units);
        Some(taken)
    }
}

/// Cuts the file behind its last structure, and makes holes of what is not used in it.
fn trim(mut image: Offline) -> Result<(), ImageError> {
    let storage = image.storage.clone();
    let gaps = gaps_with_data(&*storage, &image.parsed.space)?;
    if gaps.is_empty() && image.slack() == 0 {
        return Ok(());
    }
    image.begin(Content::Stays)?;
    for (at, len) in gaps {
        punch(&*storage, at, len)?;
    }
    image.close()
}

/// The gaps between structures that are no holes: (offset, bytes).
pub(super) fn gaps_with_data(storage: &dyn Storage, space: &Space) -> Result<Vec<(u64, u64)>, ImageError> {
    let mut found = Vec::new();
    for (start, len) in space.gaps() {
        let (from, to) = (start * MIB, (start + len) * MIB);
        for_each_data(storage, from, to, |_, _| {
            found.push((from, to - from));
            Ok(false)
        })?;
    }
    Ok(found)
}

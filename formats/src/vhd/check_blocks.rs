//! The part of a check that looks at the block table, the blocks, their bitmaps, and the space between them.

use crate::ImageError;

use super::SECTOR;
use super::batmap::Batmap;
use super::check::{Exam, Mend};
use super::check_header::Known;
use super::corruption::Fault;
use super::footer::DiskType;
use super::grow::end_of_file;
use super::layout::{self, ABSENT, Body, Found};
use super::offline::first_set;

/// Looks at all blocks of a disk whose header and table are where they should be.
pub(super) fn look_at_blocks(exam: &mut Exam<'_>, found: &Found, known: &Known) -> Result<(), Fault> {
    let (shape, limit) = (&known.shape, found.limit());
    let mut table = layout::read_table(exam.storage, &known.header)?;
    let mut faults = Vec::new();
    let blocks_end = layout::validate_blocks(&table, shape, &known.structures, limit, &mut faults);
    for fault in &faults {
        exam.damage(fault);
    }
    look_at_padding(exam, known)?;
    let surplus = table.split_off(shape.blocks as usize).iter().filter(|&&e| e != ABSENT).count() as u64;
    if surplus > 0 {
        let message =
            format!("{surplus} entries beyond the disk's last block are in use and waste their blocks");
        let at = known.header.table_offset + shape.blocks * 4;
        exam.warn("vhd-surplus-blocks", "block table", at, message);
        exam.mendable(Mend::ClearSurplus, format!("takes {surplus} entries out of the block table"));
    }
    if !faults.is_empty() {
        return Ok(());
    }
    let locators = if found.disk_type == DiskType::Differencing { &known.header.locators[..] } else { &[] };
    let reserved = locators.iter().map(|l| l.reserved_end(limit));
    let structures_end = known.structures.iter().map(|s| s.end).chain(reserved).max().unwrap_or(0);
    let header = known.header.clone();
    let body =
        Body { header, shape: *shape, table, structures_end, blocks_end, surplus, parent_paths: Vec::new() };
    let batmap = Batmap::find(exam.storage, &known.header, limit)?;
    look_at_space(exam, found, &body, batmap.as_ref())?;
    look_at_bitmaps(exam, found, &body, batmap.as_ref())
}

fn look_at_padding(exam: &mut Exam<'_>, known: &Known) -> Result<(), Fault> {
    let end = known.header.table_offset + u64::from(known.header.table_entries) * 4;
    let failed = |e| ImageError::io(format!("reading the end of the block table at {end}"), e);
    // A file that was cut may end within that sector.
    let to = end.next_multiple_of(SECTOR).min(exam.storage.len().map_err(failed)?);
    let mut rest = vec![0; to.saturating_sub(end) as usize];
    exam.storage.read_at(&mut rest, end).map_err(failed)?;
    if rest.iter().any(|&b| b != 0xff) {
        let message = "the rest of the table's last sector is not all ones";
        exam.note("vhd-table-padding", "block table", end, message);
    }
    Ok(())
}

/// Space that belongs to nobody: at the end of the file, where new blocks will go, and before.
fn look_at_space(
    exam: &mut Exam<'_>,
    found: &Found,
    body: &Body,
    batmap: Option<&Batmap>,
) -> Result<(), Fault> {
    let block_len = body.shape.block_len();
    let free = layout::first_free(exam.storage, body, found.limit())?;
    let end = found.limit().saturating_sub(end_of_file(free));
    if end >= block_len.max(4096) && found.at.is_some() {
        let message =
            format!("{end} bytes behind the last block belong to nobody, as after a session that was killed");
        exam.warn("vhd-unused-end", "file", free, message);
        exam.mendable(Mend::Cut, "moves the footer behind the last block and cuts the file there");
    }
    let present = body.table.iter().filter(|&&e| e != ABSENT).count() as u64;
    let map = batmap.map_or(0, |map| map.end() - map.header_at);
    let used = (present + body.surplus) * block_len + body.structures_end.min(free) + map;
    // Structures behind the first block are counted as if the file's start reached to them: too little, never too much.
    let unused = free.saturating_sub(used);
    if unused >= body.shape.block_size.max(1 << 20) {
        let message = format!(
            "{unused} bytes between structures and blocks belong to nobody; compacting gives them back"
        );
        exam.warn("vhd-unused-space", "file", body.structures_end, message);
    }
    Ok(())
}

/// How many blocks have something in common, and where the first of them is.
#[derive(Default)]
struct Tally {
    count: u64,
    first: u64,
}

impl Tally {
    fn count(&mut self, at: u64, is_so: bool) {
        if is_so {
            if self.count == 0 {
                self.first = at;
            }
            self.count += 1;
        }
    }

    fn tell(&self, note: impl FnOnce(u64, u64)) {
        if self.count > 0 {
            note(self.first, self.count);
        }
    }
}

fn look_at_bitmaps(
    exam: &mut Exam<'_>,
    found: &Found,
    body: &Body,
    batmap: Option<&Batmap>,
) -> Result<(), Fault> {
    let shape = &body.shape;
    let differencing = found.disk_type == DiskType::Differencing;
    let mut bitmap = vec![0; shape.bitmap_used() as usize];
    let all = shape.block_size / SECTOR;
    let (mut partial, mut beyond, mut empty, mut wrong) = <(Tally, Tally, Tally, Tally)>::default();
    for (block, &entry) in (0..).zip(&body.table).filter(|&(_, &entry)| entry != ABSENT) {
        let at = u64::from(entry) * SECTOR;
        let failed = |e| ImageError::io(format!("reading the sector bitmap at {at}"), e);
        exam.storage.read_at(&mut bitmap, at).map_err(failed)?;
        let sectors = (shape.virtual_size - block * shape.block_size).min(shape.block_size) / SECTOR;
        let full = is_full(&bitmap, sectors);
        partial.count(at, !differencing && !full);
        wrong.count(at, !full && batmap.is_some_and(|map| map.is_set(block)));
        empty.count(at, differencing && first_set(&bitmap, 0, sectors).is_none());
        beyond.count(at, differencing && first_set(&bitmap, sectors, all).is_some());
    }
    partial.tell(|at, n| {
        let message = format!(
            "{n} blocks have bitmaps that do not mark all their sectors as written; the data counts here, but other \
             software may read such sectors as zeroes"
        );
        exam.note("vhd-bitmap-partial", "sector bitmap", at, message);
    });
    empty.tell(|at, n| {
        let message = format!("{n} blocks have no sector of their own; compacting gives them back");
        exam.note("vhd-block-empty", "sector bitmap", at, message);
    });
    beyond.tell(|at, n| {
        let message = format!("{n} blocks have bitmaps that mark sectors beyond the end of the disk");
        exam.note("vhd-bitmap-beyond", "sector bitmap", at, message);
    });
    wrong.tell(|at, n| {
        let message =
            format!("blktap's map says of {n} blocks that all their sectors are written, and they are not");
        exam.warn("vhd-batmap", "block map", at, message);
    });
    if let Some(map) = batmap.filter(|map| !map.is_intact()) {
        exam.note("vhd-batmap", "block map", map.header_at, "the checksum of blktap's map is wrong");
    }
    Ok(())
}

/// Whether the first `sectors` bits are all set.
fn is_full(bitmap: &[u8], sectors: u64) -> bool {
    let (whole, rest) = ((sectors / 8) as usize, sectors % 8);
    bitmap[..whole].iter().all(|&b| b == 0xff)
        && (rest == 0 || bitmap[whole] & !(0xff >> rest) == !(0xff >> rest))
}

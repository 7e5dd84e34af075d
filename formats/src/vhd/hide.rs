//! Hiding what a parent holds behind the end of a disk that is about to grow.
//!
//! A VHD has no word for "zeroes": where the parent holds something, the disk needs sectors of its own. They get blocks whose
//! data is a hole of the file; each costs its bitmap. Until the disk grows, these sectors lie behind its end and nobody
//! reads them.

use crate::{ByteSpan, ErrorKind, ImageError};

use super::SECTOR;
use super::offline::{Blocks, Closed};

/// Whether the parent of a differencing disk reads as zeroes throughout a span, which may lie beyond its end.
pub type ParentIsZero<'a> = &'a dyn Fn(ByteSpan) -> Result<bool, ImageError>;

/// A block that hides something of the parent.
struct Hiding {
    block: u64,
    /// The sectors of it that do.
    sectors: std::ops::Range<u64>,
    /// Where its bitmap is or will be.
    at: u64,
    placed: bool,
}

impl Hiding {
    fn entry(&self) -> u32 {
        u32::try_from(self.at / SECTOR).expect("places beyond what entries can name were refused")
    }
}

/// Gives the disk sectors of zeroes from its end up to `new_size`, wherever the parent holds something. The table has room
/// for them, the data behind the end in the last block is cleared. Durable when it returns.
pub(super) fn hide_parent(
    disk: &mut Closed<'_>,
    blocks: &Blocks,
    new_size: u64,
    parent_is_zero: ParentIsZero<'_>,
) -> Result<(), ImageError> {
    let shape = &blocks.body.shape;
    let used_end = disk.used_end(blocks)?;
    let mut end = used_end;
    let align = u64::from(blocks.body.payload_align());
    let mut hiding = Vec::new();
    for block in disk.size / shape.block_size..new_size.div_ceil(shape.block_size) {
        let start = block * shape.block_size;
        let (from, to) = (start.max(disk.size), (start + shape.block_size).min(new_size));
        if parent_is_zero(ByteSpan::new(from, to - from))? {
            continue;
        }
        let entry = blocks.place_of(block);
        let at = entry.unwrap_or_else(|| (end + shape.bitmap_len).next_multiple_of(align) - shape.bitmap_len);
        if entry.is_none() {
            end = at + shape.block_len();
        }
        let sectors = (from - start) / SECTOR..(to - start) / SECTOR;
        hiding.push(Hiding { block, sectors, at, placed: entry.is_some() });
    }
    if end / SECTOR >= u64::from(u32::MAX) {
        return Err(ImageError::new(
            ErrorKind::NoSpace,
            format!("the file would reach {end} bytes, and a VHD cannot name blocks beyond 2 TiB"),
        ));
    }
    if hiding.is_empty() {
        return Ok(());
    }
    disk.make_room(end)?;
    disk.punch(used_end..end)?;
    for one in &hiding {
        write_bitmap(disk, blocks, one)?;
    }
    disk.sync()?;
    for one in hiding.iter().filter(|one| !one.placed) {
        disk.write(&one.entry().to_be_bytes(), blocks.entry_at(one.block))?;
    }
    disk.sync()
}

/// Marks the sectors as the disk's own. No more than that changes in a bitmap that is in use.
fn write_bitmap(disk: &Closed<'_>, blocks: &Blocks, one: &Hiding) -> Result<(), ImageError> {
    let mut bitmap = if one.placed {
        blocks.bitmap(disk.storage, one.entry())?
    } else {
        vec![0; blocks.body.shape.bitmap_len as usize]
    };
    for sector in one.sectors.clone() {
        bitmap[(sector / 8) as usize] |= 0x80 >> (sector % 8);
    }
    disk.write(&bitmap, one.at)
}

//! Space for new blocks: the file is grown ahead in large steps, so that giving a block its place costs one write of
//! four bytes and no sync.
//!
//! A *slot* is space for one block: its data begins on 4 KiB, its bitmap lies right before (all ones on a dynamic disk, all
//! zeroes on a differencing one, durably), the data is known to read as zeroes, durably, and lies before the footer. A
//! step of growth makes slots in this order:
//!
//! ```text
//!   1  footer at the new end            the old one is still there
//!   2  zero the free space before the old footer, bitmaps of the new slots (but not over the old footer)
//!   3  sync                             from here on the new footer is durable
//!   4  zero the old footer              and sync, if it lies where a slot's data (or bitmap of zeroes) will be
//!   5  the bitmap in whose place it was; the slots may be used
//! ```
//!
//! At every moment the old footer, the new one, or the copy at 0 is whole. A step that fails leaves nothing that the
//! next one would not overwrite.

use crate::{ErrorKind, ImageError, Storage};

use super::SECTOR;
use super::footer::{DiskType, FOOTER_LEN, Footer};
use super::layout::Shape;

/// The grid on which the data of new blocks and the ends of files lie.
pub(super) const PAGE: u64 = 4096;
/// The largest step of growth in bytes, but for blocks that are larger.
const STEP_MAX: u64 = 64 << 20;
/// The most slots of one step, for disks of tiny blocks.
const SLOTS_MAX: u64 = 1024;

/// Slots that lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slots {
    /// Where the data of the first one begins.
    pub(super) first_data: u64,
    /// How many there are.
    pub(super) count: u64,
}

/// The measures of slots on one disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotGrid {
    pub(super) shape: Shape,
    /// What the data of a slot is aligned to.
    align: u64,
    /// From the data of one slot to that of the next.
    pub(super) stride: u64,
    /// Whether the bitmaps of slots are all zeroes: nothing of the block is the disk's own.
    bitmaps_empty: bool,
}

impl SlotGrid {
    pub(super) fn new(shape: Shape, disk_type: DiskType) -> Self {
        let align = shape.slot_align();
        let stride = shape.block_size + shape.bitmap_len.next_multiple_of(align);
        Self { shape, align, stride, bitmaps_empty: disk_type == DiskType::Differencing }
    }

    /// Where the data of the first slot behind `end` begins.
    fn data_behind(&self, end: u64) -> u64 {
        (end + self.shape.bitmap_len).next_multiple_of(self.align)
    }

    /// The end of `slots`.
    fn end_of(&self, slots: Slots) -> u64 {
        slots.first_data + (slots.count - 1) * self.stride + self.shape.block_size
    }

    /// The table entry of the slot whose data begins at `data`. Such an entry exists, since [`Growth::plan`] looked.
    pub(super) fn entry_of(&self, data: u64) -> u32 {
        u32::try_from((data - self.shape.bitmap_len) / SECTOR).expect("slots lie below 2 TiB")
    }

    /// How many slots a step makes.
    pub(super) fn step(&self) -> u64 {
        let bytes = (self.shape.virtual_size / 8).min(STEP_MAX);
        (bytes / self.stride).clamp(1, SLOTS_MAX)
    }
}

/// The file's end, and how it moves. Under the growth lock.
#[derive(Debug)]
pub(super) struct Growth {
    grid: SlotGrid,
    footer: Footer,
    /// Where the durable footer is.
    footer_at: u64,
    /// Size of the file, as far as this session knows.
    file_len: u64,
    /// End of the last block or slot: what follows, up to the footer, belongs to nobody.
    laid_end: u64,
    /// Whether the copy at 0 is to be renewed before the footer moves.
    copy_stale: bool,
    /// Whether this session has moved the file's end.
    pub(super) moved: bool,
}

impl Growth {
    pub(super) fn new(
        grid: SlotGrid,
        footer: Footer,
        footer_at: u64,
        file_len: u64,
        laid_end: u64,
        copy_stale: bool,
    ) -> Self {
        Self { grid, footer, footer_at, file_len, laid_end, copy_stale, moved: false }
    }

    /// The measures of the slots.
    pub(super) fn grid(&self) -> SlotGrid {
        self.grid
    }

    /// Makes up to `count` slots behind those that there are.
    pub(super) fn extend(&mut self, storage: &dyn Storage, count: u64) -> Result<Slots, ImageError> {
        let slots = self.plan(count)?;
        let end = self.grid.end_of(slots);
        let actual = storage.len().map_err(|e| ImageError::io("cannot find out the size of the file", e))?;
        if actual < self.file_len {
            return Err(ImageError::new(
                ErrorKind::Io,
                format!("the file was cut from {} to {actual} bytes behind our back", self.file_len),
            ));
        }
        self.renew_copy(storage)?;
        // A failed step may have left the file longer than it should be.
        let new_len = end_of_file(end).max(actual.next_multiple_of(PAGE));
        self.moved = true;
        let old_footer = if end_of_file(end) <= self.file_len && actual == self.file_len {
            self.zero(storage, self.laid_end, end)?;
            None
        } else {
            self.append_footer(storage, new_len)?;
            self.zero(storage, self.laid_end, self.footer_at)?;
            Some((self.footer_at, actual))
        };
        let bitmap_len = self.shape().bitmap_len;
        let covered = |at: u64| old_footer.is_some_and(|(f, len)| at < len && f < at + bitmap_len);
        self.write_bitmaps(storage, slots, |at| !covered(at))?;
        sync(storage)?;
        if let Some((at, old_len)) = old_footer {
            self.footer_at = new_len - FOOTER_LEN;
            self.file_len = new_len;
            self.zero(storage, at, old_len.min(self.footer_at))?;
            let bitmaps_matter = self.grid.bitmaps_empty && old_len > slots.first_data - bitmap_len;
            if old_len > slots.first_data || bitmaps_matter {
                sync(storage)?;
            }
            self.write_bitmaps(storage, slots, covered)?;
        }
        self.laid_end = end;
        Ok(slots)
    }

    /// Which slots come next: as many of `count` as table entries can name.
    fn plan(&self, count: u64) -> Result<Slots, ImageError> {
        let first_data = self.grid.data_behind(self.laid_end);
        let last_entry = u64::from(u32::MAX - 1);
        let first_entry = (first_data - self.shape().bitmap_len) / SECTOR;
        if first_entry > last_entry {
            return Err(ImageError::new(
                ErrorKind::NoSpace,
                format!("the file has reached {first_data} bytes, and a VHD cannot name blocks beyond 2 TiB"),
            ));
        }
        let nameable = (last_entry - first_entry) * SECTOR / self.grid.stride + 1;
        Ok(Slots { first_data, count: count.clamp(1, nameable) })
    }

    fn shape(&self) -> &Shape {
        &self.grid.shape
    }

    /// Writes the footer at the end of a file of `new_len` bytes; on failure the file gets its old size back.
    fn append_footer(&self, storage: &dyn Storage, new_len: u64) -> Result<(), ImageError> {
        let at = new_len - FOOTER_LEN;
        storage.write_at(self.footer.bytes(), at).map_err(|e| {
            // Best effort: if this fails too, the next step begins at the size that the file then has.
            let _ = storage.set_len(self.file_len);
            ImageError::io(format!("growing the file to {new_len} bytes"), e)
        })
    }

    /// Makes `[from, to)` read as zeroes, where there is anything.
    fn zero(&self, storage: &dyn Storage, from: u64, to: u64) -> Result<(), ImageError> {
        if from >= to {
            return Ok(());
        }
        storage
            .punch(from, to - from)
            .map_err(|e| ImageError::io(format!("clearing the space from {from} to {to}"), e))
    }

    /// Writes the bitmaps of those slots whose bitmap's offset `wanted` takes. Zeroes too, so that the file system has space
    /// for them when bits are set.
    fn write_bitmaps(
        &self,
        storage: &dyn Storage,
        slots: Slots,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<(), ImageError> {
        let mut bitmap = vec![0; self.shape().bitmap_len as usize];
        if !self.grid.bitmaps_empty {
            bitmap[..self.shape().bitmap_used() as usize].fill(0xff);
        }
        for n in 0..slots.count {
            let at = slots.first_data + n * self.grid.stride - self.shape().bitmap_len;
            if wanted(at) {
                storage
                    .write_at(&bitmap, at)
                    .map_err(|e| ImageError::io(format!("writing the sector bitmap at {at}"), e))?;
            }
        }
        Ok(())
    }

    /// Makes the copy at 0 what the footer says, durably, before the footer itself is touched.
    fn renew_copy(&mut self, storage: &dyn Storage) -> Result<(), ImageError> {
        if self.copy_stale {
            storage
                .write_at(self.footer.bytes(), 0)
                .map_err(|e| ImageError::io("renewing the footer's copy at 0", e))?;
            sync(storage)?;
            self.copy_stale = false;
        }
        Ok(())
    }

    /// Moves the footer right behind `used_end`, the end of the last block, and cuts the file there.
    pub(super) fn shrink(&mut self, storage: &dyn Storage, used_end: u64) -> Result<(), ImageError> {
        let new_len = end_of_file(used_end);
        if new_len >= self.file_len {
            sync(storage)?;
        } else {
            self.renew_copy(storage)?;
            let at = new_len - FOOTER_LEN;
            storage
                .write_at(self.footer.bytes(), at)
                .map_err(|e| ImageError::io(format!("writing the footer at {at}"), e))?;
            sync(storage)?;
            storage
                .set_len(new_len)
                .map_err(|e| ImageError::io(format!("cutting the file to {new_len} bytes"), e))?;
            sync(storage)?;
            self.footer_at = at;
            self.file_len = new_len;
        }
        self.laid_end = used_end;
        self.moved = false;
        Ok(())
    }
}

/// The size of a file whose last block or structure ends at `end`: the footer follows, and the whole is a multiple of
/// 4 KiB, as Windows has it. So the next block's data begins where this file ends, and its bitmap takes the place of
/// the footer.
pub(super) fn end_of_file(end: u64) -> u64 {
    (end + FOOTER_LEN).next_multiple_of(PAGE)
}

/// Syncs the file. Never "no space": after a failed sync the kernel may have dropped what was written before it, which
/// making room does not bring back.
pub(super) fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(|e| {
        let message = format!("cannot sync the image, so what was written before may be lost: {e}");
        ImageError { source: Some(e), ..ImageError::new(ErrorKind::Io, message) }
    })
}

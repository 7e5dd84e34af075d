//! What changes of a closed disk stand on. There is no journal: each step changes one sector that is referred to, or any
//! number that nothing refers to, and a sync parts the steps. So after a crash the disk is what it was before a step or
//! after it.
//!
//! **The footers.** The one at the file's end counts. Before it changes, its copy at 0 gets the new bytes, durably, so that
//! one of them is whole at every moment, and both describe a valid disk.
//!
//! **The file's end.** A file is extended by writing the footer at its new end. That relies on file systems not to make
//! the new size durable before the bytes that it ends in, as ext4, XFS and btrfs do; where they did, the copy at 0 brings
//! a dynamic disk back, and a fixed disk would need the old size.

use std::ops::Range;

use crate::{ErrorKind, ImageError, Storage};

use super::batmap::Batmap;
use super::bytes::put;
use super::footer::{DiskType, FOOTER_LEN, Footer, checksum};
use super::grow::{end_of_file, sync};
use super::header::{CHECKSUM_AT, HEADER_LEN};
use super::layout::{self, ABSENT, Body, CopyState};
use super::locator::{Locator, RawHeader};
use super::{Corruption, SECTOR};

/// A disk that nobody uses and that is about to be changed. Validated in full.
#[derive(Debug)]
pub(super) struct Closed<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) footer: Footer,
    pub(super) disk_type: DiskType,
    /// Size of the virtual disk in bytes.
    pub(super) size: u64,
    /// Where the footer is.
    pub(super) at: u64,
    pub(super) file_len: u64,
    copy_stale: bool,
}

/// What a dynamic or differencing disk has besides.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) body: Body,
    pub(super) batmap: Option<Batmap>,
}

impl<'a> Closed<'a> {
    /// Reads and validates a disk for changing it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], [`ErrorKind::NeedsRepair`] for a lost footer, [`ErrorKind::Unsupported`] where a virtual
    /// machine was suspended with the disk, [`ErrorKind::Io`].
    pub(super) fn open(storage: &'a dyn Storage) -> Result<(Self, Option<Blocks>), ImageError> {
        let (found, size, body) = layout::read_all(storage)?;
        if found.footer.saved_state() {
            return Err(ImageError::new(
                ErrorKind::Unsupported,
                "footer: the saved-state byte says that a virtual machine was suspended with this disk, which changes \
                 would corrupt; resume or discard it with the software that did so",
            ));
        }
        let Some(at) = found.at else {
            return Err(ImageError::new(
                ErrorKind::NeedsRepair,
                "the footer at the file's end is missing and only its copy at 0 is valid, as after a power cut while \
                 the file grew; repair the image first",
            ));
        };
        let batmap = match &body {
            Some(body) => Batmap::find(storage, &body.header, at)?.filter(|map| is_alone(map, body)),
            None => None,
        };
        let disk = Self {
            storage,
            footer: found.footer,
            disk_type: found.disk_type,
            size,
            at,
            file_len: found.file_len,
            copy_stale: matches!(found.copy, CopyState::Different | CopyState::Bad),
        };
        Ok((disk, body.map(|body| Blocks { body, batmap })))
    }

    /// As [`Self::open`], and sees to it that no entry behind the disk's last one claims a block.
    pub(super) fn open_tidy(storage: &'a dyn Storage) -> Result<(Self, Option<Blocks>), ImageError> {
        let (disk, blocks) = Self::open(storage)?;
        match &blocks {
            Some(b) if b.body.surplus > 0 => {
                clear_entries(&disk, b, b.body.shape.blocks)?;
                disk.sync()?;
                Self::open(storage)
            }
            _ => Ok((disk, blocks)),
        }
    }

    /// Whether the footer's copy differs from it.
    pub(super) fn is_copy_stale(&self) -> bool {
        self.copy_stale
    }

    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), ImageError> {
        write(self.storage, bytes, at)
    }

    pub(super) fn sync(&self) -> Result<(), ImageError> {
        sync(self.storage)
    }

    /// Makes `range` read as zeroes and gives its space back.
    pub(super) fn punch(&self, range: Range<u64>) -> Result<(), ImageError> {
        punch(self.storage, range)
    }

    fn has_copy(&self) -> bool {
        self.disk_type != DiskType::Fixed
    }

    fn renew_copy(&mut self) -> Result<(), ImageError> {
        if self.copy_stale {
            self.write(self.footer.bytes(), 0)?;
            self.sync()?;
            self.copy_stale = false;
        }
        Ok(())
    }

    /// Replaces the footer, durably: the copy first, then the footer itself, each being one sector. Both the old one and
    /// the new one have to describe the file as it is.
    pub(super) fn set_footer(&mut self, footer: Footer) -> Result<(), ImageError> {
        if !self.at.is_multiple_of(SECTOR) {
            self.move_end(self.file_len)?;
        }
        if self.has_copy() {
            self.write(footer.bytes(), 0)?;
            self.sync()?;
        }
        self.write(footer.bytes(), self.at)?;
        self.sync()?;
        self.copy_stale = false;
        self.file_len = self.at + FOOTER_LEN;
        self.footer = footer;
        Ok(())
    }

    /// Sees to it that the footer lies at `end` or behind it, on the sector grid. What is before it, its old place
    /// included, may then be used.
    pub(super) fn make_room(&mut self, end: u64) -> Result<(), ImageError> {
        if self.at >= end && self.at.is_multiple_of(SECTOR) {
            return Ok(());
        }
        self.move_end(end)
    }

    /// Writes the footer at a new end of the file, so that it begins at `end` or behind it and not over the old one.
    fn move_end(&mut self, end: u64) -> Result<(), ImageError> {
        self.renew_copy()?;
        let at = if self.has_copy() {
            end_of_file(end.max(self.file_len)) - FOOTER_LEN
        } else {
            end.max(self.file_len).next_multiple_of(SECTOR)
        };
        if let Err(e) = self.write(self.footer.bytes(), at) {
            // Best effort: a file that is too long and ends in no footer has its copy at 0, or its old size in the error.
            let _ = self.storage.set_len(self.file_len);
            return Err(e);
        }
        self.sync()?;
        self.at = at;
        self.file_len = at + FOOTER_LEN;
        Ok(())
    }

    /// Moves the footer right behind `end`, what follows being nobody's, and cuts the file there.
    pub(super) fn cut(&mut self, end: u64) -> Result<(), ImageError> {
        let at = if self.has_copy() { end_of_file(end) - FOOTER_LEN } else { end.next_multiple_of(SECTOR) };
        if at >= self.at {
            return Ok(());
        }
        if at + FOOTER_LEN > self.at {
            self.move_end(self.file_len)?;
        }
        self.renew_copy()?;
        self.write(self.footer.bytes(), at)?;
        self.sync()?;
        let len = at + FOOTER_LEN;
        let cut = self.storage.set_len(len);
        cut.map_err(|e| ImageError::io(format!("cutting the file to {len} bytes"), e))?;
        self.sync()?;
        self.at = at;
        self.file_len = len;
        Ok(())
    }

    /// Where the dynamic header is.
    pub(super) fn header_at(&self) -> u64 {
        self.footer.data_offset()
    }

    pub(super) fn read_header(&self) -> Result<RawHeader, ImageError> {
        let mut raw = [0; HEADER_LEN as usize];
        let at = self.header_at();
        self.storage
            .read_at(&mut raw, at)
            .map_err(|e| ImageError::io(format!("reading the dynamic header at {at}"), e))?;
        Ok(raw)
    }

    /// Points the header to another table, durably. All that changes is in its first sector.
    pub(super) fn set_table(&self, offset: u64, entries: u32) -> Result<(), ImageError> {
        let mut raw = self.read_header()?;
        put(&mut raw, 16, &offset.to_be_bytes());
        put(&mut raw, 28, &entries.to_be_bytes());
        let sum = checksum(&raw, CHECKSUM_AT);
        put(&mut raw, CHECKSUM_AT, &sum.to_be_bytes());
        self.write(&raw[..SECTOR as usize], self.header_at())?;
        self.sync()
    }

    /// What blocks and new structures have to keep off, by where it begins: copy, header, table, locators, blktap's map.
    pub(super) fn structures(&self, blocks: &Blocks) -> Vec<Range<u64>> {
        let header = &blocks.body.header;
        let table_end = header.table_offset + u64::from(header.table_entries) * 4;
        let mut ranges = vec![
            0..FOOTER_LEN,
            self.header_at()..self.header_at() + HEADER_LEN,
            header.table_offset..table_end.next_multiple_of(SECTOR),
        ];
        if self.disk_type == DiskType::Differencing {
            // With what is reserved for longer paths, which may meet others.
            let end = |l: &Locator| l.reserved_end(self.at).max(l.offset + u64::from(l.len));
            ranges.extend(header.locators.iter().map(|l| l.offset..end(l)));
        }
        if let Some(map) = &blocks.batmap {
            ranges.push(map.header_at..map.header_at + SECTOR);
            ranges.push(map.map_at..map.end());
        }
        ranges.retain(|r| !r.is_empty());
        ranges.sort_by_key(|r| r.start);
        ranges
    }

    /// Where the file is free from on: behind the last block and the last structure, and, where no block has a place,
    /// behind what others have put there.
    pub(super) fn used_end(&self, blocks: &Blocks) -> Result<u64, ImageError> {
        layout::first_free(self.storage, &blocks.body, self.at)
    }
}

impl Blocks {
    /// The blocks that have a place, with their table entries.
    pub(super) fn placed(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        (0..)
            .zip(&self.body.table)
            .filter(|&(_, &entry)| entry != ABSENT)
            .map(|(block, &entry)| (block, entry))
    }

    /// Where the bitmap of a block is; `None` where it has no place, also behind the disk's last block.
    pub(super) fn place_of(&self, block: u64) -> Option<u64> {
        let entry = self.body.table.get(usize::try_from(block).ok()?)?;
        (*entry != ABSENT).then(|| u64::from(*entry) * SECTOR)
    }

    /// Where the entry of a block is in the file.
    pub(super) fn entry_at(&self, block: u64) -> u64 {
        self.body.header.table_offset + block * 4
    }

    /// The sectors of a block that lie on the disk.
    pub(super) fn sectors_of(&self, block: u64) -> u64 {
        let shape = &self.body.shape;
        (shape.virtual_size - block * shape.block_size).min(shape.block_size) / SECTOR
    }

    /// The sector bitmap of the block with this entry.
    pub(super) fn bitmap(&self, storage: &dyn Storage, entry: u32) -> Result<Vec<u8>, ImageError> {
        let at = u64::from(entry) * SECTOR;
        let mut bitmap = vec![0; self.body.shape.bitmap_used() as usize];
        storage
            .read_at(&mut bitmap, at)
            .map_err(|e| ImageError::io(format!("reading the sector bitmap at {at}"), e))?;
        Ok(bitmap)
    }
}

/// The first sector from `from` to `to` whose bit is set.
pub(super) fn first_set(bitmap: &[u8], from: u64, to: u64) -> Option<u64> {
    (from..to).find(|&sector| bitmap[(sector / 8) as usize] & (0x80 >> (sector % 8)) != 0)
}

/// The first sector in `range`, whose start is on the grid of 512 bytes, that holds anything but zeroes.
pub(super) fn first_nonzero(storage: &dyn Storage, range: Range<u64>) -> Result<Option<u64>, ImageError> {
    let failed = |e| ImageError::io(format!("looking for data from {} to {}", range.start, range.end), e);
    let mut buf = vec![0; 256 << 10];
    let mut at = range.start;
    while let Some((start, end)) = storage.next_data(at).map_err(failed)?.filter(|run| run.0 < range.end) {
        at = range.start + (start.max(at) - range.start) / SECTOR * SECTOR;
        let end = end.min(range.end);
        while at < end {
            let part = &mut buf[..(end - at).min(256 << 10) as usize];
            storage.read_at(part, at).map_err(failed)?;
            if let Some(byte) = part.iter().position(|&b| b != 0) {
                return Ok(Some(at + byte as u64 / SECTOR * SECTOR));
            }
            at += part.len() as u64;
        }
    }
    Ok(None)
}

pub(super) fn write(storage: &dyn Storage, bytes: &[u8], at: u64) -> Result<(), ImageError> {
    storage
        .write_at(bytes, at)
        .map_err(|e| ImageError::io(format!("writing {} bytes at {at}", bytes.len()), e))
}

pub(super) fn punch(storage: &dyn Storage, range: Range<u64>) -> Result<(), ImageError> {
    if range.is_empty() {
        return Ok(());
    }
    storage
        .punch(range.start, range.end - range.start)
        .map_err(|e| ImageError::io(format!("clearing the space from {} to {}", range.start, range.end), e))
}

/// All bytes of the table, in the file's order.
pub(super) fn whole_table(storage: &dyn Storage, blocks: &Blocks) -> Result<Vec<u32>, ImageError> {
    layout::read_table(storage, &blocks.body.header).map_err(ImageError::from)
}

/// Makes every entry of the table from `from` on say that its block has no place. Not synced.
pub(super) fn clear_entries(disk: &Closed<'_>, blocks: &Blocks, from: u64) -> Result<(), ImageError> {
    let table = whole_table(disk.storage, blocks)?;
    for (block, _) in (0..).zip(&table).filter(|&(block, &entry)| block >= from && entry != ABSENT) {
        disk.write(&ABSENT.to_be_bytes(), blocks.entry_at(block))?;
    }
    Ok(())
}

/// A refusal of a size that no VHD can have.
pub(super) fn bad_size(c: &Corruption) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, format!("VHD: {c}"))
}
/// Whether what claims to be blktap's map lies where no block and no path of the parent does. Else it is not moved, and
/// nothing is cleared for it.
fn is_alone(map: &Batmap, body: &Body) -> bool {
    let ends_before = |start: u64, len: u64| map.end() <= start || start.saturating_add(len) <= map.header_at;
    let blocks = body.table.iter().filter(|&&entry| entry != ABSENT);
    blocks.map(|&entry| u64::from(entry) * SECTOR).all(|at| ends_before(at, body.shape.block_len()))
        && body.header.locators.iter().all(|locator| ends_before(locator.offset, locator.len.into()))
}

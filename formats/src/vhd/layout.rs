//! Reading and validating everything that a VHD says of itself, before anything of it is believed.

use crate::{ErrorKind, ImageError, ParentPath, Storage};

use super::batmap::Batmap;
use super::corruption::Fault;
use super::footer::{DiskType, FOOTER_LEN, Footer};
use super::grow::PAGE;
use super::header::{HEADER_LEN, Header};
use super::locator::{Locator, MAX_LOCATOR_LEN};
use super::{Corruption, MAX_VIRTUAL_SIZE, SECTOR};

/// The table entry of a block that has no place.
pub(super) const ABSENT: u32 = u32::MAX;
/// How many broken rules of the block table are told apart before the reading gives up.
const MAX_TABLE_FAULTS: usize = 64;

/// What the copy of the footer at the file's start is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyState {
    /// A fixed disk has none.
    None,
    /// It equals the footer.
    Same,
    /// It is valid and says something else.
    Different,
    /// It is no footer.
    Bad,
}

/// A footer, and where it was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) footer: Footer,
    pub(super) disk_type: DiskType,
    /// Offset of the footer at the file's end; `None` when only the copy at 0 is valid.
    pub(super) at: Option<u64>,
    pub(super) copy: CopyState,
    pub(super) file_len: u64,
}

impl Found {
    /// The end of what data and structures may occupy.
    pub(super) fn limit(&self) -> u64 {
        self.at.unwrap_or(self.file_len)
    }

    /// Size of the virtual disk.
    pub(super) fn virtual_size(&self) -> Result<u64, Corruption> {
        let size = self.footer.current_size();
        if size == 0 {
            return Err(Corruption::SizeZero);
        }
        if size > MAX_VIRTUAL_SIZE {
            return Err(Corruption::SizeTooLarge { size });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Corruption::SizeUnaligned { size });
        }
        if self.disk_type == DiskType::Fixed && size > self.limit() {
            return Err(Corruption::FixedTooShort { size, room: self.limit() });
        }
        Ok(size)
    }
}

/// Finds the footer. The one at the end decides: a guest can write what it likes at the start of a fixed disk, so the
/// copy at 0 counts only when the end has none, and only as that of a disk which does not begin with its content.
pub(super) fn find_footer(storage: &dyn Storage) -> Result<Found, Fault> {
    let file_len = storage.len().map_err(|e| ImageError::io("cannot find out the size of the file", e))?;
    let copy = footer_at(storage, 0, FOOTER_LEN, file_len)?;
    if let Some((footer, at)) = end_footer(storage, file_len)? {
        let disk_type = footer.disk_type(at)?;
        let copy = match copy {
            _ if disk_type == DiskType::Fixed => CopyState::None,
            Some(copy) if copy == footer => CopyState::Same,
            Some(_) => CopyState::Different,
            None => CopyState::Bad,
        };
        return Ok(Found { footer, disk_type, at: Some(at), copy, file_len });
    }
    if let Some(footer) = copy {
        let disk_type = footer.disk_type(0)?;
        if disk_type != DiskType::Fixed {
            return Ok(Found { footer, disk_type, at: None, copy: CopyState::Same, file_len });
        }
    }
    Err(no_footer(storage, file_len)?.into())
}

/// Tells a footer that is damaged from a file that has none.
fn no_footer(storage: &dyn Storage, file_len: u64) -> Result<Corruption, Fault> {
    if let Some(offset) = file_len.checked_sub(FOOTER_LEN) {
        let mut raw = [0; FOOTER_LEN as usize];
        storage
            .read_at(&mut raw, offset)
            .map_err(|e| ImageError::io(format!("reading the footer at {offset}"), e))?;
        if let Some((stored, computed)) = Footer::bad_checksum(&raw) {
            return Ok(Corruption::FooterChecksum { offset, stored, computed });
        }
    }
    Ok(Corruption::FooterMissing { file_len })
}

/// The footer in the last 512 bytes, or in the last 511 where the file's size says that it may be so short.
pub(super) fn end_footer(storage: &dyn Storage, file_len: u64) -> Result<Option<(Footer, u64)>, Fault> {
    let short = file_len % SECTOR == SECTOR - 1;
    for len in [FOOTER_LEN, FOOTER_LEN - 1] {
        if len < FOOTER_LEN && !short {
            break;
        }
        let Some(at) = file_len.checked_sub(len) else { continue };
        if let Some(footer) = footer_at(storage, at, len, file_len)? {
            return Ok(Some((footer, at)));
        }
    }
    Ok(None)
}

fn footer_at(storage: &dyn Storage, at: u64, len: u64, file_len: u64) -> Result<Option<Footer>, Fault> {
    if at + len > file_len {
        return Ok(None);
    }
    let mut raw = vec![0; len as usize];
    storage.read_at(&mut raw, at).map_err(|e| ImageError::io(format!("reading the footer at {at}"), e))?;
    Ok(Footer::parse(&raw))
}

/// The measures of a dynamic disk that follow from its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) virtual_size: u64,
    /// Bytes of data in a block.
    pub(super) block_size: u64,
    /// Bytes of sector bitmap before a block's data, whole sectors.
    pub(super) bitmap_len: u64,
    /// Blocks of the disk.
    pub(super) blocks: u64,
    /// Where the block table is.
    pub(super) table_offset: u64,
}

impl Shape {
    pub(super) fn new(virtual_size: u64, block_size: u32, table_offset: u64) -> Self {
        let block_size = u64::from(block_size);
        Self {
            virtual_size,
            block_size,
            bitmap_len: (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR),
            blocks: virtual_size.div_ceil(block_size),
            table_offset,
        }
    }

    /// The bytes of a bitmap that stand for sectors; the rest pads it to whole sectors.
    pub(super) fn bitmap_used(&self) -> u64 {
        (self.block_size / SECTOR).div_ceil(8)
    }

    /// Where the data of the block with this table entry begins.
    pub(super) fn data_at(&self, entry: u32) -> u64 {
        u64::from(entry) * SECTOR + self.bitmap_len
    }

    /// What the data of new blocks is aligned to: pages, as Windows has it, unless blocks are smaller, or a full disk
    /// would then reach beyond what table entries can name (2 TiB).
    pub(super) fn slot_align(&self) -> u64 {
        let stride = self.block_size + self.bitmap_len.next_multiple_of(PAGE);
        let blocks_from = self.table_offset + 4 * self.blocks + PAGE;
        // At most 2^41 bytes of blocks and one bitmap for each: this does not overflow.
        let fits = blocks_from.saturating_add(self.blocks * stride) <= u64::from(ABSENT) * SECTOR;
        if self.block_size >= PAGE && fits { PAGE } else { SECTOR }
    }

    /// Bytes of bitmap and data.
    pub(super) fn block_len(&self) -> u64 {
        self.bitmap_len + self.block_size
    }
}

/// What follows the footer of a dynamic or differencing disk.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) header: Header,
    pub(super) shape: Shape,
    /// The entries of the disk's blocks.
    pub(super) table: Vec<u32>,
    /// End of the structures at the file's start, and of the space that is reserved for them.
    pub(super) structures_end: u64,
    /// End of the last block, 0 where there is none.
    pub(super) blocks_end: u64,
    /// Entries beyond the disk's last block that are in use.
    pub(super) surplus: u64,
    /// The parent's paths that the locators of a differencing disk point to, in their order.
    pub(super) parent_paths: Vec<ParentPath>,
}

impl Body {
    /// 4096 when the data of every block is made of whole pages of the file, else 512.
    pub(super) fn payload_align(&self) -> u32 {
        let mut placed = self.table.iter().filter(|&&e| e != ABSENT);
        let paged =
            self.shape.slot_align() == PAGE && placed.all(|&e| self.shape.data_at(e).is_multiple_of(PAGE));
        if paged { PAGE as u32 } else { SECTOR as u32 }
    }
}

/// A range of the file that blocks must keep off.
#[derive(Debug, Clone, Copy)]
pub(super) struct Structure {
    pub(super) name: &'static str,
    pub(super) offset: u64,
    pub(super) end: u64,
}

/// Reads and validates what follows the footer. `faults` gets the broken rules of the block table, so that a check can
/// name them all; whoever wants to use the disk takes the first as the answer.
pub(super) fn read_body(
    storage: &dyn Storage,
    found: &Found,
    virtual_size: u64,
    faults: &mut Vec<Corruption>,
) -> Result<Body, Fault> {
    let limit = found.limit();
    let header_at = found.footer.data_offset();
    let header = read_header(storage, header_at, limit)?;
    let shape = Shape::new(virtual_size, header.block_size, header.table_offset);
    if u64::from(header.table_entries) < shape.blocks {
        let (entries, needed) = (header.table_entries, shape.blocks);
        return Err(Corruption::TableTooSmall { entries, needed }.into());
    }
    let (offset, len) = (header.table_offset, u64::from(header.table_entries) * 4);
    let table_end = offset
        .checked_add(len)
        .filter(|&end| end <= limit)
        .ok_or(Corruption::TableOutside { offset, len, limit })?
        .next_multiple_of(SECTOR);

    let mut structures = vec![
        Structure { name: "footer's copy", offset: 0, end: FOOTER_LEN },
        Structure { name: "dynamic header", offset: header_at, end: header_at + HEADER_LEN },
        Structure { name: "block table", offset, end: table_end },
    ];
    // The fields mean something in a differencing disk only.
    let locators = if found.disk_type == DiskType::Differencing { &header.locators[..] } else { &[] };
    for locator in locators {
        structures.push(locator_range(locator, limit)?);
    }
    structures.retain(|s| s.offset < s.end);
    structures.sort_by_key(|s| s.offset);
    for pair in structures.windows(2) {
        if pair[0].end > pair[1].offset {
            let (first, second, offset) = (pair[0].name, pair[1].name, pair[1].offset);
            return Err(Corruption::StructuresOverlap { first, second, offset }.into());
        }
    }

    let paths = locators.iter().filter_map(|l| l.path(storage).transpose());
    let parent_paths = paths.collect::<Result<Vec<_>, _>>()?;
    let mut table = read_table(storage, &header)?;
    let blocks_end = validate_blocks(&table, &shape, &structures, limit, faults);
    let surplus = table[shape.blocks as usize..].iter().filter(|&&e| e != ABSENT).count() as u64;
    table.truncate(shape.blocks as usize);
    let reserved = locators.iter().map(|l| l.reserved_end(limit));
    let structures_end = structures.iter().map(|s| s.end).chain(reserved).max().unwrap_or(0);
    Ok(Body { header, shape, table, structures_end, blocks_end, surplus, parent_paths })
}

pub(super) fn read_header(storage: &dyn Storage, offset: u64, limit: u64) -> Result<Header, Fault> {
    if !offset.is_multiple_of(SECTOR) {
        return Err(Corruption::HeaderUnaligned { offset }.into());
    }
    if offset.checked_add(HEADER_LEN).is_none_or(|end| end > limit) {
        return Err(Corruption::HeaderOutside { offset, limit }.into());
    }
    let mut raw = [0; HEADER_LEN as usize];
    storage
        .read_at(&mut raw, offset)
        .map_err(|e| ImageError::io(format!("reading the dynamic header at {offset}"), e))?;
    Ok(Header::parse(&raw, offset)?)
}

pub(super) fn locator_range(locator: &Locator, limit: u64) -> Result<Structure, Corruption> {
    let Locator { index, len, offset, .. } = *locator;
    if len > MAX_LOCATOR_LEN {
        return Err(Corruption::LocatorTooLong { index, len, max: MAX_LOCATOR_LEN });
    }
    if locator.is_utf16() && len % 2 != 0 {
        return Err(Corruption::LocatorOdd { index, len });
    }
    match offset.checked_add(u64::from(len)) {
        Some(end) if end <= limit => Ok(Structure { name: "parent locator", offset, end }),
        _ => Err(Corruption::LocatorOutside { index, offset, len, limit }),
    }
}

pub(super) fn read_table(storage: &dyn Storage, header: &Header) -> Result<Vec<u32>, Fault> {
    const CHUNK: usize = 1 << 20;
    let total = header.table_entries as usize * 4;
    let mut table = Vec::with_capacity(header.table_entries as usize);
    let mut chunk = vec![0; CHUNK.min(total)];
    let mut done = 0;
    while done < total {
        let part = &mut chunk[..CHUNK.min(total - done)];
        let at = header.table_offset + done as u64;
        storage
            .read_at(part, at)
            .map_err(|e| ImageError::io(format!("reading the block table at {at}"), e))?;
        table.extend(part.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]])));
        done += part.len();
    }
    Ok(table)
}

/// Checks that every block is inside the file and overlaps neither a structure nor another block. Returns the end of
/// the last one.
pub(super) fn validate_blocks(
    table: &[u32],
    shape: &Shape,
    structures: &[Structure],
    limit: u64,
    faults: &mut Vec<Corruption>,
) -> u64 {
    let len = shape.block_len();
    let mut places: Vec<(u32, u32)> =
        (0u32..).zip(table).filter(|&(_, &e)| e != ABSENT).map(|(block, &e)| (e, block)).collect();
    places.sort_unstable();
    let mut blocks_end = 0;
    let mut before: Option<(u64, u32)> = None;
    for &(entry, block) in &places {
        if faults.len() >= MAX_TABLE_FAULTS {
            break;
        }
        let offset = u64::from(entry) * SECTOR;
        let end = offset + len;
        let number = u64::from(block);
        if end > limit {
            faults.push(Corruption::BlockOutside { block: number, offset, len, limit });
        }
        if let Some((other_end, other)) = before
            && other_end > offset
        {
            faults.push(Corruption::BlocksOverlap { block: number, other: u64::from(other), offset });
        }
        if let Some(over) = structures.iter().find(|s| s.offset < end && offset < s.end) {
            faults.push(Corruption::BlockOverStructure { block: number, offset, structure: over.name });
        }
        before = Some((end, block));
        blocks_end = end;
    }
    blocks_end
}

/// Where blocks may be added: behind the last one, or, when there is none, behind whatever other writers have put
/// between the table and the footer (blktap keeps a map of its own there).
pub(super) fn first_free(storage: &dyn Storage, body: &Body, limit: u64) -> Result<u64, ImageError> {
    /// How much is read before all of the space is taken for occupied.
    const BUDGET: u64 = 4 << 20;
    let base = body.structures_end.max(body.blocks_end);
    let map_end = Batmap::find(storage, &body.header, limit)?.map_or(0, |map| map.end());
    let base = base.max(map_end);
    if body.blocks_end != 0 {
        return Ok(base);
    }
    let failed = |e| ImageError::io("looking for data behind the block table", e);
    let mut buf = vec![0; 64 << 10];
    let (mut free, mut at, mut read) = (base, base, 0);
    while let Some((start, end)) = storage.next_data(at).map_err(failed)? {
        at = start.max(at);
        let end = end.min(limit);
        while at < end {
            if read >= BUDGET {
                return Ok(limit.max(base));
            }
            let part = &mut buf[..(end - at).min(64 << 10) as usize];
            storage.read_at(part, at).map_err(failed)?;
            for (i, sector) in part.chunks(SECTOR as usize).enumerate() {
                if !sector.iter().all(|&b| b == 0) && !is_bitmap_of_ones(sector, &body.shape) {
                    free = at + i as u64 * SECTOR + sector.len() as u64;
                }
            }
            at += part.len() as u64;
            read += part.len() as u64;
        }
        if at >= limit {
            break;
        }
    }
    Ok(free)
}

/// Whether a sector is (part of) a bitmap such as is laid out for blocks to come.
fn is_bitmap_of_ones(sector: &[u8], shape: &Shape) -> bool {
    let (ones, rest) = sector.split_at(sector.len().min(shape.bitmap_used() as usize));
    ones.iter().all(|&b| b == 0xff) && rest.iter().all(|&b| b == 0 || b == 0xff)
}

/// Everything that is needed to use a disk, or why it cannot be used.
pub(super) fn read_all(storage: &dyn Storage) -> Result<(Found, u64, Option<Body>), Fault> {
    let found = find_footer(storage)?;
    let virtual_size = found.virtual_size()?;
    if found.disk_type == DiskType::Fixed {
        return Ok((found, virtual_size, None));
    }
    let mut faults = Vec::new();
    let body = read_body(storage, &found, virtual_size, &mut faults)?;
    match faults.into_iter().next() {
        Some(fault) => Err(fault.into()),
        None => Ok((found, virtual_size, Some(body))),
    }
}

/// The refusal of a disk whose content is partly in a parent.
pub(super) fn refuse_differencing(body: &Body) -> Result<(), ImageError> {
    let name = body.parent_paths.first().map_or(&body.header.parent_name, |path| &path.text);
    Err(ImageError::new(
        ErrorKind::Parent,
        format!(
            "differencing VHD with the parent {name:?} (id {}), which has to be opened with it: a parent is never opened \
             by the path that the image names alone",
            body.header.parent_id
        ),
    ))
}

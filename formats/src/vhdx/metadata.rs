//! The metadata region (2.6): what the virtual disk is.

use std::collections::BTreeSet;

use super::corruption::{Corruption, Stop};
use super::guid::Guid;
use super::le::{bytes_at, put, u16_at, u32_at};
use super::parse::OnIssue;
use super::region::Region;
use super::{MAX_VIRTUAL_SIZE, MIB};
use crate::{ImageError, Storage};

const SIGNATURE: &[u8; 8] = b"metadata";
/// Bytes of the metadata table, at the start of its region.
pub(super) const TABLE_SIZE: usize = 64 << 10;
const MAX_ENTRIES: u16 = 2047;
const MAX_USER_ENTRIES: usize = 1024;
const MAX_ITEM: u32 = 1 << 20;

pub(super) const FILE_PARAMETERS: Guid = Guid::from_digits(0xCAA16737_FA36_4D43_B3B6_33F0AA44E76B);
pub(super) const VIRTUAL_SIZE: Guid = Guid::from_digits(0x2FA54224_CD1B_4876_B211_5DBED83BF4B8);
const DISK_ID: Guid = Guid::from_digits(0xBECA12AB_B2E6_4523_93EF_C309E000C746);
const LOGICAL_SECTOR: Guid = Guid::from_digits(0x8141BF1D_A96F_4709_BA47_F233A8FAAB5F);
const PHYSICAL_SECTOR: Guid = Guid::from_digits(0xCDA348C7_445D_4471_9CC9_E9885251C556);
pub(super) const PARENT_LOCATOR: Guid = Guid::from_digits(0xA8D35F2D_B30B_454D_ABF7_D3D84834AB0C);
/// Hyper-V marks a file so while a copy into it is under way.
const INCOMPLETE: Guid = Guid::from_digits(0x71CC85F0_1B69_4E28_9558_C3BF83AE75D3);
/// Private items of Hyper-V that change nothing in what the disk holds: its geometry, a label.
const HARMLESS: [Guid; 2] = [
    Guid::from_digits(0xDA02D7BC_3D3A_423C_AC88_2A36AB21479B),
    Guid::from_digits(0x10E1AE8A_4B7E_4169_A40F_CD70DE928393),
];

const FLAG_USER: u32 = 1;
const FLAG_VIRTUAL_DISK: u32 = 2;
const FLAG_REQUIRED: u32 = 4;

/// What the metadata says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) block_size: u32,
    pub(super) leave_allocated: bool,
    pub(super) has_parent: bool,
    pub(super) virtual_size: u64,
    pub(super) disk_id: Guid,
    pub(super) logical_sector: u32,
    pub(super) physical_sector: u32,
    /// The raw parent locator, where there is one.
    pub(super) locator: Option<Vec<u8>>,
}

/// An entry of the metadata table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) id: Guid,
    /// From the start of the region.
    pub(super) offset: u32,
    pub(super) len: u32,
    pub(super) flags: u32,
}

impl Item {
    #[cfg(test)]
    pub(super) fn new(id: Guid, offset: u32, len: u32, flags: u32) -> Self {
        Self { id, offset, len, flags }
    }

    /// Whether it is the user's, not the system's.
    pub(super) fn is_user(&self) -> bool {
        self.flags & FLAG_USER != 0
    }
}

struct Reader<'a> {
    storage: &'a dyn Storage,
    region: Region,
    items: Vec<Item>,
}

/// Reads and validates the metadata table: its entries, in their order. `None`: it is none. What is wrong goes to `issue`;
/// an item that breaks a rule is not among those that are returned.
fn read_items(storage: &dyn Storage, region: Region, issue: OnIssue<'_>) -> Result<Option<Vec<Item>>, Stop> {
    let table = read_table(storage, region)?;
    parse_table(&table, region, issue)
}

/// The entries of the metadata table of an image that was validated.
pub(super) fn valid_items(storage: &dyn Storage, region: Region) -> Result<Vec<Item>, ImageError> {
    let items = read_items(storage, region, &mut |corruption| Err(corruption.into()))?;
    Ok(items.expect("what is wrong stops the reading"))
}

/// The flags that an item has according to its kind (2.6.2); `None` for one that is not known.
pub(super) fn usual_flags(item: &Item) -> Option<u32> {
    match item.id {
        _ if item.is_user() => None,
        FILE_PARAMETERS | PARENT_LOCATOR => Some(FLAG_REQUIRED),
        VIRTUAL_SIZE | DISK_ID | LOGICAL_SECTOR | PHYSICAL_SECTOR => Some(FLAG_VIRTUAL_DISK | FLAG_REQUIRED),
        _ => None,
    }
}

/// The raw metadata table.
pub(super) fn read_table(storage: &dyn Storage, region: Region) -> Result<Vec<u8>, ImageError> {
    let mut table = vec![0; TABLE_SIZE];
    storage
        .read_at(&mut table, region.offset)
        .map_err(|e| ImageError::io("reading the metadata table", e))?;
    Ok(table)
}

/// Reads and validates the metadata. `None` where it does not say what the disk is; what is wrong goes to `issue`.
pub(super) fn read_metadata(
    storage: &dyn Storage,
    region: Region,
    issue: OnIssue<'_>,
) -> Result<Option<Metadata>, Stop> {
    let Some(items) = read_items(storage, region, issue)? else { return Ok(None) };
    let reader = Reader { storage, region, items };
    let parameters: Option<[u8; 8]> = reader.item(FILE_PARAMETERS, "File Parameters", issue)?;
    let size: Option<[u8; 8]> = reader.item(VIRTUAL_SIZE, "Virtual Disk Size", issue)?;
    let logical: Option<[u8; 4]> = reader.item(LOGICAL_SECTOR, "Logical Sector Size", issue)?;
    let physical: Option<[u8; 4]> = reader.item(PHYSICAL_SECTOR, "Physical Sector Size", issue)?;
    let disk_id: Option<[u8; 16]> = reader.item(DISK_ID, "Virtual Disk ID", issue)?;
    let (Some(parameters), Some(size), Some(logical), Some(physical), Some(disk_id)) =
        (parameters, size, logical, physical, disk_id)
    else {
        return Ok(None);
    };
    let flags = u32_at(&parameters, 4);
    let metadata = Metadata {
        block_size: u32_at(&parameters, 0),
        leave_allocated: flags & 1 != 0,
        has_parent: flags & 2 != 0,
        virtual_size: u64::from_le_bytes(size),
        disk_id: Guid(disk_id),
        logical_sector: u32::from_le_bytes(logical),
        physical_sector: u32::from_le_bytes(physical),
        locator: reader.optional(PARENT_LOCATOR)?,
    };
    let broken = broken_rules(&metadata);
    let usable = broken.is_empty();
    broken.into_iter().try_for_each(issue)?;
    Ok(usable.then_some(metadata))
}

fn broken_rules(metadata: &Metadata) -> Vec<Corruption> {
    let mut broken = Vec::new();
    let block = metadata.block_size;
    if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
        broken.push(Corruption::BlockSize { value: block });
    }
    let sizes = [("Logical", metadata.logical_sector), ("Physical", metadata.physical_sector)];
    for (which, value) in sizes {
        if value != 512 && value != 4096 {
            broken.push(Corruption::SectorSize { which, value });
        }
    }
    let (value, sector) = (metadata.virtual_size, metadata.logical_sector);
    // Of a sector size that is not possible that was said already.
    let aligned = ![512, 4096].contains(&sector) || value.is_multiple_of(sector.into());
    if value == 0 || value > MAX_VIRTUAL_SIZE || !aligned {
        broken.push(Corruption::VirtualSize { value, sector });
    }
    if metadata.has_parent && metadata.locator.is_none() {
        broken.push(Corruption::MetadataMissing { what: "Parent Locator" });
    }
    broken
}

/// The entries of a raw metadata table that has its signature and no more entries than fit.
pub(super) fn entries_of(table: &[u8]) -> impl Iterator<Item = Item> {
    (0..usize::from(u16_at(table, 10)).min(MAX_ENTRIES.into())).map(|index| {
        let entry = &table[32 + index * 32..64 + index * 32];
        Item {
            id: Guid(bytes_at(entry, 0)),
            offset: u32_at(entry, 16),
            len: u32_at(entry, 20),
            flags: u32_at(entry, 24),
        }
    })
}

fn parse_table(table: &[u8], region: Region, issue: OnIssue<'_>) -> Result<Option<Vec<Item>>, Stop> {
    let bad = |reason| Corruption::MetadataTable { offset: region.offset, reason };
    if table[..8] != SIGNATURE[..] {
        return issue(bad("bad signature")).map(|()| None);
    }
    if u16_at(table, 10) > MAX_ENTRIES {
        return issue(bad("EntryCount above 2047")).map(|()| None);
    }
    let mut items = Vec::new();
    let mut seen = BTreeSet::new();
    for item in entries_of(table) {
        let unique = seen.insert((item.id, item.flags & FLAG_USER));
        if let Err(corruption) = validate_item(&item, region) {
            issue(corruption)?;
        } else if !unique {
            issue(Corruption::MetadataDuplicate { item: item.id })?;
        } else {
            items.push(item);
        }
    }
    if items.iter().filter(|i| i.is_user()).count() > MAX_USER_ENTRIES {
        issue(bad("more than 1024 user entries"))?;
    }
    if let Err(corruption) = validate_overlap(&items) {
        issue(corruption)?;
    }
    Ok(Some(items))
}

fn validate_item(item: &Item, region: Region) -> Result<(), Corruption> {
    let Item { id, offset, len, flags } = *item;
    let place = |reason| Err(Corruption::MetadataItemPlace { item: id, offset, len, reason });
    if len > MAX_ITEM {
        return place("is longer than 1 MiB");
    }
    if len == 0 && offset != 0 {
        return place("is empty and has an offset");
    }
    if len != 0 && (offset as usize) < TABLE_SIZE {
        return place("lies in the metadata table");
    }
    if u64::from(offset) + u64::from(len) > u64::from(region.len) {
        return place("lies outside the metadata region");
    }
    if flags & FLAG_USER == 0 && id == INCOMPLETE {
        return Err(Corruption::Incomplete);
    }
    let known = [FILE_PARAMETERS, VIRTUAL_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];
    let known = flags & FLAG_USER == 0 && (known.contains(&id) || HARMLESS.contains(&id));
    if flags & FLAG_REQUIRED != 0 && !known {
        return Err(Corruption::MetadataUnknown { item: id });
    }
    Ok(())
}

fn validate_overlap(items: &[Item]) -> Result<(), Corruption> {
    let mut sorted: Vec<&Item> = items.iter().filter(|i| i.len != 0).collect();
    sorted.sort_by_key(|i| i.offset);
    for pair in sorted.windows(2) {
        if pair[0].offset + pair[0].len > pair[1].offset {
            let Item { id, offset, len, .. } = *pair[1];
            let reason = "overlaps another item";
            return Err(Corruption::MetadataItemPlace { item: id, offset, len, reason });
        }
    }
    Ok(())
}

impl Reader<'_> {
    fn find(&self, id: Guid) -> Option<&Item> {
        self.items.iter().find(|i| i.id == id && i.flags & FLAG_USER == 0)
    }

    fn read(&self, item: &Item, buf: &mut [u8]) -> Result<(), ImageError> {
        self.storage
            .read_at(buf, self.region.offset + u64::from(item.offset))
            .map_err(|e| ImageError::io(format!("reading metadata item {}", item.id), e))
    }

    /// An item of exactly `N` bytes that has to be there.
    fn item<const N: usize>(
        &self,
        id: Guid,
        what: &'static str,
        issue: OnIssue<'_>,
    ) -> Result<Option<[u8; N]>, Stop> {
        let Some(item) = self.find(id) else {
            return issue(Corruption::MetadataMissing { what }).map(|()| None);
        };
        if item.len as usize != N {
            let (offset, len) = (item.offset, item.len);
            let reason = "has not the length of its kind";
            return issue(Corruption::MetadataItemPlace { item: id, offset, len, reason }).map(|()| None);
        }
        let mut buf = [0; N];
        self.read(item, &mut buf)?;
        Ok(Some(buf))
    }

    fn optional(&self, id: Guid) -> Result<Option<Vec<u8>>, Stop> {
        let Some(item) = self.find(id) else { return Ok(None) };
        let mut buf = vec![0; item.len as usize];
        self.read(item, &mut buf)?;
        Ok(Some(buf))
    }
}

/// The first 128 KiB of a new metadata region: the table and the items. A parent locator comes last, so that it can be
/// replaced by a longer one.
pub(super) fn encode_region(metadata: &Metadata) -> Vec<u8> {
    let mut region = vec![0; 2 * TABLE_SIZE];
    let flags = u32::from(metadata.leave_allocated) | u32::from(metadata.has_parent) << 1;
    let parameters = [metadata.block_size.to_le_bytes(), flags.to_le_bytes()].concat();
    let sizes = [metadata.logical_sector.to_le_bytes(), metadata.physical_sector.to_le_bytes()];
    let virtual_size = metadata.virtual_size.to_le_bytes();
    let disk = FLAG_VIRTUAL_DISK | FLAG_REQUIRED;
    let mut items: Vec<(Guid, u32, &[u8])> = vec![
        (FILE_PARAMETERS, FLAG_REQUIRED, &parameters),
        (VIRTUAL_SIZE, disk, &virtual_size),
        (DISK_ID, disk, &metadata.disk_id.0),
        (LOGICAL_SECTOR, disk, &sizes[0]),
        (PHYSICAL_SECTOR, disk, &sizes[1]),
    ];
    items.extend(metadata.locator.as_ref().map(|locator| (PARENT_LOCATOR, FLAG_REQUIRED, &locator[..])));
    put(&mut region, 0, SIGNATURE);
    put(&mut region, 10, &(items.len() as u16).to_le_bytes());
    let mut offset = TABLE_SIZE;
    for (index, (id, flags, content)) in items.into_iter().enumerate() {
        let at = 32 + index * 32;
        put(&mut region, at, &id.0);
        put(&mut region, at + 16, &(offset as u32).to_le_bytes());
        put(&mut region, at + 20, &(content.len() as u32).to_le_bytes());
        put(&mut region, at + 24, &flags.to_le_bytes());
        put(&mut region, offset, content);
        offset += content.len();
    }
    region
}

/// How the blocks of a disk are numbered in its BAT (2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockLayout {
    /// Bytes of a payload block, a power of two.
    pub(super) block_size: u64,
    /// Payload blocks of the disk.
    pub(super) blocks: u64,
    /// Payload blocks for each sector bitmap block, a power of two.
    pub(super) chunk_ratio: u64,
    /// Entries that the BAT needs.
    pub(super) entries: u64,
    /// Bytes of the last block that belong to the disk.
    pub(super) last_block_len: u64,
}

/// Whose entry of the BAT it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryOwner {
    Payload(u64),
    Bitmap(u64),
}

impl BlockLayout {
    pub(super) fn new(metadata: &Metadata) -> Self {
        let block_size = u64::from(metadata.block_size);
        let blocks = metadata.virtual_size.div_ceil(block_size);
        let chunk_ratio = (u64::from(metadata.logical_sector) << 23) / block_size;
        let entries = if metadata.has_parent {
            blocks.div_ceil(chunk_ratio) * (chunk_ratio + 1)
        } else {
            blocks + (blocks - 1) / chunk_ratio
        };
        let last_block_len = metadata.virtual_size - (blocks - 1) * block_size;
        Self { block_size, blocks, chunk_ratio, entries, last_block_len }
    }

    /// Index in the BAT of payload block `block`.
    pub(super) fn index_of(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Index in the BAT of the sector bitmap block of a chunk.
    pub(super) fn bitmap_index(&self, chunk: u64) -> u64 {
        (chunk + 1) * (self.chunk_ratio + 1) - 1
    }

    /// Whose entry `index` is; `None` for padding behind the last payload block.
    pub(super) fn owner_of(&self, index: u64) -> Option<EntryOwner> {
        self.owner_in(index / (self.chunk_ratio + 1), index % (self.chunk_ratio + 1))
    }

    /// Whose the entry is that is number `inner` of this chunk's.
    fn owner_in(&self, chunk: u64, inner: u64) -> Option<EntryOwner> {
        if inner == self.chunk_ratio {
            return Some(EntryOwner::Bitmap(chunk));
        }
        let block = chunk * self.chunk_ratio + inner;
        (block < self.blocks).then_some(EntryOwner::Payload(block))
    }

    /// MiB that a block takes in the file.
    pub(super) fn units_per_block(&self) -> u64 {
        self.block_size / MIB
    }
}

/// Says whose entries are that come in rising order: what a table of 67 million of them is read with, where the divisions of
/// [`BlockLayout::owner_of`] would take most of the time.
#[derive(Debug)]
pub(super) struct Owners {
    layout: BlockLayout,
    chunk: u64,
    /// Index of its first entry.
    first: u64,
}

impl Owners {
    pub(super) fn new(layout: BlockLayout) -> Self {
        Self { layout, chunk: 0, first: 0 }
    }

    /// The chunk that entry `index` belongs to, and whose it is; see [`BlockLayout::owner_of`].
    pub(super) fn at(&mut self, index: u64) -> (u64, Option<EntryOwner>) {
        let entries = self.layout.chunk_ratio + 1;
        debug_assert!(index >= self.first, "entries come in rising order");
        if index - self.first >= entries {
            self.chunk = index / entries;
            self.first = self.chunk * entries;
        }
        (self.chunk, self.layout.owner_in(self.chunk, index - self.first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(virtual_size: u64, block_size: u32, logical_sector: u32, has_parent: bool) -> Metadata {
        Metadata {
            block_size,
            leave_allocated: false,
            has_parent,
            virtual_size,
            disk_id: Guid::ZERO,
            logical_sector,
            physical_sector: 4096,
            locator: None,
        }
    }

    #[test]
    fn bitmap_entries_are_interleaved_after_each_chunk() {
        let layout = BlockLayout::new(&metadata(10 << 40, 32 << 20, 512, false));
        assert_eq!(layout.chunk_ratio, 128);
        assert_eq!(layout.index_of(127), 127);
        assert_eq!(layout.index_of(128), 129);
        assert_eq!(layout.owner_of(128), Some(EntryOwner::Bitmap(0)));
        assert_eq!(layout.owner_of(129), Some(EntryOwner::Payload(128)));
        let mut owners = Owners::new(layout);
        for index in [0, 1, 127, 128, 129, 130, 257, 258, 259, 10_000, 40_000_000] {
            assert_eq!(owners.at(index), (index / 129, layout.owner_of(index)), "{index}");
        }
        assert_eq!(layout.entries, layout.blocks + (layout.blocks - 1) / 128);
    }

    #[test]
    fn a_dynamic_table_ends_with_its_last_payload_block_and_a_differencing_one_with_its_bitmap() {
        let size = 4 << 30;
        let dynamic = BlockLayout::new(&metadata(size, 2 << 20, 512, false));
        assert_eq!((dynamic.blocks, dynamic.chunk_ratio, dynamic.entries), (2048, 2048, 2048));
        let differencing = BlockLayout::new(&metadata(size, 2 << 20, 512, true));
        assert_eq!(differencing.entries, 2049);
    }

    #[test]
    fn the_largest_disk_in_the_smallest_blocks_fits_the_largest_table() {
        let layout = BlockLayout::new(&metadata(64 << 40, 1 << 20, 512, true));
        assert!(layout.entries * 8 <= 513 << 20);
    }

    #[test]
    fn the_last_block_may_be_partial() {
        let layout = BlockLayout::new(&metadata((5 << 20) + 512, 2 << 20, 512, false));
        assert_eq!((layout.blocks, layout.last_block_len), (3, (1 << 20) + 512));
        let whole = BlockLayout::new(&metadata(6 << 20, 2 << 20, 512, false));
        assert_eq!((whole.blocks, whole.last_block_len), (3, 2 << 20));
    }
}

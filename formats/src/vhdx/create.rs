//! Making a VHDX.

use super::bat::BatEntry;
use super::guid::Guid;
use super::header::{FILE_SIGNATURE, HEADER_OFFSETS, Header};
use super::metadata::{BlockLayout, Metadata, encode_region};
use super::region::{TABLE_OFFSETS, encode_table};
use super::{MAX_VIRTUAL_SIZE, MIB, locator};
use crate::{ErrorKind, ImageError, ImageType, NewParentLink, Storage};

/// The block size unless another is asked for: 2 MiB. Windows takes 32 MiB for dynamic images, which is kinder to its BAT;
/// small blocks keep an image thin, and its BAT of 8 bytes for each 2 MiB is nothing.
const BLOCK_SIZE: u32 = 2 << 20;
/// The log: 4 MiB, room for some 400 first writes to blocks between two checkpoints.
const LOG_BYTES: u32 = 4 << 20;

const CREATOR: &str = concat!("blockd ", env!("CARGO_PKG_VERSION"));

/// What a new VHDX shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateParams {
    /// Fixed, dynamic or differencing.
    pub image_type: ImageType,
    /// Bytes of the disk: a multiple of the logical sector size, up to 64 TiB.
    pub virtual_size: u64,
    /// Bytes of a block: a power of two from 1 to 256 MiB; 2 MiB unless given.
    pub block_size: Option<u32>,
    /// 512 or 4096 bytes.
    pub logical_sector_size: u32,
    /// 512 or 4096 bytes.
    pub physical_sector_size: u32,
    /// Bytes of the log: a multiple of 1 MiB up to 1 GiB; 4 MiB unless given.
    pub log_size: Option<u32>,
    /// What a differencing image says of its parent; no other has one.
    pub parent: Option<NewParentLink>,
}

fn invalid(message: String) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, message)
}

impl CreateParams {
    fn metadata(&self) -> Result<Metadata, ImageError> {
        let Self { virtual_size, logical_sector_size: logical, physical_sector_size: physical, .. } = *self;
        let block_size = self.block_size.unwrap_or(BLOCK_SIZE);
        let differencing = self.image_type == ImageType::Differencing;
        if differencing != self.parent.is_some() {
            return Err(invalid(format!(
                "a {} image {} a parent: only a differencing one has one, and needs it",
                self.image_type,
                if differencing { "without" } else { "with" }
            )));
        }
        if ![512, 4096].contains(&logical) || ![512, 4096].contains(&physical) {
            return Err(invalid(format!(
                "sectors of {logical} (physical {physical}) bytes: 512 and 4096 are possible"
            )));
        }
        if virtual_size == 0
            || virtual_size > MAX_VIRTUAL_SIZE
            || !virtual_size.is_multiple_of(logical.into())
        {
            return Err(invalid(format!(
                "a disk of {virtual_size} bytes: a multiple of {logical} up to {MAX_VIRTUAL_SIZE} (64 TiB) is possible"
            )));
        }
        if !block_size.is_power_of_two() || !(MIB as u32..=256 << 20).contains(&block_size) {
            return Err(invalid(format!(
                "blocks of {block_size} bytes: a power of two from 1 to 256 MiB is possible"
            )));
        }
        Ok(Metadata {
            block_size,
            leave_allocated: self.image_type == ImageType::Fixed,
            has_parent: differencing,
            virtual_size,
            disk_id: Guid::random(),
            logical_sector: logical,
            physical_sector: physical,
            locator: self.parent.as_ref().map(locator::encode).transpose()?,
        })
    }
}

/// Writes a new image that reads as zeroes into an empty storage, durably.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] with the allowed range; what the file says.
pub fn create(storage: &dyn Storage, params: &CreateParams) -> Result<(), ImageError> {
    let metadata = params.metadata()?;
    let layout = BlockLayout::new(&metadata);
    let log_bytes = params.log_size.unwrap_or(LOG_BYTES);
    if !u64::from(log_bytes).is_multiple_of(MIB) || !(MIB as u32..=1 << 30).contains(&log_bytes) {
        return Err(invalid(format!(
            "a log of {log_bytes} bytes: a multiple of 1 MiB up to 1 GiB is possible"
        )));
    }
    let log_offset = MIB;
    let metadata_offset = log_offset + u64::from(log_bytes);
    let bat_offset = metadata_offset + MIB;
    let bat_len = (layout.entries * 8).next_multiple_of(MIB);
    let blocks_offset = bat_offset + bat_len;
    let io = |e| ImageError::io("writing the new image", e);
    let blocks_end = if metadata.leave_allocated {
        let end = layout.blocks.checked_mul(layout.block_size).and_then(|n| n.checked_add(blocks_offset));
        end.ok_or_else(|| invalid("the image would be too long".into()))?
    } else {
        blocks_offset
    };
    storage.set_len(blocks_end).map_err(io)?;
    let mut id = [0; 512 + 8];
    id[..8].copy_from_slice(FILE_SIGNATURE);
    for (at, unit) in CREATOR.encode_utf16().enumerate() {
        id[8 + at * 2..][..2].copy_from_slice(&unit.to_le_bytes());
    }
    storage.write_at(&id, 0).map_err(io)?;
    let table = encode_table((bat_offset, bat_len as u32), (metadata_offset, MIB as u32));
    for offset in TABLE_OFFSETS {
        storage.write_at(&table, offset).map_err(io)?;
    }
    storage.write_at(&encode_region(&metadata), metadata_offset).map_err(io)?;
    if metadata.leave_allocated {
        write_fixed_table(storage, &layout, bat_offset, blocks_offset)?;
    }
    let mut header = Header {
        sequence: 1,
        file_write: Guid::random(),
        data_write: Guid::random(),
        log_guid: Guid::ZERO,
        log_version: 0,
        version: 1,
        log_len: log_bytes,
        log_offset,
    };
    for offset in HEADER_OFFSETS {
        storage.write_at(&header.encode(), offset).map_err(io)?;
        header.sequence += 1;
    }
    storage.sync().map_err(io)
}

/// Every block of a fixed image has its place from the start, one after the other.
fn write_fixed_table(
    storage: &dyn Storage,
    layout: &BlockLayout,
    bat_offset: u64,
    blocks_offset: u64,
) -> Result<(), ImageError> {
    const BATCH: u64 = 32 << 10;
    let first = blocks_offset / MIB;
    let mut index = 0;
    while index < layout.entries {
        let end = (index + BATCH).min(layout.entries);
        let mut bytes = Vec::with_capacity((end - index) as usize * 8);
        for i in index..end {
            let raw = match layout.owner_of(i) {
                Some(super::metadata::EntryOwner::Payload(block)) => {
                    BatEntry::present(first + block * layout.units_per_block()).0
                }
                _ => 0,
            };
            bytes.extend(raw.to_le_bytes());
        }
        storage.write_at(&bytes, bat_offset + index * 8).map_err(|e| ImageError::io("writing the BAT", e))?;
        index = end;
    }
    Ok(())
}

//! Making new images.

use crate::{ErrorKind, ImageError, ImageType, Storage};

use super::footer::{DiskType, FOOTER_LEN, Footer};
use super::grow::{end_of_file, sync};
use super::header::{HEADER_LEN, Header};
use super::layout::ABSENT;
use super::{DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE, MAX_TABLE_ENTRIES, MAX_VIRTUAL_SIZE, SECTOR};

/// What a new VHD shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateParams {
    /// Fixed or dynamic.
    pub image_type: ImageType,
    /// Size of the disk in bytes: a multiple of 512, at most [`MAX_VIRTUAL_SIZE`].
    pub virtual_size: u64,
    /// Size of a dynamic disk's blocks in bytes, a power of two from 512 to [`MAX_BLOCK_SIZE`]; [`DEFAULT_BLOCK_SIZE`]
    /// unless given. Other software is tested with 512 KiB and 2 MiB only.
    pub block_size: Option<u32>,
}

/// Writes a new image that reads as zeroes to an empty `storage`, and makes it durable. Nothing is allocated: a fixed
/// disk is a sparse file.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] with the allowed range; what the file says.
pub fn create(storage: &dyn Storage, params: &CreateParams) -> Result<(), ImageError> {
    let size = params.virtual_size;
    if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX_VIRTUAL_SIZE {
        return Err(invalid(format!(
            "size {size} must be a multiple of {SECTOR} from {SECTOR} to {MAX_VIRTUAL_SIZE} (2040 GiB); VHDX goes up to \
             64 TiB"
        )));
    }
    match params.image_type {
        ImageType::Fixed if params.block_size.is_some() => {
            Err(invalid("a fixed disk has no blocks, so no block size can be given".into()))
        }
        ImageType::Fixed => {
            write(storage, Footer::new(DiskType::Fixed, size).bytes(), size)?;
            sync(storage)
        }
        ImageType::Dynamic => create_dynamic(storage, size, params.block_size.unwrap_or(DEFAULT_BLOCK_SIZE)),
        ImageType::Differencing => Err(ImageError::new(
            ErrorKind::Unsupported,
            "VHD: differencing disks cannot be created; use VHDX, which survives a power cut",
        )),
    }
}

fn create_dynamic(storage: &dyn Storage, size: u64, block_size: u32) -> Result<(), ImageError> {
    if !block_size.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&block_size) {
        return Err(invalid(format!(
            "block size {block_size} must be a power of two from 512 to {MAX_BLOCK_SIZE} (256 MiB)"
        )));
    }
    let blocks = size.div_ceil(u64::from(block_size));
    let entries = u32::try_from(blocks).ok().filter(|&n| n <= MAX_TABLE_ENTRIES).ok_or_else(|| {
        invalid(format!(
            "a disk of {size} bytes has {blocks} blocks of {block_size} bytes, and at most {MAX_TABLE_ENTRIES} are \
             allowed; choose a larger block size"
        ))
    })?;
    let footer = Footer::new(DiskType::Dynamic, size);
    let table_at = FOOTER_LEN + HEADER_LEN;
    let table_end = (table_at + 4 * blocks).next_multiple_of(SECTOR);
    write_table(storage, table_at, table_end)?;
    write(storage, &Header::dynamic(table_at, entries, block_size), FOOTER_LEN)?;
    write(storage, footer.bytes(), 0)?;
    write(storage, footer.bytes(), end_of_file(table_end) - FOOTER_LEN)?;
    sync(storage)
}

/// Writes a table in which no block has a place, its padding included.
fn write_table(storage: &dyn Storage, from: u64, to: u64) -> Result<(), ImageError> {
    let ones = [ABSENT.to_be_bytes()[0]; 64 << 10];
    let mut at = from;
    while at < to {
        let len = (to - at).min(ones.len() as u64);
        write(storage, &ones[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

fn write(storage: &dyn Storage, bytes: &[u8], at: u64) -> Result<(), ImageError> {
    storage
        .write_at(bytes, at)
        .map_err(|e| ImageError::io(format!("writing {} bytes at {at}", bytes.len()), e))
}

fn invalid(message: String) -> ImageError {
    ImageError::new(ErrorKind::InvalidParameter, format!("VHD: {message}"))
}

//! Making new images.

use crate::{ErrorKind, ImageError, ImageType, NewParentLink, Storage};

use super::footer::{DiskType, FOOTER_LEN, Footer};
use super::grow::{PAGE, end_of_file, sync};
use super::header::{HEADER_LEN, Header};
use super::layout::ABSENT;
use super::locator::EncodedLink;
use super::{DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE, MAX_TABLE_ENTRIES, MAX_VIRTUAL_SIZE, SECTOR};

/// What a new VHD shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateParams {
    /// Fixed, dynamic or differencing.
    pub image_type: ImageType,
    /// Size of the disk in bytes: a multiple of 512, at most [`MAX_VIRTUAL_SIZE`].
    pub virtual_size: u64,
    /// Size of a dynamic or differencing disk's blocks in bytes, a power of two from 512 to [`MAX_BLOCK_SIZE`]; [`DEFAULT_BLOCK_SIZE`]
    /// unless given. Other software is tested with 512 KiB and 2 MiB only.
    pub block_size: Option<u32>,
    /// What a differencing disk says of its parent; of no other disk.
    pub parent: Option<NewParentLink>,
}

/// Writes a new image that reads as zeroes (a differencing one: as its parent) to an empty `storage`, and makes it durable. Nothing is allocated: a fixed
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
    if params.parent.is_some() != (params.image_type == ImageType::Differencing) {
        return Err(invalid(format!(
            "a {} disk {}",
            params.image_type,
            if params.parent.is_some() { "has no parent" } else { "needs to be told its parent" }
        )));
    }
    let block_size = params.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
    match &params.parent {
        None if params.image_type == ImageType::Dynamic => create_dynamic(storage, size, block_size),
        None if params.block_size.is_some() => {
            Err(invalid("a fixed disk has no blocks, so no block size can be given".into()))
        }
        None => {
            write(storage, Footer::new(DiskType::Fixed, size).bytes(), size)?;
            sync(storage)
        }
        Some(link) => create_differencing(storage, size, block_size, &EncodedLink::new(link)?),
    }
}

fn create_dynamic(storage: &dyn Storage, size: u64, block_size: u32) -> Result<(), ImageError> {
    let entries = table_entries(size, block_size)?;
    let table_at = FOOTER_LEN + HEADER_LEN;
    let table_end = (table_at + 4 * u64::from(entries)).next_multiple_of(SECTOR);
    write_table(storage, table_at, table_end)?;
    let header = Header::dynamic(table_at, entries, block_size);
    finish(storage, &Footer::new(DiskType::Dynamic, size), &header, table_end)
}

/// Lays the structures out as Windows does: the absolute path at 4 KiB, the table at 8 KiB, the relative path on the next
/// page behind it (each where the ones before are longer than usual: on the next page).
fn create_differencing(
    storage: &dyn Storage,
    size: u64,
    block_size: u32,
    link: &EncodedLink,
) -> Result<(), ImageError> {
    let entries = table_entries(size, block_size)?;
    let (mut at, mut table_at, mut places) =
        ((FOOTER_LEN + HEADER_LEN).next_multiple_of(PAGE), 0, Vec::new());
    for (n, path) in link.paths.iter().enumerate() {
        write(storage, &path.bytes, at)?;
        places.push(at);
        at += path.space();
        if n == 0 {
            table_at = at;
            at = (table_at + 4 * u64::from(entries)).next_multiple_of(PAGE);
            write_table(storage, table_at, (table_at + 4 * u64::from(entries)).next_multiple_of(SECTOR))?;
        }
    }
    let mut header = Header::dynamic(table_at, entries, block_size);
    link.put(&mut header, &places);
    finish(storage, &Footer::new(DiskType::Differencing, size), &header, at)
}

/// Writes the header and both footers of a disk whose structures end at `end`.
fn finish(storage: &dyn Storage, footer: &Footer, header: &[u8], end: u64) -> Result<(), ImageError> {
    write(storage, header, FOOTER_LEN)?;
    write(storage, footer.bytes(), 0)?;
    write(storage, footer.bytes(), end_of_file(end) - FOOTER_LEN)?;
    sync(storage)
}

/// How many entries the table of a disk of `size` bytes has.
fn table_entries(size: u64, block_size: u32) -> Result<u32, ImageError> {
    if !block_size.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&block_size) {
        return Err(invalid(format!(
            "block size {block_size} must be a power of two from 512 to {MAX_BLOCK_SIZE} (256 MiB)"
        )));
    }
    let blocks = size.div_ceil(u64::from(block_size));
    u32::try_from(blocks).ok().filter(|&n| n <= MAX_TABLE_ENTRIES).ok_or_else(|| {
        invalid(format!(
            "a disk of {size} bytes has {blocks} blocks of {block_size} bytes, and at most {MAX_TABLE_ENTRIES} are \
             allowed; choose a larger block size"
        ))
    })
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

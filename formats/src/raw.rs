//! Raw images: the file is the disk.
//!
//! There is no metadata, so nothing here can be inconsistent: durability is the file's own.

use std::sync::Arc;

use crate::flat::Flat;
use crate::{
    ByteSpan, CheckReport, CompactOutcome, ErrorKind, Extent, Finding, Format, Geometry, Image, ImageError,
    ImageType, Pieces, Severity, Storage, SyncToken, ZeroMode,
};

/// The unit in which the size of a writable raw image is counted, in bytes.
pub const SECTOR: u64 = 512;

/// An open raw image.
#[derive(Debug)]
pub struct Raw {
    flat: Flat,
}

impl Raw {
    /// Takes `storage` for a disk of as many bytes as it has.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for writing to a file that is empty or does not end on a sector of 512 bytes. Opened
    /// for reading, such a file is clipped to whole sectors.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self, ImageError> {
        let len = size_of(&*storage)?;
        if len < SECTOR || (!read_only && !len.is_multiple_of(SECTOR)) {
            return Err(ImageError::new(
                ErrorKind::Unsupported,
                format!(
                    "raw image: the file's size of {len} bytes is not a positive multiple of {SECTOR}; extend it to {} \
                     bytes with zeroes (truncate -s), or open it for reading",
                    len.next_multiple_of(SECTOR).max(SECTOR)
                ),
            ));
        }
        Ok(Self { flat: Flat::new(storage, len / SECTOR * SECTOR, SECTOR as u32, read_only) })
    }
}

/// Gives an empty `storage` the size of a raw image that reads as zeroes, and makes it durable.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] when `virtual_size` is 0, no multiple of 512, or above 2^63 - 512; what the file says.
pub fn create(storage: &dyn Storage, virtual_size: u64) -> Result<(), ImageError> {
    if virtual_size == 0 || !virtual_size.is_multiple_of(SECTOR) || virtual_size > i64::MAX as u64 {
        return Err(ImageError::new(
            ErrorKind::InvalidParameter,
            format!("raw image: size {virtual_size} must be a positive multiple of {SECTOR}, below 2^63"),
        ));
    }
    storage.set_len(virtual_size).map_err(|e| ImageError::io("cannot extend the file", e))?;
    storage.sync().map_err(|e| ImageError::io("cannot sync the image", e))
}

/// Changes the size of the disk, durably.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] for a size that a raw image cannot have, for a smaller one unless `shrink`, and when
/// anything but zeroes would be cut off; what the file says.
pub fn resize(storage: &dyn Storage, new_size: u64, shrink: bool) -> Result<(), ImageError> {
    let size = size_of(storage)?;
    if new_size < size && !shrink {
        return Err(ImageError::new(
            ErrorKind::InvalidParameter,
            format!("raw image: {new_size} bytes are less than the {size} that it has; --shrink allows that"),
        ));
    }
    if let Some(at) = first_data(storage, new_size, size)? {
        return Err(ImageError::new(
            ErrorKind::InvalidParameter,
            format!(
                "raw image: cut to {new_size} bytes it would lose what is there at {at}; zero or move it first"
            ),
        ));
    }
    create(storage, new_size)
}

/// Makes holes where the content is zeroes: each run of [`HOLE`] bytes that is. The file keeps its length.
///
/// # Errors
/// What the file says.
pub fn compact(
    storage: &dyn Storage,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompactOutcome, ImageError> {
    let size = size_of(storage)?;
    let mut freed_bytes = 0;
    for_each_run(storage, 0, size, &mut |offset, bytes| {
        if bytes.iter().all(|b| *b == 0) {
            let len = bytes.len() as u64;
            storage
                .punch(offset, len)
                .map_err(|e| ImageError::io(format!("making a hole at {offset}"), e))?;
            freed_bytes += len;
        }
        progress(offset + bytes.len() as u64, size);
        Ok(true)
    })?;
    storage.sync().map_err(|e| ImageError::io("cannot sync the image", e))?;
    progress(size, size);
    Ok(CompactOutcome { freed_bytes, moved_bytes: 0 })
}

/// The grain of holes, in bytes.
const HOLE: u64 = 64 << 10;

/// Gets the offset of a run and what is there; `false` ends it.
type EachRun<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<bool, ImageError>;

/// Calls `each` with what the file holds from `start` to `end` and is no hole, at most [`HOLE`] bytes at a time, until it
/// answers `false`.
fn for_each_run(storage: &dyn Storage, start: u64, end: u64, each: EachRun<'_>) -> Result<(), ImageError> {
    let mut buffer = vec![0; HOLE as usize];
    let mut offset = start;
    while offset < end {
        let found = storage
            .next_data(offset)
            .map_err(|e| ImageError::io(format!("looking for holes of the file at {offset}"), e))?;
        let Some((data, _)) = found.filter(|(data, _)| *data < end) else { break };
        offset = data.max(offset);
        let len = (HOLE - offset % HOLE).min(end - offset);
        let run = &mut buffer[..len as usize];
        storage
            .read_at(run, offset)
            .map_err(|e| ImageError::io(format!("reading {len} bytes at {offset}"), e))?;
        if !each(offset, run)? {
            break;
        }
        offset += len;
    }
    Ok(())
}

/// The first byte from `start` to `end` that is not zero.
fn first_data(storage: &dyn Storage, start: u64, end: u64) -> Result<Option<u64>, ImageError> {
    let mut found = None;
    for_each_run(storage, start, end, &mut |offset, bytes| {
        found = bytes.iter().position(|b| *b != 0).map(|at| offset + at as u64);
        Ok(found.is_none())
    })?;
    Ok(found)
}

/// Looks at what a raw image can have wrong: its size.
///
/// # Errors
/// When the file cannot be asked for its size.
pub fn check(storage: &dyn Storage) -> Result<CheckReport, ImageError> {
    let len = size_of(storage)?;
    let mut report = CheckReport::default();
    if len == 0 || !len.is_multiple_of(SECTOR) {
        report.findings.push(Finding {
            code: "raw-size".into(),
            severity: Severity::Warning,
            structure: "file".into(),
            offset: Some(len / SECTOR * SECTOR),
            message: format!(
                "the size of {len} bytes is not a positive multiple of {SECTOR}: the image cannot be written, and its \
                 last {} bytes are not served",
                len % SECTOR
            ),
            repairable: false,
            repair: None,
            repaired: false,
        });
    }
    Ok(report)
}

fn size_of(storage: &dyn Storage) -> Result<u64, ImageError> {
    storage.len().map_err(|e| ImageError::io("cannot find out the size of the file", e))
}

impl Image for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn image_type(&self) -> ImageType {
        ImageType::Fixed
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            virtual_size: self.flat.virtual_size(),
            logical_sector_size: SECTOR as u32,
            physical_sector_size: 4096,
            block_size: 0,
            payload_align: 4096,
        }
    }

    fn is_read_only(&self) -> bool {
        self.flat.is_read_only()
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        self.flat.files()
    }

    fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.flat.map_read(at, out)
    }

    fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.flat.map_write(at, out)
    }

    fn map_zero(&self, at: ByteSpan, _mode: ZeroMode, out: &mut Pieces) -> Result<(), ImageError> {
        self.flat.map_write(at, out)
    }

    fn wrote(&self, _at: ByteSpan) -> Result<(), ImageError> {
        Ok(())
    }

    fn sync_begin(&self) -> SyncToken {
        SyncToken::default()
    }

    fn sync_done(&self, _token: SyncToken) -> Result<Option<SyncToken>, ImageError> {
        Ok(None)
    }

    fn sync_failed(&self, _why: &str) {}

    fn wants_maintenance(&self) -> bool {
        false
    }

    fn maintain(&self, _quiesce: &dyn Fn()) -> Result<(), ImageError> {
        Ok(())
    }

    fn commit(&self) -> Result<(), ImageError> {
        self.flat.sync()
    }

    fn close(&self) -> Result<(), ImageError> {
        self.flat.sync()
    }

    fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        self.flat.next_extent(offset)
    }

    fn content_id(&self) -> Option<uuid::Uuid> {
        None
    }

    fn parent_link(&self) -> Option<&crate::ParentLink> {
        None
    }

    fn begin_changes(&self) -> Result<(), ImageError> {
        Ok(())
    }
}

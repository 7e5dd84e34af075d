//! Disks whose byte `n` is byte `n` of the file: raw images and fixed VHDs.

use std::sync::Arc;

use crate::{AllocState, ByteSpan, ErrorKind, Extent, FileIndex, ImageError, Piece, Pieces, Place, Storage};

/// Refuses a span that leaves a disk of `virtual_size` bytes, or is off the grid of `sector` bytes.
pub(crate) fn check_span(at: ByteSpan, virtual_size: u64, sector: u32) -> Result<(), ImageError> {
    let grid = u64::from(sector);
    let inside = at.end().is_some_and(|end| end <= virtual_size);
    let aligned = at.offset.is_multiple_of(grid) && at.len.is_multiple_of(grid);
    if inside && aligned {
        return Ok(());
    }
    let ByteSpan { offset, len } = at;
    Err(ImageError::new(
        ErrorKind::OutOfRange,
        format!(
            "{len} bytes at {offset} are not whole sectors of {sector} bytes on a disk of {virtual_size} bytes"
        ),
    ))
}

/// Refuses writes to an image that was opened for reading.
pub(crate) fn check_writable(read_only: bool) -> Result<(), ImageError> {
    if read_only {
        return Err(ImageError::new(ErrorKind::ReadOnly, "the image is open for reading only"));
    }
    Ok(())
}

/// Whether the file holds data at `offset`, and for how many bytes that goes on, at most `len` (which is not 0).
/// Edges are rounded to 512 bytes from `offset` on, towards more data. What should be in the file and lies beyond its end
/// (somebody has cut it) is data too, so that nobody takes what is lost for zeroes: reading it fails.
pub(crate) fn state_in_file(
    storage: &dyn Storage,
    offset: u64,
    len: u64,
) -> Result<(AllocState, u64), ImageError> {
    const GRID: u64 = 512;
    let failed = |e| ImageError::io(format!("looking for holes of the file at {offset}"), e);
    let data = storage.next_data(offset).map_err(failed)?;
    let hole_end = match data {
        Some((start, _)) => start,
        None => storage.len().map_err(failed)?,
    };
    let hole = (hole_end.saturating_sub(offset) / GRID * GRID).min(len);
    if hole > 0 {
        return Ok((AllocState::Zero, hole));
    }
    let data_end = data.map_or(u64::MAX, |(_, end)| end);
    let run = data_end.saturating_sub(offset).div_ceil(GRID).max(1).saturating_mul(GRID);
    Ok((AllocState::Data, run.min(len)))
}

/// The map of such a disk.
#[derive(Debug)]
pub(crate) struct Flat {
    files: [Arc<dyn Storage>; 1],
    virtual_size: u64,
    sector: u32,
    read_only: bool,
}

impl Flat {
    pub(crate) fn new(storage: Arc<dyn Storage>, virtual_size: u64, sector: u32, read_only: bool) -> Self {
        Self { files: [storage], virtual_size, sector, read_only }
    }

    pub(crate) fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.files[0]
    }

    pub(crate) fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        check_span(at, self.virtual_size, self.sector)?;
        out.push(Piece { len: at.len, place: Place::File { file: FileIndex::TOP, offset: at.offset } });
        Ok(())
    }

    pub(crate) fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        check_writable(self.read_only)?;
        self.map_read(at, out)
    }

    /// The run of one state at `offset`. What is a hole of the file is absent: nothing but the size names it.
    pub(crate) fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        if offset >= self.virtual_size {
            return Ok(None);
        }
        let (state, len) = state_in_file(self.storage(), offset, self.virtual_size - offset)?;
        let state = if state == AllocState::Zero { AllocState::Absent } else { state };
        Ok(Some(Extent { span: ByteSpan::new(offset, len), state }))
    }

    pub(crate) fn sync(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.storage().sync().map_err(|e| ImageError::io("cannot sync the image", e))
    }
}

//! Changing the size of images that nobody uses, and giving back the space that they waste.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::open::{at, choose_format, lock_for, open_file};
use crate::{FileStorage, Format, OpenError, Storage, dispatch};

/// What compacting an image has brought. Sizes are in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactOutcome {
    /// By how much the file takes up less: what was cut off its end, and holes made in it.
    pub freed_bytes: u64,
    /// Content that was moved within the file for that.
    pub moved_bytes: u64,
}

/// Changes the size of the disk in the image at `path`, in the format said or that of its name (see [`crate::open()`]), to
/// `new_size` bytes. What is new reads as zeroes, also on a parent. Takes the image's exclusive lock. A crash leaves
/// the old size or the new one.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`](crate::ErrorKind::InvalidParameter) when the disk would become smaller and `shrink`
/// does not allow that, when something other than zeroes would be cut off, and for sizes that the format cannot have; when
/// the file cannot be opened, locked, read or written.
pub fn resize(
    path: impl AsRef<Path>,
    format: Option<Format>,
    new_size: u64,
    shrink: bool,
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let (format, storage) = open_exclusively(path, format)?;
    dispatch::resize(format, &storage, new_size, shrink).map_err(|e| at(path, e))
}

/// Gives the space back that the image at `path` wastes: content that is zeroes, and gaps between what it holds. Takes the
/// image's exclusive lock. `progress` gets what is done and what there is to do, in bytes. A crash, or an end at any other
/// moment, leaves a sound image with the same content.
///
/// # Errors
/// When the file cannot be opened, locked, read or written, and for an image that is not sound.
pub fn compact(
    path: impl AsRef<Path>,
    format: Option<Format>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompactOutcome, OpenError> {
    let path = path.as_ref();
    let (format, storage) = open_exclusively(path, format)?;
    dispatch::compact(format, &storage, progress).map_err(|e| at(path, e))
}

/// Opens a file for changing its structure, and keeps everybody else from it.
pub(crate) fn open_exclusively(
    path: &Path,
    format: Option<Format>,
) -> Result<(Format, Arc<dyn Storage>), OpenError> {
    let file = open_file(path, false)?;
    lock_for(path, &file, false)?;
    let format = choose_format(path, &file, format)?;
    Ok((format, Arc::new(FileStorage::new(file))))
}

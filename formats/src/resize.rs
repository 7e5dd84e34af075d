//! Changing the size of images that nobody uses, and giving back the space that they waste.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::open::{at, choose_format, lock_for, open_file};
use crate::parents::{Child, FileId, Gate};
use crate::{
    Chain, FileStorage, Format, ImageError, ImageType, LayerOptions, OpenError, Storage, dispatch, vhd, vhdx,
};

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
    resize_with_parents(path, format, new_size, shrink, &[])
}

/// [`resize()`] of an image whose parents are looked for in `parents` (see
/// [`OpenOptions::parents`](crate::OpenOptions::parents)). A differencing image does not know by itself whether what is
/// cut off, or comes into reach behind its old end, holds anything: without parents it takes the worst for granted.
///
/// # Errors
/// As [`resize()`]; [`ErrorKind::Parent`](crate::ErrorKind::Parent) when some were named, and one is not found there.
pub fn resize_with_parents(
    path: impl AsRef<Path>,
    format: Option<Format>,
    new_size: u64,
    shrink: bool,
    parents: &[PathBuf],
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let mut gate = Gate::new(parents, true);
    let (format, storage) = open_exclusively(path, format)?;
    let chain = if parents.is_empty() { None } else { read_only_chain(path, format, &storage, &mut gate)? };
    match (format, chain) {
        (Format::Vhd, Some(chain)) => {
            vhd::resize_over(&storage, new_size, shrink, &|span| chain.is_zero_below(span))
        }
        (Format::Vhdx, Some(chain)) => {
            vhdx::resize_over(&storage, new_size, shrink, &|span| chain.is_zero_below(span))
        }
        _ => dispatch::resize(format, &storage, new_size, shrink),
    }
    .map_err(|e| at(path, e))
}

/// The chain of the image in `storage`, for looking at its parents; `None` where it has none.
fn read_only_chain(
    path: &Path,
    format: Format,
    storage: &Arc<dyn Storage>,
    gate: &mut Gate,
) -> Result<Option<Chain>, OpenError> {
    if format == Format::Raw {
        return Ok(None);
    }
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let layer = dispatch::open_layer(format, storage.clone(), &options).map_err(|e| at(path, e))?;
    if layer.image_type() != ImageType::Differencing {
        return Ok(None);
    }
    let file = storage.file().expect("an image that was opened by path has a file");
    let file = FileId::of(file).map_err(|e| at(path, ImageError::io("looking at the file", e)))?;
    let walk = gate.walk(Child { path, image: &*layer, file });
    if let Some(missing) = walk.missing {
        return Err(missing.into());
    }
    let parents = walk.parents.into_iter().map(|parent| parent.image).collect();
    Chain::new(layer, parents).map(Some).map_err(|e| at(path, e))
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

//! What can be done with an image whose file stays open and locked: a new one is put on it, or its structure is changed
//! and it is opened again.

use std::fs::{File, OpenOptions as FileOptions};
use std::path::Path;
use std::sync::Arc;

use crate::create::link_to_parent;
use crate::error::kind_of;
use crate::lock::{Lock, LockError, lock, unlock};
use crate::open::{at, lock_for, open_file};
use crate::parents::FileId;
use crate::raw::Raw;
use crate::{
    AllocState, Chain, CreateError, CreateOptions, ErrorKind, FileStorage, Format, Image, ImageError,
    ImageType, LayerOptions, OpenError, Storage, dispatch, notes_dir,
};

/// Makes an empty differencing image at `path` on `parent`, which is at `parent_path` and may be open for writing, and
/// returns it, open for writing and locked, together with its parents. The image and its directory entry are durable then.
///
/// The parent may still be written to, as long as nothing was written to the new image where that lands, but it must not be
/// closed and written to again: its session's changes are begun here, so that its content keeps the id that the new image
/// knows it by. An unused image on the same parent that an earlier attempt has left at `path` is replaced.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a raw parent, [`ErrorKind::Parent`] for a chain that is too long, [`ErrorKind::Io`] when
/// there is another file of this name, which is left alone, and what the file says; no file is left at `path` then.
pub fn create_over(
    path: impl AsRef<Path>,
    parent: &Arc<dyn Image>,
    parent_path: impl AsRef<Path>,
    notes_dir: Option<&Path>,
) -> Result<Arc<dyn Image>, CreateError> {
    let (path, parent_path) = (path.as_ref(), parent_path.as_ref());
    let failed = |e: ImageError| created(at(path, e));
    parent.begin_changes().map_err(failed)?;
    // Before anything durable names the id.
    parent.files()[0].sync().map_err(|e| failed(ImageError::io("cannot sync the parent", e)))?;
    let id = parent.content_id().filter(|id| !id.is_nil()).ok_or_else(|| {
        let message = format!(
            "{} is a {} image, which has no id that a differencing image could name; convert it to VHDX",
            parent_path.display(),
            parent.format()
        );
        failed(ImageError::new(ErrorKind::Unsupported, message))
    })?;
    let link = link_to_parent(path, parent_path, id, None).map_err(failed)?;
    remove_unused(path, &link.absolute);
    let io = |e: std::io::Error| CreateError {
        path: path.to_owned(),
        kind: kind_of(&e),
        message: format!("cannot be created: {e}"),
        source: Some(e),
    };
    let file = FileOptions::new().read(true).write(true).create_new(true).open(path).map_err(io)?;
    let made = (|| {
        lock_for(path, &file, false).map_err(created)?;
        let file_id = FileId::of(&file).map_err(io)?;
        let geometry = parent.geometry();
        let options = CreateOptions {
            image_type: ImageType::Differencing,
            block_size: Some(geometry.block_size).filter(|size| *size != 0),
            logical_sector_size: geometry.logical_sector_size,
            ..CreateOptions::new(parent.format(), geometry.virtual_size)
        };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(file));
        dispatch::create(&*storage, &options, geometry.physical_sector_size, Some(link)).map_err(failed)?;
        File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(io)?;
        let parents = match parent.as_chain() {
            Some(chain) => chain.layers().to_vec(),
            None => vec![parent.clone()],
        };
        open_on(parent.format(), storage, file_id, parents, notes_dir).map_err(created_at(path))
    })();
    if made.is_err() {
        // The reason of the failure is what counts; a file that cannot be removed is no reason of its own.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Changes the size of the disk in the image's own file to `new_size` bytes, as [`crate::resize`] does. The image was
/// closed, and nothing else may be done with it before it is opened again ([`reopen`]).
///
/// # Errors
/// As [`crate::resize`].
pub fn resize_held(image: &dyn Image, new_size: u64, shrink: bool) -> Result<(), ImageError> {
    dispatch::resize(image.format(), &image.files()[0], new_size, shrink)
}

/// Opens what is in the own file of an image that was closed, on the same parents, for writing, without letting go of its
/// lock. The image so far must not be used any more.
///
/// # Errors
/// What opening it says.
pub fn reopen(image: &dyn Image, notes_dir: Option<&Path>) -> Result<Arc<dyn Image>, ImageError> {
    let storage = image.files()[0].clone();
    if image.format() == Format::Raw {
        return Ok(Arc::new(Raw::open(storage, false)?));
    }
    let parents = image.as_chain().map(|chain| chain.layers()[1..].to_vec()).unwrap_or_default();
    let id = own_file(image).and_then(FileId::of).map_err(|e| ImageError::io("the image's file", e))?;
    open_on(image.format(), storage, id, parents, notes_dir).map_err(|e| ImageError {
        kind: e.kind,
        message: e.to_string(),
        source: e.source,
    })
}

/// Lets others read an image that was open for writing, from now on: its lock becomes a shared one. It was closed.
///
/// # Errors
/// What the file system says; the lock is as it was then.
pub fn share(image: &dyn Image) -> Result<(), ImageError> {
    let file = own_file(image).map_err(|e| ImageError::io("the image's file", e))?;
    match lock(file, Lock::Shared) {
        Ok(()) => Ok(()),
        Err(LockError::Held) => Err(ImageError::new(ErrorKind::Locked, "somebody else holds the image")),
        Err(LockError::Io(e)) => Err(ImageError::io("sharing the lock of the image", e)),
    }
}

/// Lets go of the locks on an image and its parents, which was closed and is not used any more, though the files may stay open
/// for a while.
///
/// # Errors
/// What the file system says; some may be locked then until the image is dropped.
pub fn let_go(image: &dyn Image) -> Result<(), ImageError> {
    for file in image.files().iter().filter_map(|storage| storage.file()) {
        unlock(file).map_err(|e| ImageError::io("letting go of the lock of an image", e))?;
    }
    Ok(())
}

/// Removes the notes that a differencing image has kept in `notes_dir`. It was closed, and is not written to any more.
pub fn remove_notes(image: &dyn Image, notes_dir: &Path) {
    if let Ok(id) = own_file(image).and_then(FileId::of)
        && image.image_type() == ImageType::Differencing
        && let Ok(notes) = notes_dir::open(notes_dir, id)
    {
        notes.remove();
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn own_file(image: &dyn Image) -> std::io::Result<&File> {
    image.files()[0].file().ok_or_else(|| std::io::Error::other("there is no file"))
}

fn open_on(
    format: Format,
    storage: Arc<dyn Storage>,
    id: FileId,
    parents: Vec<Arc<dyn Image>>,
    notes_dir: Option<&Path>,
) -> Result<Arc<dyn Image>, OpenError> {
    let notes = notes_dir.filter(|_| !parents.is_empty()).map(|dir| notes_dir::open(dir, id)).transpose()?;
    let options = LayerOptions { notes: notes.map(|notes| notes.file), ..LayerOptions::default() };
    let failed = |e: ImageError| at(Path::new("the image"), e);
    let layer = dispatch::open_layer(format, storage, &options).map_err(failed)?;
    if parents.is_empty() {
        return Ok(layer);
    }
    Ok(Arc::new(Chain::new(layer, parents).map_err(failed)?))
}

/// Removes what is at `path` if it is a differencing image on the parent at `absolute` that holds nothing.
fn remove_unused(path: &Path, absolute: &str) {
    let is_unused = || -> Result<bool, OpenError> {
        let file = open_file(path, true)?;
        lock_for(path, &file, true)?;
        let format = crate::format_by_name(path).unwrap_or(Format::Vhdx);
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let layer = dispatch::open_layer(format, Arc::new(FileStorage::new(file)), &options)
            .map_err(|e| at(path, e))?;
        let same = |text: &str| text.replace('\\', "/") == absolute;
        if !layer.parent_link().is_some_and(|link| link.paths.iter().any(|path| same(&path.text))) {
            return Ok(false);
        }
        let mut end = 0;
        while let Some(extent) = layer.next_extent(end).map_err(|e| at(path, e))? {
            if extent.state != AllocState::Absent {
                return Ok(false);
            }
            end = extent.span.offset + extent.span.len;
        }
        Ok(true)
    };
    if is_unused().unwrap_or(false) {
        tracing::info!(path = %path.display(), "an unused image of an earlier attempt is replaced");
        // What cannot be removed is in the way of the new one, which says so.
        let _ = std::fs::remove_file(path);
    }
}

fn created(e: OpenError) -> CreateError {
    CreateError { path: e.path, kind: e.kind, message: e.message, source: e.source }
}

fn created_at(path: &Path) -> impl Fn(OpenError) -> CreateError {
    move |e| CreateError { path: path.to_owned(), kind: e.kind, message: e.message, source: e.source }
}

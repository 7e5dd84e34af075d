//! Chains that are put together layer by layer, before their files have the names that they are to have.

use std::fs::OpenOptions as FileOptions;
use std::path::Path;
use std::sync::Arc;

use crate::create::{refused, sync_directory};
use crate::open::{at, lock_for};
use crate::parents::FileId;
use crate::{
    Chain, CreateError, CreateOptions, FileStorage, Image, ImageError, Layer, LayerOptions, NewParentLink,
    OpenError, Storage, dispatch, notes_dir,
};

/// Makes an image at `path`, with this link to its parent if it is to have one, and opens it by itself, locked, for writing.
/// Its content keeps its id from here on until it is closed. A file that is there already is not touched; a failed
/// attempt leaves none. `notes_dir` as in [`crate::OpenOptions::notes_dir`].
///
/// # Errors
/// As [`crate::create()`]; [`crate::ErrorKind::Unsupported`] for a raw image, which is no layer.
pub fn make_layer(
    path: impl AsRef<Path>,
    options: &CreateOptions,
    link: Option<NewParentLink>,
    notes_dir: Option<&Path>,
) -> Result<Arc<dyn Layer>, CreateError> {
    let path = path.as_ref();
    let file = FileOptions::new().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(|e| refused(path, e))?;
    let made = (|| {
        lock_for(path, &file, false).map_err(created)?;
        let failed = |e: ImageError| created(at(path, e));
        let notes = notes_dir.filter(|_| link.is_some()).map(|dir| {
            let id = FileId::of(&file).map_err(|e| failed(ImageError::io("looking at the new file", e)))?;
            notes_dir::open(dir, id).map_err(created)
        });
        let layer_options =
            LayerOptions { notes: notes.transpose()?.map(|notes| notes.file), ..LayerOptions::default() };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(file));
        dispatch::create(&*storage, options, 4096, link).map_err(failed)?;
        let layer = dispatch::open_layer(options.format, storage, &layer_options).map_err(failed)?;
        layer.begin_changes().map_err(failed)?;
        sync_directory(path).map_err(|e| refused(path, e))?;
        Ok(layer)
    })();
    if made.is_err() {
        // The reason of the failure is what counts; a file that cannot be removed is no reason of its own.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// A layer on its parents, the nearest first; by itself where it has none.
///
/// # Errors
/// As [`Chain::new`].
pub fn on_parents(layer: Arc<dyn Layer>, parents: &[Arc<dyn Image>]) -> Result<Arc<dyn Image>, ImageError> {
    if parents.is_empty() { Ok(layer) } else { Ok(Arc::new(Chain::new(layer, parents.to_vec())?)) }
}

fn created(e: OpenError) -> CreateError {
    CreateError { path: e.path, kind: e.kind, message: e.message, source: e.source }
}

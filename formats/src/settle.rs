//! Finishing what a killed process has left of a differencing image.
//!
//! A process that writes to such an image notes which sectors became the image's own, and puts that into the image when
//! their content is durable. Where it was killed in between, the notes alone know of its last writes: whoever reads the
//! image without them sees the parent there, and whoever moves its blocks about loses them. So the notes are brought home
//! first.

use std::path::Path;

use crate::open::{at, choose_format, open_file};
use crate::parents::FileId;
use crate::resize::open_exclusively;
use crate::{ErrorKind, Format, ImageError, ImageType, LayerOptions, OpenError, dispatch, notes_dir};

/// Brings home what a killed process has noted of the differencing image at `path` in the folder `notes_dir` (see
/// [`OpenOptions::notes_dir`](crate::OpenOptions::notes_dir)), and closes the image. Its content and its id stay as they are.
/// Says whether there was anything to do; without notes nothing is written or locked.
///
/// # Errors
/// [`ErrorKind::Locked`] when somebody has the image open, and what opening, writing and closing it say.
pub fn settle(
    path: impl AsRef<Path>,
    format: Option<Format>,
    notes_dir: impl AsRef<Path>,
) -> Result<bool, OpenError> {
    let (path, dir) = (path.as_ref(), notes_dir.as_ref());
    let file = open_file(path, true)?;
    let looked_at = |e| at(path, ImageError::io("looking at the file", e));
    let id = FileId::of(&file).map_err(looked_at)?;
    let format = choose_format(path, &file, format)?;
    if format == Format::Raw || !notes_dir::has_notes(dir, id) {
        return Ok(false);
    }
    drop(file);
    let (format, storage) = open_exclusively(path, Some(format))?;
    let file = storage.file().expect("an image that was opened by path has a file");
    if FileId::of(file).map_err(looked_at)? != id {
        let message = "the file was exchanged while it was looked at; try again".to_owned();
        return Err(OpenError { path: path.to_owned(), kind: ErrorKind::Io, message, source: None });
    }
    let read_only = LayerOptions { read_only: true, ..LayerOptions::default() };
    let seen = dispatch::open_layer(format, storage.clone(), &read_only).map_err(|e| at(path, e))?;
    let (content_id, image_type) = (seen.content_id(), seen.image_type());
    drop(seen);
    let notes = notes_dir::open(dir, id)?;
    if image_type == ImageType::Differencing {
        // What was written is old news: those who know the image by its id find the content that they know.
        let options = LayerOptions {
            next_content_id: content_id,
            notes: Some(notes.file.clone()),
            ..LayerOptions::default()
        };
        let layer = dispatch::open_layer(format, storage, &options).map_err(|e| at(path, e))?;
        layer.close().map_err(|e| at(path, e))?;
    }
    notes.remove();
    Ok(true)
}

/// Refuses to read an image of which a killed process has left notes.
pub(crate) fn check_settled(path: &Path, dir: &Path, id: FileId) -> Result<(), OpenError> {
    if !notes_dir::has_notes(dir, id) {
        return Ok(());
    }
    let message = "the process that wrote to this image was killed, and its last writes are not all in the image yet; \
                   blockd brings them home when it serves the image again, and so does `blockctl image check --repair`";
    Err(OpenError {
        path: path.to_owned(),
        kind: ErrorKind::NeedsRepair,
        message: message.into(),
        source: None,
    })
}

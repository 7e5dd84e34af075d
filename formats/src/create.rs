//! Making images by path.

use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::path::Path;

use crate::error::kind_of;
use crate::open::lock_for;
use crate::{CreateError, ErrorKind, FileStorage, Format, ImageType, dispatch};

/// What a new image shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The format.
    pub format: Format,
    /// The layout. A raw image is a sparse file whichever of fixed and dynamic it is.
    pub image_type: ImageType,
    /// Size of the virtual disk in bytes, a multiple of the sector size.
    pub virtual_size: u64,
    /// Unit of allocation in bytes, where the format has one; its default unless given.
    pub block_size: Option<u32>,
    /// The guest's sectors: 512 bytes, or 4096 in a VHDX.
    pub logical_sector_size: u32,
}

impl CreateOptions {
    /// A dynamic image (raw: a sparse file) with the format's own block size and sectors of 512 bytes.
    pub fn new(format: Format, virtual_size: u64) -> Self {
        let image_type = if format == Format::Raw { ImageType::Fixed } else { ImageType::Dynamic };
        Self { format, image_type, virtual_size, block_size: None, logical_sector_size: 512 }
    }
}

/// Makes an image at `path` that reads as zeroes, and makes it and its directory entry durable. A file that is there
/// already is not touched; a failed attempt leaves none.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] with the allowed range, [`ErrorKind::NoSpace`], [`ErrorKind::Io`] (also when the file
/// exists).
pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<(), CreateError> {
    let path = path.as_ref();
    let file = FileOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| refused(path, e))?;
    let made = fill(path, file, options);
    if made.is_err() {
        // The reason of the failure is what counts; a file that cannot be removed is no reason of its own.
        let _ = std::fs::remove_file(path);
    }
    made
}

fn fill(path: &Path, file: File, options: &CreateOptions) -> Result<(), CreateError> {
    lock_for(path, &file, false).map_err(|e| CreateError {
        path: e.path,
        kind: e.kind,
        message: e.message,
        source: e.source,
    })?;
    dispatch::create(&FileStorage::new(file), options).map_err(|e| CreateError {
        path: path.to_owned(),
        kind: e.kind,
        message: e.message,
        source: e.source,
    })?;
    sync_directory(path).map_err(|e| refused(path, e))
}

/// Makes the directory entry of `path` durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

fn refused(path: &Path, e: io::Error) -> CreateError {
    let message = match e.kind() {
        io::ErrorKind::AlreadyExists => {
            "there is a file of this name already, and it is left alone; choose another name or remove it"
                .into()
        }
        io::ErrorKind::NotFound => format!("cannot be created: {e}; the directory has to exist"),
        _ => format!("cannot be created: {e}"),
    };
    let kind: ErrorKind = kind_of(&e);
    CreateError { path: path.to_owned(), kind, message, source: Some(e) }
}

//! Making images by path.

use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::error::kind_of;
use crate::open::{at, choose_format, format_by_name, incomplete_move, lock_for, open_file};
use crate::{
    CreateError, ErrorKind, FileStorage, Format, ImageError, ImageType, Layer, LayerOptions, NewParentLink,
    OpenError, dispatch,
};

/// What a new image shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The format.
    pub format: Format,
    /// The layout. A raw image is a sparse file whichever of fixed and dynamic it is.
    pub image_type: ImageType,
    /// Size of the virtual disk in bytes, a multiple of the sector size. On a parent at least that of the parent, and 0
    /// stands for it.
    pub virtual_size: u64,
    /// Unit of allocation in bytes, where the format has one; the parent's, or the format's default, unless given.
    pub block_size: Option<u32>,
    /// The guest's sectors: 512 bytes, or 4096 in a VHDX. On a parent those of the parent, for which 0 stands too.
    pub logical_sector_size: u32,
    /// The parent of a differencing image, which no other has. It must not be open for writing anywhere, since that
    /// would change what the new image has to name, and must not be written to ever after.
    pub parent: Option<PathBuf>,
}

impl CreateOptions {
    /// A dynamic image (raw: a sparse file) with the format's own block size and sectors of 512 bytes.
    pub fn new(format: Format, virtual_size: u64) -> Self {
        let image_type = if format == Format::Raw { ImageType::Fixed } else { ImageType::Dynamic };
        Self { format, image_type, virtual_size, block_size: None, logical_sector_size: 512, parent: None }
    }

    /// A differencing image on `parent`, of its format, size and sectors.
    pub fn on_parent(format: Format, parent: impl Into<PathBuf>) -> Self {
        Self {
            format,
            image_type: ImageType::Differencing,
            virtual_size: 0,
            block_size: None,
            logical_sector_size: 0,
            parent: Some(parent.into()),
        }
    }
}

/// Makes an image at `path` that reads as zeroes (a differencing one: as its parent), and makes it and its directory entry
/// durable. A file that is there already is not touched; a failed attempt leaves none.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] with the allowed range, [`ErrorKind::NoSpace`], [`ErrorKind::Io`] (also when the file
/// exists), [`ErrorKind::Locked`] for a parent that somebody writes to.
pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<(), CreateError> {
    let path = path.as_ref();
    let parent = ParentToBe::of(path, options)?;
    let file = FileOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| refused(path, e))?;
    let made = fill(path, file, options, parent.as_ref());
    if made.is_err() {
        // The reason of the failure is what counts; a file that cannot be removed is no reason of its own.
        let _ = std::fs::remove_file(path);
    }
    made
}

fn fill(
    path: &Path,
    file: File,
    options: &CreateOptions,
    parent: Option<&ParentToBe>,
) -> Result<(), CreateError> {
    lock_for(path, &file, false).map_err(created)?;
    let storage = FileStorage::new(file);
    let failed = |e: ImageError| created(at(path, e));
    match parent {
        None => dispatch::create(&storage, options, 4096, None),
        Some(parent) => {
            let link = link_to_parent(path, &parent.path, parent.id, None).map_err(failed)?;
            let physical = parent.image.geometry().physical_sector_size;
            dispatch::create(&storage, &parent.complete(options), physical, Some(link))
        }
    }
    .map_err(failed)?;
    sync_directory(path).map_err(|e| refused(path, e))
}

fn created(e: OpenError) -> CreateError {
    CreateError { path: e.path, kind: e.kind, message: e.message, source: e.source }
}

fn invalid(path: &Path, message: String) -> CreateError {
    CreateError { path: path.to_owned(), kind: ErrorKind::InvalidParameter, message, source: None }
}

/// The image that a new one is to be based on, kept from changing.
struct ParentToBe {
    path: PathBuf,
    image: Arc<dyn Layer>,
    id: Uuid,
}

impl ParentToBe {
    /// The parent that `options` name, when it goes with them.
    fn of(path: &Path, options: &CreateOptions) -> Result<Option<Self>, CreateError> {
        let differencing = options.image_type == ImageType::Differencing;
        let parent = match &options.parent {
            None if !differencing => return Ok(None),
            None if options.format == Format::Raw => {
                return Err(invalid(path, "a raw image cannot be differencing; VHDX and VHD can".into()));
            }
            None => {
                return Err(invalid(
                    path,
                    "a differencing image needs a parent; say which with --parent".into(),
                ));
            }
            Some(_) if !differencing => {
                let message =
                    format!("a {} image has no parent; the type must be differencing", options.image_type);
                return Err(invalid(path, message));
            }
            Some(parent) => Self::open(parent, options.format).map_err(created)?,
        };
        parent.check(path, options)?;
        Ok(Some(parent))
    }

    fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        let refuse = |message: String| OpenError {
            path: path.to_owned(),
            kind: ErrorKind::InvalidParameter,
            message,
            source: None,
        };
        if let Some(job) = incomplete_move(path) {
            return Err(refuse(format!(
                "this is the unfinished target of move {job}, no image to be a parent"
            )));
        }
        let file = open_file(path, true)?;
        lock_for(path, &file, true)?;
        let own = choose_format(path, &file, format_by_name(path).or(Some(format)))?;
        if own != format {
            return Err(refuse(format!(
                "this is a {own} image, and a {format} image can only have a parent of its own format"
            )));
        }
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let image = dispatch::open_layer(format, Arc::new(FileStorage::new(file)), &options)
            .map_err(|e| at(path, e))?;
        let id = image.content_id().filter(|id| !id.is_nil());
        let id = id.ok_or_else(|| {
            refuse(
                "this image has no id by which a child could know it; writing to it once gives it one".into(),
            )
        })?;
        Ok(Self { path: path.to_owned(), image, id })
    }

    /// Whether the options go with the parent.
    fn check(&self, path: &Path, options: &CreateOptions) -> Result<(), CreateError> {
        let geometry = self.image.geometry();
        if options.virtual_size != 0 && options.virtual_size < geometry.virtual_size {
            let message = format!(
                "size {} is less than the {} bytes of the parent, whose end would be out of reach",
                options.virtual_size, geometry.virtual_size
            );
            return Err(invalid(path, message));
        }
        if ![0, geometry.logical_sector_size].contains(&options.logical_sector_size) {
            let message = format!(
                "sectors of {} bytes: a child has those of its parent, {} bytes",
                options.logical_sector_size, geometry.logical_sector_size
            );
            return Err(invalid(path, message));
        }
        Ok(())
    }

    /// The options with what they leave to the parent.
    fn complete(&self, options: &CreateOptions) -> CreateOptions {
        let geometry = self.image.geometry();
        CreateOptions {
            virtual_size: options.virtual_size.max(geometry.virtual_size),
            logical_sector_size: geometry.logical_sector_size,
            block_size: options.block_size.or(Some(geometry.block_size).filter(|size| *size != 0)),
            ..options.clone()
        }
    }
}

/// What the image at `child`, which need not exist yet, is to say of its parent at `parent`: its ids and where it is, seen
/// from the child's folder and from the root.
///
/// # Errors
/// [`ErrorKind::Io`] when the parent or the child's folder is not there, [`ErrorKind::InvalidParameter`] when a name on
/// the way is not UTF-8, or has a backslash, which parts names there.
pub fn link_to_parent(
    child: &Path,
    parent: &Path,
    id: Uuid,
    next_id: Option<Uuid>,
) -> Result<NewParentLink, ImageError> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|e| ImageError::io(format!("looking for {}", path.display()), e))
    };
    let folder = real(child.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    let parent = real(parent)?;
    let text = |path: &Path| match path.to_str() {
        Some(text) if !text.contains('\\') => Ok(text.to_owned()),
        _ => Err(ImageError::new(
            ErrorKind::InvalidParameter,
            format!(
                "{}: an image can't name a parent with a backslash in its path, or a path that is not UTF-8; rename it",
                path.display()
            ),
        )),
    };
    Ok(NewParentLink {
        id,
        next_id,
        relative: Some(text(&relative(&folder, &parent))?),
        absolute: text(&parent)?,
    })
}

/// The way from the folder `from` to `to`, both absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}

/// Makes the directory entry of `path` durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

pub(crate) fn refused(path: &Path, e: io::Error) -> CreateError {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_parent_goes_up_as_far_as_needed() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/b", "/a/b/p.vhdx"), Path::new("p.vhdx"));
        assert_eq!(way("/a/b", "/a/base/p.vhdx"), Path::new("../base/p.vhdx"));
        assert_eq!(way("/", "/p.vhdx"), Path::new("p.vhdx"));
        assert_eq!(way("/a/b", "/p.vhdx"), Path::new("../../p.vhdx"));
    }
}

//! Giving a differencing image a parent anew, after it was moved, renamed or replaced.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::create::link_to_parent;
use crate::open::{at, choose_format, format_by_name, lock_for, open_file};
use crate::parents::{Child, FileId, Gate};
use crate::resize::open_exclusively;
use crate::{
    ErrorKind, FileStorage, Format, ImageType, Layer, LayerOptions, OpenError, ParentLink, dispatch,
};

/// How an image is given a parent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RebaseOptions {
    /// The child's format; without it, the name's extension decides (see [`crate::open()`]).
    pub format: Option<Format>,
    /// Take a parent that has not the id that the child names: another image, or the right one after it was changed. What
    /// the child does not hold itself then reads as that parent has it, which may be a mixture that no file system bears.
    pub accept_changed_parent: bool,
    /// Folders and files in which the parents of the new parent may be found, if it is a differencing image itself.
    pub parents: Vec<PathBuf>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebased {
    /// The format of both.
    pub format: Format,
    /// The parent's id, which the child names now.
    pub id: Uuid,
    /// The ids that the child named before.
    pub old_ids: Vec<Uuid>,
}

impl Rebased {
    /// Whether the parent is not the one that the child was made on, as far as ids tell.
    pub fn parent_changed(&self) -> bool {
        !self.old_ids.contains(&self.id)
    }
}

/// Writes into the differencing image at `child` that its parent is the image at `parent`: its path, relative and
/// absolute, and its id. Takes the child's exclusive lock and keeps others from writing to the parent meanwhile. A crash
/// leaves the old parent or the new one.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] when `child` is no differencing image, and when the parent has another format, other
/// sectors, or is the child itself; [`ErrorKind::Parent`] when the parent is not the one that the child names, unless
/// [`RebaseOptions::accept_changed_parent`], and when its own parents are not all found; [`ErrorKind::Locked`] when
/// somebody has the child open, or writes to the parent; and what opening either says.
pub fn rebase(
    child: impl AsRef<Path>,
    parent: impl AsRef<Path>,
    options: &RebaseOptions,
) -> Result<Rebased, OpenError> {
    let (child, parent) = (child.as_ref(), parent.as_ref());
    let (format, storage) = open_exclusively(child, options.format)?;
    let read_only = LayerOptions { read_only: true, ..LayerOptions::default() };
    let layer = dispatch::open_layer(format, storage.clone(), &read_only).map_err(|e| at(child, e))?;
    let link = match layer.parent_link() {
        Some(link) if layer.image_type() == ImageType::Differencing => link.clone(),
        _ => {
            return Err(refuse(
                child,
                format!("this is a {} image, which has no parent", layer.image_type()),
            ));
        }
    };
    let child_file = storage.file().expect("an image that was opened by path has a file");
    let child_id =
        FileId::of(child_file).map_err(|e| at(child, crate::ImageError::io("looking at the file", e)))?;
    let new = NewParent::open(parent, format, child, child_id)?;
    new.check_sectors(&*layer)?;
    new.check_chain(child_id, &options.parents)?;
    if !options.accept_changed_parent && !link.ids.contains(&new.id) {
        return Err(new.is_another(child, &link));
    }
    let new_link = link_to_parent(child, parent, new.id, None).map_err(|e| at(child, e))?;
    drop(layer);
    dispatch::relink(format, &storage, &new_link).map_err(|e| at(child, e))?;
    Ok(Rebased { format, id: new.id, old_ids: link.ids })
}

fn refuse(path: &Path, message: String) -> OpenError {
    OpenError { path: path.to_owned(), kind: ErrorKind::InvalidParameter, message, source: None }
}

/// The parent to be, kept from changing.
struct NewParent<'a> {
    path: &'a Path,
    image: Arc<dyn Layer>,
    file: FileId,
    id: Uuid,
}

impl<'a> NewParent<'a> {
    fn open(path: &'a Path, format: Format, child: &Path, child_file: FileId) -> Result<Self, OpenError> {
        let file = open_file(path, true)?;
        let id = FileId::of(&file).map_err(|e| at(path, crate::ImageError::io("looking at the file", e)))?;
        if id == child_file {
            let child = child.display();
            return Err(refuse(
                path,
                format!("this is the same file as {child}, and no image is its own parent"),
            ));
        }
        lock_for(path, &file, true)?;
        let own = choose_format(path, &file, format_by_name(path).or(Some(format)))?;
        if own != format {
            let message =
                format!("this is a {own} image; a {format} image can only have a parent of its own format");
            return Err(refuse(path, message));
        }
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let image = dispatch::open_layer(format, Arc::new(FileStorage::new(file)), &options)
            .map_err(|e| at(path, e))?;
        let content_id = image.content_id().ok_or_else(|| refuse(path, "this image has no id".into()))?;
        Ok(Self { path, image, file: id, id: content_id })
    }

    fn check_sectors(&self, child: &dyn Layer) -> Result<(), OpenError> {
        let [own, childs] =
            [self.image.geometry(), child.geometry()].map(|geometry| geometry.logical_sector_size);
        if own == childs {
            return Ok(());
        }
        Err(refuse(
            self.path,
            format!("this image has sectors of {own} bytes, and the child's have {childs}"),
        ))
    }

    /// A chain that ends in a base, and nowhere comes to the child again.
    fn check_chain(&self, child: FileId, parents: &[PathBuf]) -> Result<(), OpenError> {
        let mut gate = Gate::new(parents, true);
        gate.forbid(child);
        let top: &dyn Layer = &*self.image;
        gate.walk(Child { path: self.path, image: top, file: self.file })
            .missing
            .map_or(Ok(()), |m| Err(m.into()))
    }

    fn is_another(&self, child: &Path, link: &ParentLink) -> OpenError {
        let expected = link.ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" or ");
        let message = format!(
            "its parent has the id {expected}, and {} has {}: it is another image, or was changed after the child was made, \
             and the child's content would be a mixture that fits neither. If you know that it is the right one, \
             --accept-changed-parent takes it",
            self.path.display(),
            self.id
        );
        OpenError { path: child.to_owned(), kind: ErrorKind::Parent, message, source: None }
    }
}

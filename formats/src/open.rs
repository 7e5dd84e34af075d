//! Opening images by path: which file, which format, whose it is.

use std::fs::{File, FileType, OpenOptions as FileOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use uuid::Uuid;

use crate::lock::{Lock, LockError, lock};
use crate::parents::{Child, FileId, Gate, Parent};
use crate::raw::Raw;
use crate::settle::check_settled;
use crate::{
    Chain, ErrorKind, FileStorage, Format, Image, ImageError, ImageType, Layer, LayerOptions, OpenError,
    dispatch, notes_dir,
};

/// How to open an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// The format; without it, the name's extension decides (see [`open`]).
    pub format: Option<Format>,
    /// Refuse writes, and never write to the file.
    pub read_only: bool,
    /// Mend what a power cut may have done to a VHD's footer, instead of refusing to write to it. An explicit word of the
    /// operator, or of software that knows the image to be its own dynamic disk.
    pub recover: bool,
    /// Lock the file against other openers: exclusively for writing, shared for reading. Its parents too, shared.
    pub lock: bool,
    /// Folders and files in which the parents of a differencing image may be found; without any, it cannot be opened.
    /// What an image says of its parent is looked for nowhere else.
    pub parents: Vec<PathBuf>,
    /// The folder in which a differencing image that is written to notes the sectors that are not durable yet
    /// ([`LayerOptions::notes`]); created when it is not there. It must be the same for each opening of the image on a
    /// running system, and belongs to this kind of files alone: those of earlier boots are removed. An image of which a
    /// killed process has left notes there is not opened for reading (see [`crate::settle()`]).
    pub notes_dir: Option<PathBuf>,
    /// The id that the content gets with the first change (VHDX), see [`LayerOptions::next_content_id`].
    pub next_content_id: Option<Uuid>,
}

impl Default for OpenOptions {
    /// For writing, with a lock, format by name, no recovery.
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            recover: false,
            lock: true,
            parents: Vec::new(),
            notes_dir: None,
            next_content_id: None,
        }
    }
}

impl OpenOptions {
    /// For reading, with a lock, format by name.
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }
}

/// Opens the image at `path`, and holds its lock for as long as the image lives. A differencing image is opened together
/// with its parents, which are looked for in [`OpenOptions::parents`] only, as a [`Chain`].
///
/// The format is that of the options, else the one of the name's extension: `.vhdx`, `.avhdx`, `.vhd`, `.avhd`, `.raw`,
/// `.img` (an unfinished move's `.incomplete-JOB` is left aside). A file of another name is raw if it bears no signature
/// of another format; with one, the caller has to say, because a guest can write any signature to a raw disk.
///
/// # Errors
/// [`ErrorKind::Locked`] when somebody else holds it, or a parent, open; [`ErrorKind::WrongFormat`] when the format is to
/// be said; [`ErrorKind::Unsupported`] for what is not a regular file; [`ErrorKind::Parent`] when a parent is not among
/// what was named, or not the one that the image was made on; [`ErrorKind::Io`] when the system refuses; and whatever
/// the format's own opening says.
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Arc<dyn Image>, OpenError> {
    let path = path.as_ref();
    let file = open_file(path, options.read_only)?;
    if options.lock {
        lock_for(path, &file, options.read_only)?;
    }
    let format = choose_format(path, &file, options.format)?;
    if format == Format::Raw {
        let raw = Raw::open(Arc::new(FileStorage::new(file)), options.read_only);
        return Ok(Arc::new(raw.map_err(|e| at(path, e))?));
    }
    let id = FileId::of(&file).map_err(|e| refused(path, options.read_only, e))?;
    let layer = open_layer(path, format, file, id, options)?;
    if layer.image_type() != ImageType::Differencing {
        return Ok(layer);
    }
    let mut gate = Gate::new(&options.parents, options.lock);
    let walk = gate.walk(Child { path, image: &*layer, file: id });
    if let Some(missing) = walk.missing {
        return Err(missing.into());
    }
    if let Some(dir) = &options.notes_dir {
        parents_settled(&walk.parents, dir, options.read_only)?;
    }
    if let Some(parent) = walk.parents.iter().find(|p| !options.read_only && has_payload_in_log(p)) {
        return Err(log_in_the_way(parent));
    }
    let parents = walk.parents.into_iter().map(|parent| parent.image).collect();
    Ok(Arc::new(Chain::new(layer, parents).map_err(|e| at(path, e))?))
}

/// Opens what is in `file` by itself, with notes if it is a differencing image that is to be written to.
fn open_layer(
    path: &Path,
    format: Format,
    file: File,
    id: FileId,
    options: &OpenOptions,
) -> Result<Arc<dyn Layer>, OpenError> {
    let notes = match &options.notes_dir {
        Some(dir) if !options.read_only => Some(notes_dir::open(dir, id)?),
        _ => None,
    };
    let layer_options = LayerOptions {
        read_only: options.read_only,
        recover: options.recover,
        next_content_id: options.next_content_id,
        notes: notes.as_ref().map(|notes| notes.file.clone()),
    };
    let layer = dispatch::open_layer(format, Arc::new(FileStorage::new(file)), &layer_options)
        .map_err(|e| at(path, e))?;
    if layer.image_type() != ImageType::Differencing {
        if let Some(notes) = notes {
            notes.remove();
        }
    } else if let Some(dir) = options.notes_dir.as_ref().filter(|_| options.read_only) {
        check_settled(path, dir, id)?;
    }
    Ok(layer)
}

/// Looks for notes that a killed process has left of parents. Whoever opens for writing knows what was written to them: the
/// writes of a merge that was broken off are in the child as well.
fn parents_settled(parents: &[Parent], dir: &Path, read_only: bool) -> Result<(), OpenError> {
    for parent in parents {
        match check_settled(&parent.path, dir, parent.file) {
            Err(e) if read_only => return Err(e),
            Err(e) => tracing::warn!("{e}"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Whether a log that is replayed in memory has content in it, which nobody can then read from the file itself.
fn has_payload_in_log(parent: &Parent) -> bool {
    parent.image.files().iter().any(|storage| storage.file().is_none())
}

fn log_in_the_way(parent: &Parent) -> OpenError {
    let message = "the log of this parent holds changes of its content, so that it cannot be served from the file as it \
                   is; have them applied with `blockctl image check --repair`";
    OpenError {
        path: parent.path.clone(),
        kind: ErrorKind::NeedsRepair,
        message: message.into(),
        source: None,
    }
}

/// The format that a file's name stands for, if any.
pub fn format_by_name(path: impl AsRef<Path>) -> Option<Format> {
    let path = path.as_ref();
    let name = path.file_name()?.to_str()?;
    let (base, _) = split_incomplete(name);
    match Path::new(base).extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        "vhd" | "avhd" => Some(Format::Vhd),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

/// The job whose unfinished target this name is, by `NAME.incomplete-JOB`.
pub fn incomplete_move(path: impl AsRef<Path>) -> Option<String> {
    let name = path.as_ref().file_name()?.to_str()?;
    split_incomplete(name).1.map(str::to_owned)
}

fn split_incomplete(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(".incomplete-") {
        Some((base, job)) if !base.is_empty() && !job.is_empty() => (base, Some(job)),
        _ => (name, None),
    }
}

/// Opens a regular file, without waiting for anything that is none.
pub(crate) fn open_file(path: &Path, read_only: bool) -> Result<File, OpenError> {
    let file = FileOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| refused(path, read_only, e))?;
    let kind = file.metadata().map_err(|e| refused(path, read_only, e))?.file_type();
    if let Some(what) = no_regular_file(kind) {
        let message = format!("this is {what}, and images are served from regular files only");
        return Err(OpenError { path: path.to_owned(), kind: ErrorKind::Unsupported, message, source: None });
    }
    without_nonblock(&file).map_err(|e| refused(path, read_only, e))?;
    Ok(file)
}

/// What a file is that is no regular one.
pub(crate) fn no_regular_file(kind: FileType) -> Option<&'static str> {
    match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_block_device() => Some("a block device"),
        () if kind.is_char_device() => Some("a character device"),
        () if kind.is_fifo() => Some("a FIFO"),
        () => Some("no regular file"),
    }
}

/// Takes `O_NONBLOCK` off again. It was only to keep the opening of a FIFO from waiting; on the payload's ring it would
/// mean something else.
pub(crate) fn without_nonblock(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?) & !OFlag::O_NONBLOCK;
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

pub(crate) fn refused(path: &Path, read_only: bool, e: io::Error) -> OpenError {
    let how = if read_only { "reading" } else { "writing" };
    let hint = match e.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; check who may read and write it",
        io::ErrorKind::ReadOnlyFilesystem => "; open it for reading",
        _ => "",
    };
    let message = format!("cannot be opened for {how}: {e}{hint}");
    OpenError { path: path.to_owned(), kind: ErrorKind::Io, message, source: Some(e) }
}

/// Locks `file` for reading or for writing.
pub(crate) fn lock_for(path: &Path, file: &File, read_only: bool) -> Result<(), OpenError> {
    let (kind, how) =
        if read_only { (Lock::Shared, "for writing") } else { (Lock::Exclusive, "for reading or writing") };
    let (kind, message, source) = match lock(file, kind) {
        Ok(()) => return Ok(()),
        Err(LockError::Held) => (
            ErrorKind::Locked,
            format!(
                "somebody has the image open {how} (a daemon that serves it, or another tool; `fuser -v` names the \
                 process): detach it there first"
            ),
            None,
        ),
        Err(LockError::Io(e)) => {
            (ErrorKind::Io, format!("the file system refuses to lock the image: {e}"), Some(e))
        }
    };
    Err(OpenError { path: path.to_owned(), kind, message, source })
}

/// Which format a file is to be taken for.
pub(crate) fn choose_format(path: &Path, file: &File, said: Option<Format>) -> Result<Format, OpenError> {
    if let Some(format) = said.or_else(|| format_by_name(path)) {
        return Ok(format);
    }
    match signature(file).map_err(|e| refused(path, true, e))? {
        None => Ok(Format::Raw),
        Some(seems) => Err(OpenError {
            path: path.to_owned(),
            kind: ErrorKind::WrongFormat,
            message: format!(
                "the name does not say the format, and the content bears a signature of {seems}, which a guest could \
                 have written to a raw disk too: say which it is with --format raw or --format {seems}"
            ),
            source: None,
        }),
    }
}

/// Whether the file bears the signature of a format that is not raw, wherever formats have them.
fn signature(file: &File) -> io::Result<Option<Format>> {
    let len = file.metadata()?.len();
    let mut places = vec![0];
    places.extend([512, 511].iter().filter_map(|n| len.checked_sub(*n)));
    for at in places {
        let mut found = [0; 8];
        if at + 8 > len {
            continue;
        }
        file.read_exact_at(&mut found, at)?;
        match &found {
            b"vhdxfile" if at == 0 => return Ok(Some(Format::Vhdx)),
            b"conectix" => return Ok(Some(Format::Vhd)),
            _ => {}
        }
    }
    Ok(None)
}

/// An error of a codec with the path that it is about.
pub(crate) fn at(path: &Path, e: ImageError) -> OpenError {
    OpenError { path: path.to_owned(), kind: e.kind, message: e.message, source: e.source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_format_and_the_unfinished_move() {
        assert_eq!(format_by_name("/a/disk.VHDX"), Some(Format::Vhdx));
        assert_eq!(format_by_name("disk.avhd"), Some(Format::Vhd));
        assert_eq!(format_by_name("disk.img"), Some(Format::Raw));
        assert_eq!(format_by_name("disk"), None);
        assert_eq!(format_by_name("disk.vhdx.incomplete-7f3a"), Some(Format::Vhdx));
        assert_eq!(incomplete_move("/x/disk.vhdx.incomplete-7f3a").as_deref(), Some("7f3a"));
        assert_eq!(incomplete_move("/x/disk.vhdx"), None);
        assert_eq!(incomplete_move("/x/disk.incomplete-"), None);
    }
}

//! The folder of the notes that differencing images keep while they are written to.
//!
//! A file's name is made of the boot's id and the image's device and inode: so an image finds its notes again whatever it
//! is called, and those of an earlier boot, which are worth nothing any more, can be told and removed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc;
use uuid::Uuid;

use crate::open::no_regular_file;
use crate::parents::FileId;
use crate::{ErrorKind, FileStorage, NotesFile, OpenError};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const ENDING: &str = ".notes";

/// The notes of one image.
#[derive(Debug)]
pub(crate) struct Notes {
    /// For the codec.
    pub(crate) file: NotesFile,
    path: PathBuf,
}

impl Notes {
    /// Removes the file: the image needs none.
    pub(crate) fn remove(self) {
        // An empty file is left behind at worst.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Opens the notes of `image` in the folder `dir`, which is made when it is not there. The caller has the image's lock, so
/// nobody else has its notes open.
///
/// # Errors
/// [`ErrorKind::Io`] when that is not possible: without notes the death of the process could lose writes.
pub(crate) fn open(dir: &Path, image: FileId) -> Result<Notes, OpenError> {
    let boot_id = boot_id().map_err(|e| refused(Path::new(BOOT_ID), e))?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(refused(dir, e)),
        _ => {}
    }
    remove_of_other_boots(dir, boot_id).map_err(|e| refused(dir, e))?;
    let path = path_of(dir, boot_id, image);
    let file = open_file(&path).map_err(|e| refused(&path, e))?;
    Ok(Notes { file: NotesFile { storage: Arc::new(FileStorage::new(file)), boot_id }, path })
}

/// Whether there are notes of `image` in the folder `dir`, from this boot.
pub(crate) fn has_notes(dir: &Path, image: FileId) -> bool {
    let path = boot_id().map(|boot_id| path_of(dir, boot_id, image));
    path.and_then(|path| path.symlink_metadata()).is_ok_and(|notes| notes.is_file() && notes.len() > 0)
}

fn path_of(dir: &Path, boot_id: Uuid, image: FileId) -> PathBuf {
    dir.join(format!("{boot_id}-{:x}-{:x}{ENDING}", image.device, image.inode))
}

fn boot_id() -> io::Result<Uuid> {
    let text = std::fs::read_to_string(BOOT_ID)?;
    Uuid::try_parse(text.trim()).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    match no_regular_file(file.metadata()?.file_type()) {
        None => Ok(file),
        Some(what) => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}"))),
    }
}

fn remove_of_other_boots(dir: &Path, boot_id: Uuid) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if boot_of(name.to_str().unwrap_or_default()).is_some_and(|boot| boot != boot_id) {
            tracing::debug!(path = %entry.path().display(), "removing notes of an earlier boot");
            // Somebody else may have removed it; and what stays is only in the way of nobody.
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// The boot that a file of notes is of; `None` for a file of another name.
fn boot_of(name: &str) -> Option<Uuid> {
    let name = name.strip_suffix(ENDING)?;
    let (boot, image) = (name.get(..36)?, name.get(36..)?.strip_prefix('-')?);
    let (device, inode) = image.split_once('-')?;
    let is_number = |text: &str| u64::from_str_radix(text, 16).is_ok();
    (is_number(device) && is_number(inode)).then(|| Uuid::try_parse(boot).ok())?
}

fn refused(path: &Path, e: io::Error) -> OpenError {
    let message = format!(
        "the notes that keep a differencing image's writes safe from the death of the process cannot be kept here: {e}; \
         choose another folder for them"
    );
    OpenError { path: path.to_owned(), kind: ErrorKind::Io, message, source: Some(e) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_other_boots_are_removed_and_nothing_else_is() {
        let dir = std::env::temp_dir().join(format!("blockd-notes-{}", Uuid::new_v4()));
        let image = FileId { device: 0xfd01, inode: 77 };
        let notes = open(&dir, image).unwrap();
        let own = notes.path.file_name().unwrap().to_owned();
        assert_eq!(boot_of(own.to_str().unwrap()), Some(boot_id().unwrap()));
        let old = format!("{}-fd01-4d.notes", Uuid::new_v4());
        let foreign = ["a.notes".to_owned(), format!("{}.notes", Uuid::new_v4()), format!("{old}.bak")];
        for name in foreign.iter().chain([&old]) {
            std::fs::write(dir.join(name), "x").unwrap();
        }
        drop(notes);
        let again = open(&dir, image).unwrap();
        assert!(again.path.exists() && !dir.join(&old).exists());
        assert!(foreign.iter().all(|name| dir.join(name).exists()));
        again.remove();
        assert!(!dir.join(&own).exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn notes_are_never_kept_through_a_link() {
        let dir = std::env::temp_dir().join(format!("blockd-notes-{}", Uuid::new_v4()));
        let image = FileId { device: 1, inode: 2 };
        let path = open(&dir, image).unwrap().path;
        std::fs::remove_file(&path).unwrap();
        std::fs::write(dir.join("victim"), "precious").unwrap();
        std::os::unix::fs::symlink(dir.join("victim"), &path).unwrap();
        let refused = open(&dir, image).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Io);
        assert_eq!(std::fs::read(dir.join("victim")).unwrap(), b"precious");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

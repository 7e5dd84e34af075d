//! The source of a move of files that nobody serves: its images, held so that it is certain what was copied and what is
//! deleted in the end.

use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use formats::{Format, Image, OpenOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::failure::Failure;
use crate::paths::{folder_of, notes_dir};
use crate::transfer::sync_folder;

/// What of the source goes when the move is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletes {
    /// It stays.
    Nothing,
    /// The image itself; its parents, if it has any, stay.
    Newest,
    /// All of a chain, as far as nobody else uses it.
    All,
}

/// An image that is open for reading together with its parents, all of them locked against writers.
#[derive(Debug)]
pub(crate) struct Source {
    /// The disk.
    pub(crate) image: Arc<dyn Image>,
    /// Its files, the newest first.
    pub(crate) held: Vec<Held>,
}

impl Source {
    /// Opens the image at `path`. What is to be deleted is locked against readers, too, but parents only when it comes to
    /// that: until then others may go on reading them.
    ///
    /// # Errors
    /// `locked` when somebody has one of the files open in a way that does not go with this, and what opening it says.
    pub(crate) fn open(
        path: &Path,
        format: Option<Format>,
        parents: &[PathBuf],
        deletes: Deletes,
    ) -> Result<Self, Failure> {
        let newest = match deletes {
            Deletes::Nothing => Held::take_shared(path, false)?,
            Deletes::Newest | Deletes::All => Held::take_exclusively(path)?,
        };
        // The locks are ours.
        let mut options = OpenOptions {
            format,
            read_only: true,
            lock: false,
            parents: parents.to_vec(),
            notes_dir: notes_dir(),
            ..OpenOptions::default()
        };
        let image = formats::open(path, &options)?;
        if image.as_chain().is_none() {
            return Ok(Self { image, held: vec![newest] });
        }
        drop(image);
        let mut held = vec![newest];
        for parent in formats::info_with_parents(path, format, parents)?.parents {
            let Some(found) = parent.path.filter(|_| parent.found) else {
                return Err(changed_meanwhile(path));
            };
            held.push(Held::take_shared(Path::new(&found), deletes == Deletes::All)?);
        }
        // Opened anew, from these very files: since they are locked, what is read of them stays true.
        options.parents = held[1..].iter().map(|parent| parent.path.clone()).collect();
        let image = formats::open(path, &options)?;
        let is_as_held = image.as_chain().is_some_and(|chain| {
            let files = chain.files();
            files.len() == held.len()
                && files.iter().zip(&held).all(|(storage, held)| storage.file().is_none_or(|f| held.is(f)))
        });
        if is_as_held { Ok(Self { image, held }) } else { Err(changed_meanwhile(path)) }
    }

    /// The images, the newest first.
    pub(crate) fn layers(&self) -> &[Arc<dyn Image>] {
        self.image.as_chain().map_or(std::slice::from_ref(&self.image), |chain| chain.layers())
    }
}

fn changed_meanwhile(path: &Path) -> Failure {
    let message =
        format!("{}: its parents were moved or exchanged while it was opened; try again", path.display());
    Failure::new("busy", message)
}

/// One file of the source.
#[derive(Debug)]
pub(crate) struct Held {
    /// Where it is.
    pub(crate) path: PathBuf,
    file: File,
    before: Metadata,
}

impl Held {
    /// Nobody else may have it open with a lock, not even for reading.
    fn take_exclusively(path: &Path) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::io(path.display(), &e);
        if path.is_symlink() {
            let real = std::fs::canonicalize(path).map_err(failed)?;
            let message = format!("{}: is a symbolic link; move {} itself", path.display(), real.display());
            return Err(Failure::usage(message));
        }
        let file = File::options().read(true).write(true).open(path).map_err(failed)?;
        if lock(&file, path, nix::libc::F_WRLCK)? {
            return Self::of(path.to_owned(), file);
        }
        let message = format!(
            "{}: another program has it open; end that, or move the disk through its daemon",
            path.display()
        );
        Err(Failure::new("locked", message))
    }

    /// Others may read it, and nobody may write to it. `to_delete` says that [`Self::take_over`] may follow.
    fn take_shared(path: &Path, to_delete: bool) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::io(path.display(), &e);
        // A name that was given for a parent may be a link; what is to go is the file.
        let path = if to_delete && path.is_symlink() {
            std::fs::canonicalize(path).map_err(failed)?
        } else {
            path.to_owned()
        };
        // Only a file that is open for writing can be locked against readers later; one that can't be is not deleted.
        let writable = if to_delete { File::options().read(true).write(true).open(&path).ok() } else { None };
        let file = match writable {
            Some(file) => file,
            None => File::open(&path).map_err(failed)?,
        };
        if lock(&file, &path, nix::libc::F_RDLCK)? {
            return Self::of(path, file);
        }
        let message =
            format!("{}: another program writes to it; end that, or let it move the disk", path.display());
        Err(Failure::new("locked", message))
    }

    fn of(path: PathBuf, file: File) -> Result<Self, Failure> {
        let before = file.metadata().map_err(|e| Failure::io(path.display(), &e))?;
        Ok(Self { path, file, before })
    }

    /// Whether `file` is this one.
    fn is(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (self.before.dev(), self.before.ino()))
    }

    /// Locks a parent against everybody. Says why not where that can't be, or where the file has another name by which
    /// somebody may want it.
    pub(crate) fn take_over(&self) -> Result<(), String> {
        let links = self.file.metadata().map_err(|e| e.to_string())?.nlink();
        if links > 1 {
            return Err(format!("it has {links} names, so something else may need it"));
        }
        match lock(&self.file, &self.path, nix::libc::F_WRLCK) {
            Ok(true) => Ok(()),
            Ok(false) => Err("another program has it open, perhaps as the parent of another disk".into()),
            Err(_) => Err("it can't be locked, so it is not certain that nobody uses it".into()),
        }
    }

    /// A writer that knows nothing of locks can still be told by what it has changed.
    pub(crate) fn refuse_changes(&self) -> Result<(), Failure> {
        let now = self.file.metadata().map_err(|e| Failure::io(self.path.display(), &e))?;
        let stamp = |m: &Metadata| (m.len(), m.mtime(), m.mtime_nsec());
        if stamp(&now) == stamp(&self.before) {
            return Ok(());
        }
        let message = format!(
            "{}: was changed by somebody while it was copied; nothing is deleted and the copy is removed: end whoever uses it and try again",
            self.path.display()
        );
        Err(Failure::new("busy", message))
    }

    /// The target may be read by those who could read the source, and by nobody else.
    pub(crate) fn give_attributes_to(&self, target: &Path) -> Result<(), Failure> {
        // Only the superuser can give files away; for all others the file is theirs as the source was.
        let _ = chown(target, Some(self.before.uid()), Some(self.before.gid()));
        std::fs::set_permissions(target, self.before.permissions())
            .map_err(|e| Failure::io(target.display(), &e))
    }

    /// Deletes the file, if its name still leads to it.
    pub(crate) fn delete(&self, target: &Path) -> Result<(), Failure> {
        let there = std::fs::symlink_metadata(&self.path).ok();
        let ours = |m: &Metadata| (m.dev(), m.ino()) == (self.before.dev(), self.before.ino());
        let deleted = match there {
            Some(found) if ours(&found) => std::fs::remove_file(&self.path),
            _ => Err(std::io::Error::other("its name leads to another file by now")),
        };
        deleted.map_err(|e| {
            let message = format!(
                "{} is complete, but the source {} can't be deleted: {e}; delete it by hand",
                target.display(),
                self.path.display()
            );
            Failure::new("io", message)
        })?;
        sync_folder(folder_of(&self.path))
    }
}

/// Takes the lock that whoever serves or changes an image holds: on the whole file, until it is closed. `false` when
/// somebody else has one that does not go with it.
fn lock(file: &File, path: &Path, kind: nix::libc::c_int) -> Result<bool, Failure> {
    let whole = nix::libc::flock {
        l_type: kind as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(Failure::io(path.display(), &e.into())),
    }
}

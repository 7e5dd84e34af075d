//! Opening a chain in another way while its newest image stays locked: with a parent that can be written to.
//!
//! Whatever the images above a parent have hides what the parent has there, so a merge may write it there without changing
//! what the chain reads as. The id of a VHDX's content changes before it is first written to; so its child first gets both
//! ids (MS-VHDX 2.6.2.6.3, `parent_linkage2`), and is known to be a child of it whatever happens in between.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::create::link_to_parent;
use crate::layers::on_parents;
use crate::lock::{Lock, LockError, lock, unlock};
use crate::parents::FileId;
use crate::{
    Chain, ErrorKind, FileStorage, Image, ImageError, LayerOptions, NotesFile, Storage, dispatch, notes_dir,
};

/// A chain whose newest images are to be merged into the one below them.
#[derive(Debug, Clone, Copy)]
pub struct MergeChain<'a> {
    /// The chain.
    pub chain: &'a Chain,
    /// Where its images are, the newest first.
    pub paths: &'a [PathBuf],
    /// How many of the newest images are merged: the next one takes them.
    pub levels: usize,
    /// See [`crate::OpenOptions::notes_dir`].
    pub notes_dir: Option<&'a Path>,
}

/// The parent that takes what is merged, and its child, open for writing: nobody else has them open. Dropped unused, they
/// are as before.
#[derive(Debug)]
pub struct MergeFiles {
    target: Taken,
    /// The child of the target, where that is not the newest image.
    child: Option<Taken>,
}

/// A file that is read elsewhere in this process, and whose lock was handed over for as long as this lives.
#[derive(Debug)]
struct Taken {
    storage: Arc<dyn Storage>,
    /// That of the reader.
    before: Option<Arc<dyn Storage>>,
}

impl Taken {
    fn from(before: &Arc<dyn Storage>) -> Result<Self, LockError> {
        let held = file_of(before).map_err(LockError::Io)?;
        // The very file, whatever its name leads to by now.
        let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", held.as_raw_fd()));
        let file = file.map_err(LockError::Io)?;
        let locked = hand_over(held, &file).and_then(|()| lock(&file, Lock::Exclusive));
        // Gives the lock back where that was refused.
        let taken = Self { storage: Arc::new(FileStorage::new(file)), before: Some(before.clone()) };
        locked.map(|()| taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(before) = &self.before else { return };
        if let (Some(taken), Some(file)) = (self.storage.file(), before.file())
            && hand_over(taken, file).is_err()
        {
            tracing::warn!("a parent could not be locked again after a merge");
        }
    }
}

/// Has another opening of the file hold its shared lock. At no time is there none, since somebody else could take the file
/// for writing then.
fn hand_over(from: &File, to: &File) -> Result<(), LockError> {
    lock(from, Lock::Shared)?;
    lock(to, Lock::Shared)?;
    unlock(from).map_err(LockError::Io)
}

/// A parent that nobody else reads for as long as this lives.
#[derive(Debug)]
pub struct ReadAlone {
    _held: Taken,
}

/// Keeps everybody else from a file that is open for reading here, as the parent of an image, and locked for that.
///
/// # Errors
/// [`ErrorKind::Locked`] when somebody else reads it too; [`ErrorKind::Io`] when it cannot be opened for writing or locked.
pub fn read_alone(storage: &Arc<dyn Storage>) -> Result<ReadAlone, ImageError> {
    Taken::from(storage).map(|held| ReadAlone { _held: held }).map_err(|e| match e {
        LockError::Io(e) => ImageError::io("locking a parent", e),
        LockError::Held => ImageError::new(ErrorKind::Locked, "the parent is read by somebody else"),
    })
}

/// Both sides of a merge: images that share the layers that they have in common.
#[derive(Debug)]
pub struct MergeSides {
    /// The chain, as before.
    pub chain: Arc<dyn Image>,
    /// The parent that takes what is merged, with its own parents.
    pub target: Arc<dyn Image>,
}

/// Why a merge could not be begun, and the chain to go on with; `None` when it could not be opened again.
#[derive(Debug)]
pub struct MergeRefused {
    /// Why.
    pub error: ImageError,
    /// The chain as it is now, opened anew.
    pub chain: Option<Arc<dyn Image>>,
}

impl MergeChain<'_> {
    /// Opens the files that a merge writes to, and locks them. Changes nothing, and the chain may be in use.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] when somebody else reads the parent, [`ErrorKind::Io`] when it can't be opened for writing.
    pub fn take_files(&self) -> Result<MergeFiles, ImageError> {
        let target = self.take(self.levels)?;
        let child = if self.levels > 1 { Some(self.take(self.levels - 1)?) } else { None };
        Ok(MergeFiles { target, child })
    }

    fn take(&self, level: usize) -> Result<Taken, ImageError> {
        let path = self.paths[level].display();
        Taken::from(&self.chain.files()[level]).map_err(|e| match e {
            LockError::Io(e) => ImageError::io(format!("{path} cannot be opened for writing"), e),
            LockError::Held => ImageError::new(
                ErrorKind::Locked,
                format!(
                    "{path} is read by somebody else, perhaps as the parent of another disk: a merge would change it"
                ),
            ),
        })
    }

    /// Opens the chain with a parent that can be written to, which is made as large as the disk where it is smaller. One that
    /// is larger is not to be merged into: what it has beyond the disk would come to light. The newest image was closed, and
    /// nothing uses the chain; what it was is not to be used any more, whatever is answered.
    ///
    /// # Errors
    /// What the files say; the chain is opened again as it was.
    pub fn open(&self, files: MergeFiles) -> Result<MergeSides, MergeRefused> {
        self.open_for_writing(files).map_err(|error| {
            let chain = self.target_again().and_then(|target| self.on(target));
            if let Err(e) = &chain {
                tracing::error!("{}: the chain can't be opened again: {e}", self.paths[0].display());
            }
            MergeRefused { error, chain: chain.ok() }
        })
    }

    fn open_for_writing(&self, mut files: MergeFiles) -> Result<MergeSides, ImageError> {
        let target = &self.chain.layers()[self.levels];
        let next_id = Uuid::new_v4();
        let child = files.child.as_ref().map_or(&self.chain.files()[0], |child| &child.storage);
        self.relink(child, target.content_id().unwrap_or_default(), Some(next_id))?;
        let size = self.chain.geometry().virtual_size;
        if target.geometry().virtual_size < size {
            // The disk has grown since it was based on this image. What is new there is hidden by zeroes until then.
            dispatch::grow_as(target.format(), &files.target.storage, size, next_id)?;
        }
        let notes = self.notes(&files.target.storage)?;
        let options = LayerOptions { next_content_id: Some(next_id), notes, ..LayerOptions::default() };
        let layer = dispatch::open_layer(target.format(), files.target.storage.clone(), &options)?;
        layer.begin_changes()?;
        let sides = MergeSides {
            target: on_parents(layer.clone(), &self.chain.layers()[self.levels + 1..])?,
            chain: self.on(layer)?,
        };
        // From here on the layer holds the file, and its lock.
        files.target.before = None;
        Ok(sides)
    }

    /// The target, for reading again. It may have been changed before the merge was refused: its log replayed, its disk made
    /// larger. So it is opened anew.
    fn target_again(&self) -> Result<Arc<dyn Image>, ImageError> {
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let storage = self.chain.files()[self.levels].clone();
        let format = self.chain.layers()[self.levels].format();
        let layer: Arc<dyn Image> = dispatch::open_layer(format, storage, &options)?;
        Ok(layer)
    }

    /// After a merge that was given up: the parent, which was closed, is read only from now on, and its child knows it by the
    /// id that it has now. The newest image was closed, and nothing uses the chain, which is that of [`MergeSides`]. Where
    /// the child cannot be told, it goes on naming both ids, one of which is the right one.
    ///
    /// # Errors
    /// What opening the newest image anew says.
    pub fn give_up(&self) -> Result<Arc<dyn Image>, ImageError> {
        let target = self.chain.layers()[self.levels].clone();
        if let Err(e) = self.relink_to(&target) {
            let child = self.paths[self.levels - 1].display();
            tracing::warn!("{child} goes on naming both ids of its parent: {e}");
        }
        let file = file_of(&target.files()[0]).map_err(LockError::Io);
        if file.and_then(|file| lock(file, Lock::Shared)).is_err() {
            // Nobody else can read it then as long as this chain is open.
            tracing::warn!("{} stays locked", self.paths[self.levels].display());
        }
        self.on(target)
    }

    fn relink_to(&self, target: &Arc<dyn Image>) -> Result<(), ImageError> {
        let child = if self.levels > 1 { Some(self.take(self.levels - 1)?) } else { None };
        let storage = child.as_ref().map_or(&self.chain.files()[0], |child| &child.storage);
        self.relink(storage, target.content_id().unwrap_or_default(), None)
    }

    /// Has the child of the target name these ids.
    fn relink(&self, child: &Arc<dyn Storage>, id: Uuid, next_id: Option<Uuid>) -> Result<(), ImageError> {
        let (path, parent) = (&self.paths[self.levels - 1], &self.paths[self.levels]);
        let link = link_to_parent(path, parent, id, next_id)?;
        dispatch::relink(self.chain.layers()[self.levels].format(), child, &link)
    }

    /// The chain on this target. Its newest image is opened anew: the link to its parent may have changed in it.
    fn on(&self, target: Arc<dyn Image>) -> Result<Arc<dyn Image>, ImageError> {
        let (layers, storage) = (self.chain.layers(), &self.chain.files()[0]);
        let options = LayerOptions { notes: self.notes(storage)?, ..LayerOptions::default() };
        let top = dispatch::open_layer(layers[0].format(), storage.clone(), &options)?;
        let mut parents = layers[1..self.levels].to_vec();
        parents.push(target);
        parents.extend_from_slice(&layers[self.levels + 1..]);
        on_parents(top, &parents)
    }

    fn notes(&self, storage: &Arc<dyn Storage>) -> Result<Option<NotesFile>, ImageError> {
        let Some(dir) = self.notes_dir else { return Ok(None) };
        let file =
            file_of(storage).and_then(FileId::of).map_err(|e| ImageError::io("the image's file", e))?;
        let notes = notes_dir::open(dir, file);
        notes.map(|notes| Some(notes.file)).map_err(|e| ImageError::new(e.kind, e.to_string()))
    }
}

fn file_of(storage: &Arc<dyn Storage>) -> std::io::Result<&File> {
    storage.file().ok_or_else(|| std::io::Error::other("there is no file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CreateOptions, Format, OpenOptions};

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_merge_is_given_up_also_when_somebody_reads_the_child_of_its_target() {
        for format in [Format::Vhdx, Format::Vhd] {
            let dir = std::env::temp_dir().join(format!("blockd-merge-{}", Uuid::new_v4()));
            std::fs::create_dir(&dir).expect("made");
            let paths: Vec<PathBuf> = (0..3).map(|n| dir.join(format!("{n}.{format}"))).collect();
            crate::create(&paths[2], &CreateOptions::new(format, 16 * MIB)).expect("created");
            let base = crate::open(&paths[2], &OpenOptions::default()).expect("opened");
            base.begin_changes().and_then(|()| base.close()).expect("begun and closed");
            drop(base);
            for n in [1, 0] {
                crate::create(&paths[n], &CreateOptions::on_parent(format, &paths[n + 1])).expect("created");
            }
            let options = OpenOptions { parents: paths[1..].to_vec(), ..OpenOptions::default() };
            let image = crate::open(&paths[0], &options).expect("opened");
            let chain = image.as_chain().expect("a chain");
            let merge = MergeChain { chain, paths: &paths, levels: 2, notes_dir: None };
            let files = merge.take_files().expect("taken");
            image.close().expect("closed");
            let sides = merge.open(files).expect("begun");
            drop(image);
            let reader = File::open(&paths[1]).expect("opened");
            lock(&reader, Lock::Shared).expect("locked");
            sides.chain.close().and_then(|()| sides.target.close()).expect("closed");
            let chain = sides.chain.as_chain().expect("a chain");
            let merge = MergeChain { chain, paths: &paths, levels: 2, notes_dir: None };
            let again = merge.give_up().expect("the disk goes on");
            again.begin_changes().and_then(|()| again.close()).expect("begun and closed");
            drop((again, sides, reader));
            crate::open(&paths[0], &options).expect("the chain is still one");
            std::fs::remove_dir_all(&dir).expect("removed");
        }
    }

    #[test]
    fn a_target_that_was_changed_before_a_merge_was_refused_is_known_as_it_is_now() {
        for format in [Format::Vhdx, Format::Vhd] {
            let dir = std::env::temp_dir().join(format!("blockd-merge-{}", Uuid::new_v4()));
            let notes = dir.join("notes");
            std::fs::create_dir(&dir).expect("made");
            let paths: Vec<PathBuf> = (0..3).map(|n| dir.join(format!("{n}.{format}"))).collect();
            crate::create(&paths[2], &CreateOptions::new(format, 16 * MIB)).expect("created");
            for n in [1, 0] {
                crate::create(&paths[n], &CreateOptions::on_parent(format, &paths[n + 1])).expect("created");
            }
            crate::resize(&paths[0], None, 32 * MIB, false).expect("grown");
            let options = OpenOptions { parents: paths[1..].to_vec(), ..OpenOptions::default() };
            let image = crate::open(&paths[0], &options).expect("opened");
            let chain = image.as_chain().expect("a chain");
            let merge = MergeChain { chain, paths: &paths, levels: 1, notes_dir: Some(&notes) };
            let files = merge.take_files().expect("taken");
            // The target's notes cannot be opened where a folder has their name.
            let target = file_of(&files.target.storage).and_then(FileId::of).expect("known");
            notes_dir::open(&notes, target).expect("opened");
            let there = std::fs::read_dir(&notes).expect("listed").next().expect("one").expect("read").path();
            std::fs::remove_file(&there).and_then(|()| std::fs::create_dir(&there)).expect("replaced");
            image.close().expect("closed");
            let refused = merge.open(files).expect_err("no notes");
            drop(image);
            let chain = refused.chain.expect("opened again");
            let target = &chain.as_chain().expect("a chain").layers()[1];
            assert_eq!(target.geometry().virtual_size, chain.geometry().virtual_size, "{format}");
            let alone = merge_target_alone(&paths);
            assert_eq!(target.content_id(), alone.content_id(), "{format}");
            std::fs::remove_dir_all(&dir).expect("removed");
        }
    }

    fn merge_target_alone(paths: &[PathBuf]) -> Arc<dyn Image> {
        let options = OpenOptions { parents: paths[2..].to_vec(), read_only: true, ..OpenOptions::default() };
        crate::open(&paths[1], &options).expect("opened")
    }
}

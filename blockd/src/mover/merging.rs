//! Folding the newest images of a chain into the one below them.
//!
//! ```text
//!   hold requests ─► the child names both ids of its parent ─► the parent is opened for writing ─► requests go on
//!   move from the chain to the parent: copy what the newest images have, mirror, verify, commit
//!   delete the newest images
//! ```
//!
//! A crash before the commit leaves the chain as the disk, on a parent that has some of what is hidden; the merge then
//! begins again and copies everything once more.

use std::path::PathBuf;
use std::sync::Arc;

use formats::{Chain, ErrorKind, ImageError, MergeChain, MergeRefused, MergeSides};

use super::MovePlan;
use super::layering::{Layering, Merge};
use crate::disk::exchange::{NotReopened, Serve};
use crate::disk::handle::ImageHandle;
use crate::disk::{Disk, DiskError};

/// The chain with a parent that can be written to, and that parent as an image of its own.
#[derive(Debug)]
pub(super) struct Merging {
    pub(super) source: Arc<ImageHandle>,
    pub(super) target: Arc<ImageHandle>,
}

fn told(e: &ImageError) -> DiskError {
    DiskError::new(e.kind, e.to_string())
}

/// Has the disk go on with the same chain, in which the parent that takes the newest images is open for writing. Holds
/// requests for as long as that takes.
///
/// # Errors
/// When the parent cannot be opened for writing, for one because somebody else has it open; the disk goes on as before.
pub(super) fn begin(disk: &Disk, plan: &MovePlan, merge: &Merge) -> Result<Merging, DiskError> {
    let image = disk.shared().route.load().source().clone();
    let paths = image.paths();
    let files = merge_chain(disk, &image, &paths, plan, merge)?.take_files().map_err(|e| told(&e))?;
    // What is durable already need not be made so while requests wait.
    image.image().commit().map_err(|e| told(&e))?;
    let mut made = None;
    disk.reopen_held(|old| {
        let chain = merge_chain(disk, old, &paths, plan, merge)?;
        old.image().close().map_err(|e| told(&e))?;
        let sides = chain.open(files);
        match sides {
            Ok(sides) => {
                let merging = Merging::of(old, &paths, merge, sides).map_err(lost)?;
                let source = merging.source.clone();
                made = Some(merging);
                Ok(source)
            }
            Err(MergeRefused { error, chain }) => {
                let again = chain.and_then(|chain| old.succeeded_by(chain).ok());
                Err(NotReopened { error: told(&error), serve: again.map_or(Serve::Nothing, Serve::Instead) })
            }
        }
    })?;
    Ok(made.expect("the disk was reopened"))
}

/// After a merge that was given up: the parent goes on as what it was, with another id, which the child takes note of.
///
/// # Errors
/// When the disk cannot go on with the chain; a restart of the daemon opens it again.
pub(super) fn give_up(disk: &Disk, plan: &MovePlan) -> Result<(), String> {
    let Layering::Merge(merge) = &plan.layering else { return Ok(()) };
    let given_up = disk.reopen_held(|old| {
        let paths = old.paths();
        let merge_chain = merge_chain(disk, old, &paths, plan, merge)?;
        let target = &merge_chain.chain.layers()[merge.levels()];
        old.image().close().and_then(|()| target.close()).map_err(|e| told(&e))?;
        let chain = merge_chain.give_up().map_err(|e| lost(told(&e)))?;
        old.succeeded_by(chain).map_err(lost)
    });
    given_up.map_err(|e| e.to_string())
}

fn lost(error: DiskError) -> NotReopened {
    NotReopened { error, serve: Serve::Nothing }
}

fn merge_chain<'a>(
    disk: &'a Disk,
    image: &'a ImageHandle,
    paths: &'a [PathBuf],
    plan: &MovePlan,
    merge: &Merge,
) -> Result<MergeChain<'a>, DiskError> {
    let levels = merge.levels();
    let long_enough = |chain: &&Chain| chain.layers().len() > levels;
    match image.image().as_chain().filter(long_enough) {
        Some(chain) if paths[levels] == plan.target => {
            Ok(MergeChain { chain, paths, levels, notes_dir: disk.notes_dir() })
        }
        _ => Err(DiskError::new(
            ErrorKind::InvalidParameter,
            format!("{} is no parent of the disk's image any more", plan.target.display()),
        )),
    }
}

impl Merging {
    fn of(old: &ImageHandle, paths: &[PathBuf], merge: &Merge, sides: MergeSides) -> Result<Self, DiskError> {
        let source = old.succeeded_by(sides.chain)?;
        let target = ImageHandle::new(sides.target, &paths[merge.levels()], &[&*source])?;
        Ok(Self { source, target: Arc::new(target) })
    }
}

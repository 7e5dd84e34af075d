//! What a move does with the images of a chain: one image of them all, one of each, or fewer of them.
//!
//! ```text
//!   Flat    top ─ parent ─ base   ──►  one image
//!   Chain   top ─ parent ─ base   ──►  top' ─ parent' ─ base'    (parents that stay are shared by both)
//!   Merge   top ─ parent ─ base   ──►        parent ─ base       (the parent takes what the top has)
//! ```
//!
//! The machine of the `mirror` crate sees one disk on two sides in each case. What differs is which extents there are to
//! copy, what of them is copied, and what files are made, renamed and deleted at the end.

use std::path::{Path, PathBuf};

use formats::ImageType;
use serde::{Deserialize, Serialize};

use super::MovePlan;

/// How the images of the disk's chain are dealt with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layering {
    /// The target is one image that holds all that the disk reads as. The only way for a disk of one image.
    #[default]
    Flat,
    /// Each image becomes one of its own. These are the parents, the nearest first.
    Chain(Vec<ParentMove>),
    /// The newest images are merged into the next one, which is the target under its own name.
    Merge(Merge),
}

/// What becomes of a parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentMove {
    /// Where it is.
    pub source: PathBuf,
    /// Where it goes; the same path where it stays, for other disks that have it as a parent.
    pub target: PathBuf,
    /// The new image's type; differencing but for the base.
    pub image_type: ImageType,
    /// The new image's block size in bytes; its format's own when absent.
    pub block_size: Option<u32>,
}

impl ParentMove {
    /// Whether it is left where it is.
    pub fn stays(&self) -> bool {
        self.source == self.target
    }
}

/// A merge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// The images between the source and the target, which are merged as well, the newest first.
    pub between: Vec<PathBuf>,
    /// The parents of the target, the nearest first.
    pub below: Vec<PathBuf>,
}

impl Merge {
    /// How many images are merged into the target.
    pub fn levels(&self) -> usize {
        self.between.len() + 1
    }
}

/// The name that a target has until it is finished: nobody mistakes it for a disk.
pub fn temporary(target: &Path, job: &str) -> PathBuf {
    let mut name = target.to_owned().into_os_string();
    name.push(format!(".incomplete-{job}"));
    name.into()
}

impl MovePlan {
    /// The target's name until it is finished. A merge's target exists already and keeps its name.
    pub fn temporary(&self) -> PathBuf {
        match self.layering {
            Layering::Merge(_) => self.target.clone(),
            Layering::Flat | Layering::Chain(_) => temporary(&self.target, &self.job),
        }
    }

    /// The files that the move makes, by their temporary and their final names, in the order in which they are to be
    /// renamed: a parent before its child.
    pub fn made_files(&self) -> Vec<(PathBuf, PathBuf)> {
        let parents = match &self.layering {
            Layering::Merge(_) => return Vec::new(),
            Layering::Flat => &[][..],
            Layering::Chain(parents) => parents,
        };
        let moved = parents.iter().rev().filter(|p| !p.stays()).map(|p| &p.target);
        moved.chain([&self.target]).map(|target| (temporary(target, &self.job), target.clone())).collect()
    }

    /// The files that are to be deleted when the target is the disk, the newest first.
    pub fn source_files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.source.clone()];
        match &self.layering {
            Layering::Flat => {}
            Layering::Chain(parents) => {
                files.extend(parents.iter().filter(|p| !p.stays()).map(|p| p.source.clone()));
            }
            Layering::Merge(merge) => files.extend(merge.between.iter().cloned()),
        }
        files
    }

    /// The files of the target, the newest first.
    pub fn target_files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.target.clone()];
        files.extend(self.target_parents());
        files
    }

    /// The parents of the target, the nearest first.
    pub fn target_parents(&self) -> Vec<PathBuf> {
        match &self.layering {
            Layering::Flat => Vec::new(),
            Layering::Chain(parents) => parents.iter().map(|p| p.target.clone()).collect(),
            Layering::Merge(merge) => merge.below.clone(),
        }
    }

    /// How many of the source's newest images are copied by themselves; `None` when all that the disk reads as is.
    pub fn own_levels(&self) -> Option<usize> {
        match &self.layering {
            Layering::Flat => None,
            Layering::Chain(_) => Some(1),
            Layering::Merge(merge) => Some(merge.levels()),
        }
    }
}

//! What an image says of itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::lock::is_held_exclusively;
use crate::open::{at, choose_format, incomplete_move, open_file};
use crate::parents::{Child, FileId, Gate};
use crate::raw::Raw;
use crate::vhd::{self, VhdInfo, VhdState};
use crate::vhdx::{self, VhdxInfo};
use crate::{FileStorage, Format, Image, ImageError, ImageType, LayerOptions, OpenError, Storage, dispatch};

/// Whether an image was closed in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// In order.
    Clean,
    /// It is in use, or its last user did not close it: the log holds changes, which opening it for writing applies.
    DirtyLog,
    /// A spare structure is damaged or lost; it can be read, and a check with repair mends it.
    NeedsRepair,
}

/// What `info` tells of an image. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The format.
    pub format: Format,
    /// Fixed, dynamic or differencing.
    #[serde(rename = "type")]
    pub image_type: ImageType,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Content that has a place in the file.
    pub allocated_bytes: u64,
    /// Length of the file.
    pub file_size: u64,
    /// What the file takes up on its file system: holes do not count.
    pub disk_usage: u64,
    /// Unit of allocation, 0 where there is none.
    pub block_size: u32,
    /// The guest's sectors.
    pub logical_sector_size: u32,
    /// What the guest should align to.
    pub physical_sector_size: u32,
    /// Ids as text, by name.
    pub ids: BTreeMap<String, String>,
    /// The software that made it, where the format says.
    pub creator: Option<String>,
    /// Whether it was closed in order.
    pub state: ImageState,
    /// Name and paths of a differencing image's parent, as the image has them. Never opened.
    pub parent_paths: Vec<String>,
    /// The parents that were found in what was named (see [`info_with_parents`]), the nearest first, and last the one that
    /// was not.
    #[serde(default)]
    pub parents: Vec<ParentInfo>,
    /// Whether somebody has it open for writing right now, so that the rest may be out of date.
    pub in_use: bool,
    /// The job whose unfinished target it is.
    pub incomplete_move: Option<String>,
}

/// One parent of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentInfo {
    /// Its path; `None` of one that was not found.
    pub path: Option<String>,
    /// Its id, by which its child knows it.
    pub id: Option<String>,
    /// Its type; `None` of one that was not found.
    #[serde(rename = "type")]
    pub image_type: Option<ImageType>,
    /// Size of its disk; `None` of one that was not found.
    pub virtual_size: Option<u64>,
    /// Whether it was found, is sound, and is the right one.
    pub found: bool,
    /// Why it was not found: what was tried, and what was wrong with that.
    pub reason: Option<String>,
}

/// [`info`], with the parents that are found in `parents`: folders and files, as in
/// [`OpenOptions::parents`](crate::OpenOptions::parents). That one is missing is told in the result, and no error.
///
/// # Errors
/// As [`info`].
pub fn info_with_parents(
    path: impl AsRef<Path>,
    format: Option<Format>,
    parents: &[PathBuf],
) -> Result<ImageInfo, OpenError> {
    let path = path.as_ref();
    let mut info = info(path, format)?;
    let mut gate = Gate::new(parents, false);
    if info.image_type == ImageType::Differencing && !parents.is_empty() {
        let file = open_file(path, true)?;
        let id = FileId::of(&file).map_err(|e| at(path, ImageError::io("looking at the file", e)))?;
        let options = LayerOptions { read_only: true, ..LayerOptions::default() };
        let image = dispatch::open_layer(info.format, Arc::new(FileStorage::new(file)), &options)
            .map_err(|e| at(path, e))?;
        let walk = gate.walk(Child { path, image: &*image, file: id });
        info.parents = walk
            .parents
            .iter()
            .map(|parent| ParentInfo {
                path: Some(parent.path.display().to_string()),
                id: Some(parent.content_id.to_string()),
                image_type: Some(parent.image.image_type()),
                virtual_size: Some(parent.image.geometry().virtual_size),
                found: true,
                reason: None,
            })
            .collect();
        info.parents.extend(walk.missing.map(|missing| ParentInfo {
            path: None,
            id: missing.id.map(|id| id.to_string()),
            image_type: None,
            virtual_size: None,
            found: false,
            reason: Some(missing.reason),
        }));
    }
    Ok(info)
}

/// Looks at the image at `path`, in the format said or that of its name (see [`crate::open()`]). Takes no lock,
/// and looks at images that are in use too.
///
/// # Errors
/// When the file cannot be opened or read, or is no sound image: a check then says more.
pub fn info(path: impl AsRef<Path>, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    let path = path.as_ref();
    let file = open_file(path, true)?;
    let format = choose_format(path, &file, format)?;
    let in_use = is_held_exclusively(&file);
    let facts = FileFacts::of(&file).map_err(|e| at(path, e))?;
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(file));
    let mut info = match format {
        Format::Raw => of_raw(storage, facts),
        Format::Vhd => vhd::inspect(&*storage).map(|vhd| of_vhd(vhd, facts)),
        Format::Vhdx => of_vhdx(storage, facts),
    }
    .map_err(|e| at(path, e))?;
    info.in_use = in_use;
    info.incomplete_move = incomplete_move(path);
    Ok(info)
}

#[derive(Debug, Clone, Copy)]
struct FileFacts {
    len: u64,
    usage: u64,
}

impl FileFacts {
    fn of(file: &File) -> Result<Self, ImageError> {
        let meta = file.metadata().map_err(|e| ImageError::io("cannot find out the size of the file", e))?;
        Ok(Self { len: meta.len(), usage: meta.blocks().saturating_mul(512) })
    }
}

fn of_raw(storage: Arc<dyn Storage>, file: FileFacts) -> Result<ImageInfo, ImageError> {
    let geometry = Raw::open(storage, true)?.geometry();
    Ok(ImageInfo {
        format: Format::Raw,
        image_type: ImageType::Fixed,
        virtual_size: geometry.virtual_size,
        allocated_bytes: file.usage.min(geometry.virtual_size),
        file_size: file.len,
        disk_usage: file.usage,
        block_size: 0,
        logical_sector_size: geometry.logical_sector_size,
        physical_sector_size: geometry.physical_sector_size,
        ids: BTreeMap::new(),
        creator: None,
        state: ImageState::Clean,
        parent_paths: Vec::new(),
        parents: Vec::new(),
        in_use: false,
        incomplete_move: None,
    })
}

fn of_vhd(vhd: VhdInfo, file: FileFacts) -> ImageInfo {
    let mut ids = BTreeMap::from([("unique_id".to_owned(), vhd.unique_id.to_string())]);
    if let Some(parent) = vhd.parent_id {
        ids.insert("parent_id".into(), parent.to_string());
    }
    ImageInfo {
        format: Format::Vhd,
        image_type: vhd.image_type,
        virtual_size: vhd.virtual_size,
        allocated_bytes: vhd.allocated_bytes,
        file_size: file.len,
        disk_usage: file.usage,
        block_size: vhd.block_size,
        logical_sector_size: 512,
        physical_sector_size: vhd.physical_sector_size,
        ids,
        creator: Some(vhd.creator),
        state: match vhd.state {
            VhdState::Clean => ImageState::Clean,
            VhdState::CopyDiffers | VhdState::FooterMissing => ImageState::NeedsRepair,
        },
        parent_paths: vhd.parent_paths,
        parents: Vec::new(),
        in_use: false,
        incomplete_move: None,
    }
}

fn of_vhdx(storage: Arc<dyn Storage>, file: FileFacts) -> Result<ImageInfo, ImageError> {
    let VhdxInfo { image_type, geometry, facts, parent_paths } = vhdx::inspect(&storage)?;
    let ids = [
        ("disk_id", facts.disk_id),
        ("file_write_guid", facts.file_write),
        ("data_write_guid", facts.data_write),
    ];
    Ok(ImageInfo {
        format: Format::Vhdx,
        image_type,
        virtual_size: geometry.virtual_size,
        allocated_bytes: facts.allocated_bytes,
        file_size: file.len,
        disk_usage: file.usage,
        block_size: geometry.block_size,
        logical_sector_size: geometry.logical_sector_size,
        physical_sector_size: geometry.physical_sector_size,
        ids: ids.into_iter().map(|(name, id)| (name.to_owned(), id.to_string())).collect(),
        creator: Some(facts.creator),
        state: if facts.was_dirty { ImageState::DirtyLog } else { ImageState::Clean },
        parent_paths,
        parents: Vec::new(),
        in_use: false,
        incomplete_move: None,
    })
}

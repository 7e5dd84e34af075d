//! Virtual Hard Disk, format 1.0: fixed, dynamic and differencing disks.
//!
//! ```text
//!   fixed          content ............................................ footer
//!   dynamic        footer's copy | header | block table | blocks ...... | (grown ahead) | footer
//!   differencing   (the same, and the parent's paths)     └ bitmap, data
//! ```
//!
//! **What decides.** The footer in the file's last 512 bytes says what the disk is: the file's first bytes are, on a fixed
//! disk, the guest's to write. The copy at 0 is used only when the end has no valid footer, only for dynamic disks, and
//! only for reading, unless the opener asks for recovery, which puts the footer back after everything was validated.
//! The disk's size is the footer's *current size*; the geometry field is not looked at.
//!
//! **Durability.** There is no journal, and none is needed: a block's place is one entry of four bytes, which a sector
//! write changes as a whole, and it points to space that was made, zeroed and synced before (see `grow`). So after a
//! power cut every sector that was not flushed holds its old content, zeroes of the new block included, or its new
//! content. The entry is handed to the kernel before the write that needs it is acknowledged, so it outlives the process.
//! Sectors of a differencing disk become its own with a bit more to it (see `differencing`).
//!
//! **Bitmaps** of dynamic disks are not looked at when reading, as everywhere in practice; blocks that are written get
//! bitmaps of ones, so that readers which do look find the same content.

mod batmap;
mod bytes;
mod check;
mod check_blocks;
mod check_header;
mod compact;
mod corruption;
mod create;
mod differencing;
mod dynamic;
mod footer;
mod grow;
mod header;
mod hide;
mod layout;
mod locator;
mod offline;
mod relink;
mod resize;
mod table;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::flat::Flat;
use crate::{
    ByteSpan, ErrorKind, Extent, Format, Geometry, Image, ImageError, ImageType, Layer, LayerOptions,
    ParentLink, Pieces, Storage, SyncToken, ZeroMode,
};

pub use check::check;
pub use compact::compact;
pub use corruption::Corruption;
pub use create::{CreateParams, create};
pub use hide::ParentIsZero;
pub use relink::relink;
pub use resize::{resize, resize_over};

use differencing::Differencing;
use dynamic::Dynamic;
use footer::{DiskType, FOOTER_LEN};
use grow::{Growth, SlotGrid, end_of_file};
use layout::{Body, CopyState, Found};

/// The unit of the format, in bytes: the guest's sectors and the grid of all structures.
const SECTOR: u64 = 512;
/// The largest virtual disk in bytes: 2040 GiB, the bound of Microsoft's own software.
pub const MAX_VIRTUAL_SIZE: u64 = 2040 << 30;
/// The largest block in bytes.
pub const MAX_BLOCK_SIZE: u32 = 256 << 20;
/// The most entries of a block table: enough for the largest disk with blocks of 512 KiB.
pub const MAX_TABLE_ENTRIES: u32 = 4 << 20;
/// The block size in bytes of a new dynamic disk that asks for none.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;

/// How far an image was found in order when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VhdState {
    /// The footer is where it should be, and so is its copy.
    Clean,
    /// The footer's copy at 0 is damaged or says something else; the footer counts, and writing mends the copy.
    CopyDiffers,
    /// Only the copy of the footer is left: to be read only, until it is opened with recovery or repaired.
    FooterMissing,
}

/// What a VHD says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhdInfo {
    /// Fixed, dynamic or differencing.
    pub image_type: ImageType,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Size that it was created with, in bytes.
    pub original_size: u64,
    /// Size of the file in bytes.
    pub file_size: u64,
    /// Unit of allocation in bytes, 0 for a fixed disk.
    pub block_size: u32,
    /// What the guest should align to, in bytes: 4096 where the layout of the file makes that worth it, else 512.
    pub physical_sector_size: u32,
    /// Bytes of content that have a place in the file.
    pub allocated_bytes: u64,
    /// The disk's own id.
    pub unique_id: uuid::Uuid,
    /// Name and version of the software that made it.
    pub creator: String,
    /// Whether a virtual machine was suspended with it.
    pub saved_state: bool,
    /// The state of its footers.
    pub state: VhdState,
    /// The parent's id, of a differencing disk.
    pub parent_id: Option<uuid::Uuid>,
    /// The parent's name and paths as the image has them, of a differencing disk.
    pub parent_paths: Vec<String>,
}

/// Reads and validates a VHD of any type, differencing included, and says what it is.
///
/// # Errors
/// [`ErrorKind::Corrupt`] with the broken rule; [`ErrorKind::Io`].
pub fn inspect(storage: &dyn Storage) -> Result<VhdInfo, ImageError> {
    let (found, virtual_size, body) = layout::read_all(storage)?;
    let mut info = VhdInfo {
        image_type: match found.disk_type {
            DiskType::Fixed => ImageType::Fixed,
            DiskType::Dynamic => ImageType::Dynamic,
            DiskType::Differencing => ImageType::Differencing,
        },
        virtual_size,
        original_size: found.footer.original_size(),
        file_size: found.file_len,
        block_size: 0,
        physical_sector_size: fixed_payload_align(virtual_size),
        allocated_bytes: virtual_size,
        unique_id: found.footer.unique_id(),
        creator: found.footer.creator_text(),
        saved_state: found.footer.saved_state(),
        state: state_of(&found),
        parent_id: None,
        parent_paths: Vec::new(),
    };
    if let Some(body) = body {
        let present = body.table.iter().filter(|&&e| e != layout::ABSENT).count() as u64;
        info.block_size = body.header.block_size;
        info.physical_sector_size = body.payload_align();
        info.allocated_bytes = present * body.shape.block_size;
        if found.disk_type == DiskType::Differencing {
            info.parent_id = Some(body.header.parent_id);
            info.parent_paths = body.parent_paths.into_iter().map(|path| path.text).collect();
            info.parent_paths.insert(0, body.header.parent_name);
            info.parent_paths.retain(|p| !p.is_empty());
        }
    }
    Ok(info)
}

/// Of a fixed disk: the footer follows the content, and shares its last page where the size is not a multiple of one.
fn fixed_payload_align(virtual_size: u64) -> u32 {
    if virtual_size.is_multiple_of(grow::PAGE) { grow::PAGE as u32 } else { SECTOR as u32 }
}

fn state_of(found: &Found) -> VhdState {
    match (found.at, found.copy) {
        (None, _) => VhdState::FooterMissing,
        (_, CopyState::Different | CopyState::Bad) => VhdState::CopyDiffers,
        (_, CopyState::None | CopyState::Same) => VhdState::Clean,
    }
}

#[derive(Debug)]
enum Kind {
    Fixed(Flat),
    Dynamic(Box<Dynamic>),
    Differencing(Box<Differencing>),
}

/// An open VHD.
#[derive(Debug)]
pub struct Vhd {
    kind: Kind,
    state: VhdState,
    unique_id: uuid::Uuid,
    link: Option<ParentLink>,
}

impl Vhd {
    /// Reads and validates `storage`, a disk without a parent. `recover` lets a disk whose footer is lost (a power cut while the file grew) be
    /// opened for writing: the footer is then rewritten from its copy, after all else was found sound. It should be the
    /// operator's word, or that of software which knows the disk to be a dynamic one: see the module's description.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with the broken rule, [`ErrorKind::NeedsRepair`] when only recovery would allow writing,
    /// [`ErrorKind::Parent`] for a differencing disk, [`ErrorKind::Unsupported`] for writing to a disk with which a
    /// virtual machine was suspended, [`ErrorKind::Io`].
    pub fn open(storage: Arc<dyn Storage>, read_only: bool, recover: bool) -> Result<Self, ImageError> {
        let options = LayerOptions { read_only, recover, ..LayerOptions::default() };
        Self::open_if(storage, &options, layout::refuse_differencing)
    }

    /// Reads and validates `storage`, a disk of any type, as a layer of a chain: see [`Vhd::open`] and [`crate::Chain`].
    /// What a VHD's children go by never changes, so [`LayerOptions::next_content_id`] is not used.
    ///
    /// # Errors
    /// Those of [`Vhd::open`], but for the refusal of differencing disks.
    pub fn open_layer(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self, ImageError> {
        Self::open_if(storage, options, |_| Ok(()))
    }

    fn open_if(
        storage: Arc<dyn Storage>,
        options: &LayerOptions,
        has_parent: impl FnOnce(&Body) -> Result<(), ImageError>,
    ) -> Result<Self, ImageError> {
        let (found, virtual_size, body) = layout::read_all(&*storage)?;
        let mut state = state_of(&found);
        let (unique_id, disk_type) = (found.footer.unique_id(), found.disk_type);
        refuse_suspended(&found, options)?;
        let Some(body) = body else {
            let flat = Flat::new(storage, virtual_size, SECTOR as u32, options.read_only);
            return Ok(Self { kind: Kind::Fixed(flat), state, unique_id, link: None });
        };
        let differencing = disk_type == DiskType::Differencing;
        if differencing {
            has_parent(&body)?;
        }
        let growth = if options.read_only {
            None
        } else {
            let used_end = layout::first_free(&*storage, &body, found.limit())?;
            let growth = writable(&*storage, found, &body, used_end, options.recover)?;
            state = if state == VhdState::FooterMissing { VhdState::Clean } else { state };
            Some((growth, used_end))
        };
        let blocks = Dynamic::new(storage, &body, growth);
        if !differencing {
            return Ok(Self { kind: Kind::Dynamic(Box::new(blocks)), state, unique_id, link: None });
        }
        let link = Some(locator::link_of(&body.header, &body.parent_paths));
        let disk = Differencing::new(blocks, options.notes.clone(), unique_id)?;
        Ok(Self { kind: Kind::Differencing(Box::new(disk)), state, unique_id, link })
    }

    /// The state of the footers when the image was opened, after recovery.
    pub fn state(&self) -> VhdState {
        self.state
    }

    /// Bytes of content that have a place in the file.
    pub fn allocated_bytes(&self) -> u64 {
        match &self.kind {
            Kind::Fixed(flat) => flat.virtual_size(),
            Kind::Dynamic(d) => d.allocated_bytes(),
            Kind::Differencing(d) => d.blocks().allocated_bytes(),
        }
    }
}

fn refuse_suspended(found: &Found, options: &LayerOptions) -> Result<(), ImageError> {
    if found.footer.saved_state() && !options.read_only {
        return Err(ImageError::new(
            ErrorKind::Unsupported,
            "footer: the saved-state byte says that a virtual machine was suspended with this disk, which writes \
             would corrupt; resume or discard it with the software that did so, or open the disk for reading",
        ));
    }
    Ok(())
}

/// Readies a dynamic or differencing disk for writing: puts a lost footer back if that is allowed.
fn writable(
    storage: &dyn Storage,
    found: Found,
    body: &Body,
    used_end: u64,
    recover: bool,
) -> Result<Growth, ImageError> {
    let grid = SlotGrid::new(body.shape, found.disk_type);
    let (footer_at, file_len, moved) = match found.at {
        Some(at) => (at, found.file_len, false),
        None if recover => {
            let (at, len) = put_footer_back(storage, &found, used_end)?;
            (at, len, true)
        }
        None => {
            return Err(ImageError::new(
                ErrorKind::NeedsRepair,
                "the footer at the file's end is missing and only its copy at 0 is valid, as after a power cut while \
                 the file grew; repair the image, open it with recovery, or open it for reading",
            ));
        }
    };
    let copy_stale = matches!(found.copy, CopyState::Different | CopyState::Bad);
    let mut growth = Growth::new(grid, found.footer, footer_at, file_len, used_end, copy_stale);
    growth.moved = moved;
    Ok(growth)
}

/// Writes the footer from its copy at 0 at the end of the file, durably. Returns its offset and the file's size.
fn put_footer_back(storage: &dyn Storage, found: &Found, used_end: u64) -> Result<(u64, u64), ImageError> {
    let len = end_of_file(used_end).max(found.file_len.next_multiple_of(grow::PAGE));
    let at = len - FOOTER_LEN;
    tracing::warn!(at, "VHD: the footer was missing and is put back from its copy");
    storage
        .write_at(found.footer.bytes(), at)
        .map_err(|e| ImageError::io(format!("putting the footer back at {at}"), e))?;
    grow::sync(storage)?;
    Ok((at, len))
}

impl Image for Vhd {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn image_type(&self) -> ImageType {
        match &self.kind {
            Kind::Fixed(_) => ImageType::Fixed,
            Kind::Dynamic(_) => ImageType::Dynamic,
            Kind::Differencing(_) => ImageType::Differencing,
        }
    }

    fn geometry(&self) -> Geometry {
        let of_blocks =
            |d: &Dynamic| (d.shape().virtual_size, d.shape().block_size as u32, d.payload_align());
        let (virtual_size, block_size, payload_align) = match &self.kind {
            Kind::Fixed(flat) => (flat.virtual_size(), 0, fixed_payload_align(flat.virtual_size())),
            Kind::Dynamic(d) => of_blocks(d),
            Kind::Differencing(d) => of_blocks(d.blocks()),
        };
        Geometry {
            virtual_size,
            logical_sector_size: SECTOR as u32,
            physical_sector_size: payload_align,
            block_size,
            payload_align,
        }
    }

    fn is_read_only(&self) -> bool {
        match &self.kind {
            Kind::Fixed(flat) => flat.is_read_only(),
            Kind::Dynamic(d) => d.is_read_only(),
            Kind::Differencing(d) => d.blocks().is_read_only(),
        }
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        match &self.kind {
            Kind::Fixed(flat) => flat.files(),
            Kind::Dynamic(d) => d.files(),
            Kind::Differencing(d) => d.files(),
        }
    }

    fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.map_read(at, out),
            Kind::Dynamic(d) => d.map_read(at, out),
            Kind::Differencing(d) => d.map_read(at, out),
        }
    }

    fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.map_write(at, out),
            Kind::Dynamic(d) => d.map_write(at, out),
            Kind::Differencing(d) => d.map_write(at, out),
        }
    }

    fn map_zero(&self, at: ByteSpan, mode: ZeroMode, out: &mut Pieces) -> Result<(), ImageError> {
        self.map_zero_over(at, mode, &|_| Ok(false), out)
    }

    fn wrote(&self, at: ByteSpan) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(_) | Kind::Dynamic(_) => Ok(()),
            Kind::Differencing(d) => d.wrote(at),
        }
    }

    fn sync_begin(&self) -> SyncToken {
        match &self.kind {
            // Metadata is in the file before a mapping call returns: any sync covers all of it.
            Kind::Fixed(_) | Kind::Dynamic(_) => SyncToken::default(),
            Kind::Differencing(d) => d.sync_begin(),
        }
    }

    fn sync_done(&self, token: SyncToken) -> Result<Option<SyncToken>, ImageError> {
        match &self.kind {
            Kind::Fixed(_) | Kind::Dynamic(_) => Ok(None),
            Kind::Differencing(d) => d.sync_done(token),
        }
    }

    fn sync_failed(&self, why: &str) {
        match &self.kind {
            Kind::Fixed(_) => {}
            Kind::Dynamic(d) => d.sync_failed(why),
            Kind::Differencing(d) => d.sync_failed(why),
        }
    }

    fn wants_maintenance(&self) -> bool {
        match &self.kind {
            Kind::Fixed(_) => false,
            Kind::Dynamic(d) => d.wants_maintenance(),
            Kind::Differencing(d) => d.wants_maintenance(),
        }
    }

    fn maintain(&self, _quiesce: &dyn Fn()) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(_) => Ok(()),
            Kind::Dynamic(d) => d.maintain(),
            Kind::Differencing(d) => d.maintain(),
        }
    }

    fn commit(&self) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.sync(),
            Kind::Dynamic(d) => d.commit(),
            Kind::Differencing(d) => d.commit(),
        }
    }

    fn close(&self) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.sync(),
            Kind::Dynamic(d) => d.close(),
            Kind::Differencing(d) => d.close(),
        }
    }

    fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.next_extent(offset),
            Kind::Dynamic(d) => d.next_extent(offset),
            Kind::Differencing(d) => d.next_extent(offset),
        }
    }

    fn content_id(&self) -> Option<uuid::Uuid> {
        Some(self.unique_id)
    }

    fn parent_link(&self) -> Option<&ParentLink> {
        self.link.as_ref()
    }

    fn begin_changes(&self) -> Result<(), ImageError> {
        Ok(())
    }
}

impl Layer for Vhd {
    fn map_zero_over(
        &self,
        at: ByteSpan,
        _mode: ZeroMode,
        below: &dyn Fn(ByteSpan) -> Result<bool, ImageError>,
        out: &mut Pieces,
    ) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Fixed(flat) => flat.map_write(at, out),
            Kind::Dynamic(d) => d.map_zero(at, out),
            Kind::Differencing(d) => d.map_zero_over(at, below, out),
        }
    }
}

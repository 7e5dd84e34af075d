//! VHDX (MS-VHDX): fixed, dynamic and differencing images with sectors of 512 and 4096 bytes.
//!
//! ```text
//!   parse ─► headers, log replayed (over the file, or into it), regions, metadata, BAT: all validated
//!   bat.rs     the map, read without a lock; bat_pages.rs: what of it is in memory
//!   space.rs   which MiB of the file are taken
//!   session.rs changes: log entries, checkpoints, reclaiming space
//!   layer.rs   differencing: which sectors are the image's own; bitmap.rs: how the file says it
//!   offline.rs an image that nobody uses, changed by one log entry at a time: resize.rs, compact.rs, relink.rs
//!   check.rs   every rule with its code, and what is mended; audit.rs: what is merely unusual or wasteful
//! ```
//!
//! Section numbers in this module are those of MS-VHDX v6.0.

mod audit;
mod bat;
mod bat_pages;
mod bitmap;
mod check;
mod compact;
mod corruption;
mod create;
mod guid;
mod header;
mod layer;
mod le;
mod locator;
mod log_entry;
mod log_scan;
mod log_writer;
mod metadata;
mod offline;
mod overlay;
mod parse;
mod region;
mod relink;
mod resize;
mod session;
mod space;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::own::{OwnSectors, PAGES_MAX};
use crate::{
    AllocState, ByteSpan, ErrorKind, Extent, FileIndex, Format, Geometry, Image, ImageError, ImageType,
    LayerOptions, ParentLink, Piece, Pieces, Place, Storage, SyncToken, ZeroMode,
};

pub use check::check;
pub use compact::compact;
pub use corruption::Corruption;
pub use create::{CreateParams, create};
pub use guid::Guid;
pub use relink::relink;
pub use resize::{ParentIsZero, grow_as, resize, resize_over};

use bat::{Bat, TABLE_PAGES_MAX, state};
use bitmap::Bitmaps;
use layer::Differences;
use metadata::Metadata;
use parse::{Parsed, parse};
use session::{Inner, SessionIds};

/// Everything is placed on multiples of this.
const MIB: u64 = 1 << 20;
/// The largest disk.
const MAX_VIRTUAL_SIZE: u64 = 64 << 40;
/// What comes before the first region.
const HEADER_SECTION: u64 = MIB;
/// The longest file: 256 TiB. Its space is a bitmap of one bit for each MiB, which must not exceed 32 MiB whatever a
/// hostile log or a sparse file claims.
const MAX_FILE_SIZE: u64 = 256 << 40;
/// A run of one state that goes on for longer is told in parts, of so many blocks (or pages of the BAT that hold nothing) at
/// the most: a guest's discard asks what its parents have, and must not wait for all of them to be looked through.
const EXTENT_LOOKS_MAX: u32 = 64;

/// An open VHDX.
#[derive(Debug)]
pub struct Vhdx {
    files: Vec<Arc<dyn Storage>>,
    /// What lies behind this byte of the file reads as zeroes: a power cut has lost an extension of the file that the log,
    /// which is replayed in memory, knows of. Else all of it is there.
    payload_end: u64,
    storage: Arc<dyn Storage>,
    read_only: bool,
    metadata: Metadata,
    facts: Facts,
    bat: Bat,
    /// What a differencing image has more.
    diff: Option<Differences>,
    inner: Mutex<Inner>,
    /// Held for a whole checkpoint; taken before `inner`.
    checkpointing: Mutex<()>,
    /// Whether a session of changes has begun.
    started: AtomicBool,
    /// Counts log entries and extensions of the file.
    events: AtomicU64,
    /// The last of them that is known to be durable.
    durable: AtomicU64,
    wants_maintenance: AtomicBool,
    poisoned: OnceLock<String>,
}

/// What an image says of itself, as it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The id of the virtual disk.
    pub disk_id: Guid,
    /// Changes with each session of changes to the file.
    pub file_write: Guid,
    /// Changes with each session of changes to the content.
    pub data_write: Guid,
    /// The current header's number.
    pub header_sequence: u64,
    /// Whether the log had to be replayed.
    pub was_dirty: bool,
    /// Who made it.
    pub creator: String,
    /// Payload blocks that have a place, in bytes.
    pub allocated_bytes: u64,
    /// Bytes of the log.
    pub log_bytes: u32,
}

impl Facts {
    fn of(storage: &Arc<dyn Storage>, parsed: &Parsed, was_dirty: bool) -> Result<Self, ImageError> {
        let Parsed { headers, metadata, census, .. } = parsed;
        Ok(Self {
            disk_id: metadata.disk_id,
            file_write: headers.current.file_write,
            data_write: headers.current.data_write,
            header_sequence: headers.current.sequence,
            was_dirty,
            creator: header::read_creator(&**storage)?,
            allocated_bytes: census.allocated * u64::from(metadata.block_size),
            log_bytes: headers.current.log_len,
        })
    }
}

/// What can be told of an image without opening it, differencing ones included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhdxInfo {
    /// Fixed, dynamic or differencing.
    pub image_type: ImageType,
    /// Sizes.
    pub geometry: Geometry,
    /// What the image says of itself.
    pub facts: Facts,
    /// Where the parent is said to be, as the image has it.
    pub parent_paths: Vec<String>,
}

fn type_of(metadata: &Metadata) -> ImageType {
    match metadata {
        Metadata { has_parent: true, .. } => ImageType::Differencing,
        Metadata { leave_allocated: true, .. } => ImageType::Fixed,
        _ => ImageType::Dynamic,
    }
}

fn geometry_of(metadata: &Metadata) -> Geometry {
    Geometry {
        virtual_size: metadata.virtual_size,
        logical_sector_size: metadata.logical_sector,
        physical_sector_size: metadata.physical_sector,
        block_size: metadata.block_size,
        // Blocks and regions lie on MiB.
        payload_align: MIB as u32,
    }
}

/// Looks at an image without opening it. Writes nothing.
///
/// # Errors
/// [`ErrorKind::WrongFormat`], [`ErrorKind::Corrupt`] with the rule that is broken, what the file says.
pub fn inspect(storage: &Arc<dyn Storage>) -> Result<VhdxInfo, ImageError> {
    let parsed = strict(storage)?;
    let facts = Facts::of(storage, &parsed, parsed.overlay.is_some())?;
    let paths = parsed.locator.iter().flat_map(|l| &l.paths).map(|(_, path)| path.clone());
    Ok(VhdxInfo {
        image_type: type_of(&parsed.metadata),
        geometry: geometry_of(&parsed.metadata),
        facts,
        parent_paths: paths.collect(),
    })
}

fn strict(storage: &Arc<dyn Storage>) -> Result<Parsed, ImageError> {
    Ok(parse(storage)?)
}

/// Replays the log into the file, under this FileWriteGuid, and leaves it without one (2.3.3).
fn replay_as(file_write: Guid, storage: &Arc<dyn Storage>, mut parsed: Parsed) -> Result<(), ImageError> {
    if parsed.overlay.is_none() {
        return Ok(());
    }
    apply_log(file_write, storage, &mut parsed)?;
    leave_log(storage, parsed)
}

/// The first half of a replay: everything that the log has is durable in its place, and the log is still there.
fn apply_log(file_write: Guid, storage: &Arc<dyn Storage>, parsed: &mut Parsed) -> Result<(), ImageError> {
    // Before the file is changed in any way (2.2.2, FileWriteGuid).
    parsed.headers.update(&**storage, |h| h.file_write = file_write)?;
    parsed.overlay.as_ref().map_or(Ok(()), |overlay| overlay.apply(&**storage))
}

/// The second half: the file has no log.
fn leave_log(storage: &Arc<dyn Storage>, mut parsed: Parsed) -> Result<(), ImageError> {
    parsed.headers.update_both(&**storage, |h| h.log_guid = Guid::ZERO)?;
    Ok(())
}

impl Vhdx {
    /// Opens an image that needs no parent. For writing, a log that was left is replayed into the file first; for reading,
    /// over it.
    ///
    /// # Errors
    /// [`ErrorKind::WrongFormat`]; [`ErrorKind::Corrupt`] with the rule that is broken; [`ErrorKind::Parent`] for a
    /// differencing image; what the file says.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self, ImageError> {
        let parsed = strict(&storage)?;
        if parsed.metadata.has_parent {
            return Err(parent_needed(&parsed));
        }
        let options = LayerOptions { read_only, ..LayerOptions::default() };
        Self::open_parsed(storage, parsed, &options, TABLE_PAGES_MAX)
    }

    /// Opens an image of any type by itself; of a differencing one this is the layer that [`crate::Chain`] puts on its
    /// parents. Its notes (see [`LayerOptions::notes`]) are bound to the FileWriteGuid: where a killed process has left some
    /// for the session that the file is in, that session goes on under its id until the image is closed.
    ///
    /// # Errors
    /// As [`Self::open`] (but for [`ErrorKind::Parent`]), and what the notes file says.
    pub fn open_layer(storage: Arc<dyn Storage>, options: &LayerOptions) -> Result<Self, ImageError> {
        Self::open_bounded(storage, options, TABLE_PAGES_MAX)
    }

    /// As [`Self::open_layer`], with at most `table_pages` pages (1 to 65536) of 4 KiB of the block allocation table in memory,
    /// instead of 8192, and besides them those with changes that only the log has.
    ///
    /// # Errors
    /// As [`Self::open_layer`].
    ///
    /// # Panics
    /// With a number of pages out of range.
    pub fn open_bounded(
        storage: Arc<dyn Storage>,
        options: &LayerOptions,
        table_pages: usize,
    ) -> Result<Self, ImageError> {
        let parsed = strict(&storage)?;
        Self::open_parsed(storage, parsed, options, table_pages)
    }

    fn open_parsed(
        storage: Arc<dyn Storage>,
        mut parsed: Parsed,
        options: &LayerOptions,
        table_pages: usize,
    ) -> Result<Self, ImageError> {
        let was_dirty = parsed.overlay.is_some();
        let (own, ids) = own_sectors(&parsed, options)?;
        if !options.read_only {
            parsed.headers.current.validate_for_writing()?;
            if was_dirty {
                apply_log(ids.file_write, &storage, &mut parsed)?;
                if let Some(own) = own.as_ref().filter(|own| own.has_pending()) {
                    // The log is what says that notes may count on this file. Without it nobody who changes the closed
                    // file would know.
                    layer::bring_home(&storage, &parsed, &own.recovered())?;
                }
                leave_log(&storage, parsed)?;
                // The log may have changed anything: all of it is read again as it is now.
                parsed = strict(&storage)?;
            }
        }
        let reaches_payload = parsed.log_reaches_payload();
        let payload = if reaches_payload { parsed.view.clone() } else { storage.clone() };
        let facts = Facts::of(&storage, &parsed, was_dirty)?;
        let payload_end = parsed.payload_end()?;
        let Parsed { headers, metadata, table, census, space, view, locator, .. } = parsed;
        let file_len = storage.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
        let diff = own.zip(locator).map(|(own, locator)| Differences {
            own,
            bitmaps: Bitmaps::new(view.clone(), &metadata),
            link: locator.link(),
        });
        let image = Self {
            files: vec![payload],
            payload_end: if reaches_payload { u64::MAX } else { payload_end },
            bat: Bat::new(view, table, &census, table_pages),
            diff,
            storage,
            read_only: options.read_only,
            metadata,
            facts,
            inner: Mutex::new(Inner::new(headers, space, file_len, ids)),
            checkpointing: Mutex::default(),
            started: AtomicBool::new(false),
            events: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            wants_maintenance: AtomicBool::new(false),
            poisoned: OnceLock::new(),
        };
        if let Some(diff) = image.diff.as_ref().filter(|_| !options.read_only) {
            image.drop_stale_notes(diff)?;
        }
        Ok(image)
    }

    /// What the image said of itself when it was opened.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    fn block_size(&self) -> u64 {
        u64::from(self.metadata.block_size)
    }

    fn check_span(&self, at: ByteSpan) -> Result<(), ImageError> {
        let sector = u64::from(self.metadata.logical_sector);
        let inside = at.end().is_some_and(|end| end <= self.metadata.virtual_size);
        if inside && at.offset.is_multiple_of(sector) && at.len.is_multiple_of(sector) {
            return Ok(());
        }
        Err(ImageError::new(
            ErrorKind::OutOfRange,
            format!(
                "{} bytes at {}: not within the disk's {} bytes on sectors of {sector}",
                at.len, at.offset, self.metadata.virtual_size
            ),
        ))
    }

    /// Calls `each` with every block that the span touches: its number, the offset in it, and the length there.
    fn for_each_block(
        &self,
        at: ByteSpan,
        mut each: impl FnMut(u64, u64, u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let block_size = self.block_size();
        let (mut offset, end) = (at.offset, at.offset + at.len);
        while offset < end {
            let (block, within) = (offset / block_size, offset % block_size);
            let len = (block_size - within).min(end - offset);
            each(block, within, len)?;
            offset += len;
        }
        Ok(())
    }

    /// Whether a part of the file holds data, and for how long that goes on, at most `len` (above 0).
    fn state_in_file(&self, start: u64, len: u64) -> Result<(u64, AllocState), ImageError> {
        let data = self.files[0].next_data(start).map_err(|e| ImageError::io("looking for holes", e))?;
        Ok(match data.filter(|(from, _)| *from < start + len) {
            None => (len, AllocState::Zero),
            Some((from, to)) if from <= start => (to.min(start + len) - start, AllocState::Data),
            Some((from, _)) => (from - start, AllocState::Zero),
        })
    }

    /// Appends a part of the file that is to be read.
    fn push_payload(&self, offset: u64, len: u64, out: &mut Pieces) {
        let there = self.payload_end.saturating_sub(offset).min(len);
        out.push(Piece { len: there, place: Place::File { file: FileIndex::TOP, offset } });
        out.push(Piece { len: len - there, place: Place::Zero });
    }

    fn block_place(&self, block: u64) -> Result<Option<u64>, ImageError> {
        Ok(self.bat.block(block)?.data_offset())
    }

    /// Bytes of a block that belong to the disk.
    fn block_len(&self, block: u64) -> u64 {
        (self.metadata.virtual_size - block * self.block_size()).min(self.block_size())
    }

    /// The run of one state that begins at `offset`, within one block (or a run of absent pages).
    fn extent_at(&self, offset: u64) -> Result<(u64, AllocState), ImageError> {
        let (block, within) = (offset / self.block_size(), offset % self.block_size());
        let left = self.block_len(block) - within;
        loop {
            let entry = self.bat.block(block)?;
            let Some(place) = entry.data_offset() else {
                let run = self.bat.absent_run(block);
                if run > 1 {
                    let end = ((block + run) * self.block_size()).min(self.metadata.virtual_size);
                    return Ok((end - offset, AllocState::Absent));
                }
                let zero = match &self.diff {
                    Some(_) => entry.state() != state::NOT_PRESENT,
                    None => entry.state() == state::ZERO,
                };
                return Ok((left, if zero { AllocState::Zero } else { AllocState::Absent }));
            };
            match &self.diff {
                Some(diff) if entry.state() == state::PARTIALLY_PRESENT => {
                    if let Some(found) = self.extent_in_partial(diff, (block, entry), offset)? {
                        return Ok(found);
                    }
                }
                _ => return self.state_in_file(place + within, left),
            }
        }
    }
}

/// The own sectors of a differencing image, and the ids that a session of changes is to get.
fn own_sectors(
    parsed: &Parsed,
    options: &LayerOptions,
) -> Result<(Option<OwnSectors>, SessionIds), ImageError> {
    let data_write = options.next_content_id.map(|id| Guid(id.to_bytes_le()));
    let mut ids = SessionIds { file_write: Guid::random(), data_write };
    if !parsed.metadata.has_parent {
        return Ok((None, ids));
    }
    let sectors = parsed.metadata.virtual_size / u64::from(parsed.metadata.logical_sector);
    let open =
        |id: Guid| OwnSectors::new(sectors, PAGES_MAX, options.notes.clone().map(|notes| (notes, id.0)));
    let left = open(parsed.headers.current.file_write)?;
    if options.read_only {
        return Ok((Some(left), ids));
    }
    if left.has_pending() {
        // Notes have to name the file's session at any moment, so this is the same one that was interrupted.
        ids.file_write = parsed.headers.current.file_write;
        return Ok((Some(left), ids));
    }
    Ok((Some(open(ids.file_write)?), ids))
}

fn parent_needed(parsed: &Parsed) -> ImageError {
    let paths = parsed.locator.iter().flat_map(|l| &l.paths).map(|(key, path)| format!("{key} {path:?}"));
    let paths = paths.collect::<Vec<_>>().join(", ");
    ImageError::new(
        ErrorKind::Parent,
        format!("a differencing image, which can't be read without its parent (the image names {paths})"),
    )
}

/// Rounds a run of bytes inward to whole sectors; holes of the file need not lie on the disk's.
fn on_sectors(offset: u64, len: u64, sector: u64) -> u64 {
    (offset + len) / sector * sector - offset
}

impl Image for Vhdx {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn image_type(&self) -> ImageType {
        type_of(&self.metadata)
    }

    fn geometry(&self) -> Geometry {
        geometry_of(&self.metadata)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn map_read(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.check_span(at)?;
        if let Some(diff) = &self.diff {
            return self
                .for_each_block(at, |block, within, len| self.read_block(diff, (block, within, len), out));
        }
        self.for_each_block(at, |block, within, len| {
            match self.block_place(block)? {
                Some(offset) => self.push_payload(offset + within, len, out),
                None => out.push(Piece { len, place: Place::Zero }),
            }
            Ok(())
        })
    }

    fn map_write(&self, at: ByteSpan, out: &mut Pieces) -> Result<(), ImageError> {
        self.check_span(at)?;
        self.check_writable()?;
        if at.len == 0 {
            return Ok(());
        }
        self.begin_session()?;
        let blocks = at.offset / self.block_size()..=(at.offset + at.len - 1) / self.block_size();
        let mut absent = false;
        for block in blocks.clone() {
            absent |= self.block_place(block)?.is_none();
        }
        if absent {
            self.allocate(blocks)?;
        }
        self.for_each_block(at, |block, within, len| {
            // A discard of another thread may have taken it away again; then the two overlap, and either order will do.
            let offset = match self.block_place(block)? {
                Some(offset) => offset,
                None => {
                    self.allocate(block..=block)?;
                    self.block_place(block)?.ok_or_else(|| {
                        ImageError::new(
                            ErrorKind::Io,
                            "a block was discarded again and again while it was written",
                        )
                    })?
                }
            };
            out.push(Piece { len, place: Place::File { file: FileIndex::TOP, offset: offset + within } });
            Ok(())
        })
    }

    fn map_zero(&self, at: ByteSpan, mode: ZeroMode, out: &mut Pieces) -> Result<(), ImageError> {
        self.zero(at, mode, &|_| Ok(false), out)
    }

    fn wrote(&self, at: ByteSpan) -> Result<(), ImageError> {
        let Some(diff) = &self.diff else { return Ok(()) };
        self.check_span(at)?;
        self.for_each_block(at, |block, within, len| self.wrote_in(diff, (block, within, len)))
    }

    fn sync_begin(&self) -> SyncToken {
        match &self.diff {
            Some(diff) => self.begin_sync(diff),
            None => SyncToken(self.events.load(Ordering::Acquire)),
        }
    }

    fn sync_done(&self, token: SyncToken) -> Result<Option<SyncToken>, ImageError> {
        if let Some(diff) = &self.diff {
            return self.end_sync(diff, token);
        }
        self.note_synced(token);
        Ok(None)
    }

    fn sync_failed(&self, why: &str) {
        self.poison(&ImageError::new(ErrorKind::Io, format!("syncing the image: {why}")));
    }

    fn wants_maintenance(&self) -> bool {
        self.wants_maintenance.load(Ordering::Relaxed)
    }

    fn maintain(&self, quiesce: &dyn Fn()) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.look_after(quiesce)
    }

    fn commit(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.check_writable()?;
        self.sync_and_record()
    }

    fn close(&self) -> Result<(), ImageError> {
        if self.read_only {
            return Ok(());
        }
        self.check_writable()?;
        self.end_session()
    }

    fn next_extent(&self, offset: u64) -> Result<Option<Extent>, ImageError> {
        let size = self.metadata.virtual_size;
        if offset >= size {
            return Ok(None);
        }
        let sector = u64::from(self.metadata.logical_sector);
        let (mut len, state) = self.extent_at(offset)?;
        let mut looks = 1;
        while offset + len < size && looks < EXTENT_LOOKS_MAX {
            looks += 1;
            let (more, next) = self.extent_at(offset + len)?;
            if next != state {
                break;
            }
            len += more;
        }
        if state != AllocState::Data && offset + len < size {
            // Rounded so that what is data is never told as zero.
            len = on_sectors(offset, len, sector);
        } else if state == AllocState::Data {
            len = (offset + len).next_multiple_of(sector).min(size) - offset;
        }
        if len == 0 {
            return Ok(Some(Extent {
                span: ByteSpan::new(offset, sector.min(size - offset)),
                state: AllocState::Data,
            }));
        }
        Ok(Some(Extent { span: ByteSpan::new(offset, len), state }))
    }

    fn content_id(&self) -> Option<uuid::Uuid> {
        Some(uuid::Uuid::from_bytes_le(self.inner().headers.current.data_write.0))
    }

    fn parent_link(&self) -> Option<&ParentLink> {
        self.diff.as_ref().map(|diff| &diff.link)
    }

    fn begin_changes(&self) -> Result<(), ImageError> {
        self.begin_session()
    }
}

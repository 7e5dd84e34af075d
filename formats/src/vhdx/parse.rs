//! Everything that is read and validated before an image is used.

use std::sync::Arc;

use super::bat::{Census, Table};
use super::corruption::{Corruption, Stop};
use super::header::{Header, Headers, read_headers};
use super::locator::ParentLocator;
use super::metadata::{BlockLayout, Metadata, read_metadata};
use super::overlay::Overlay;
use super::region::{Regions, TABLE_OFFSETS, TABLE_SIZE, read_regions};
use super::space::Space;
use super::{MAX_FILE_SIZE, MIB};
use crate::{ImageError, Storage};

/// What to do about a broken rule of the BAT: go on, or stop.
pub(super) type OnIssue<'a> = &'a mut dyn FnMut(Corruption) -> Result<(), Stop>;

/// A file whose structures were all validated.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) headers: Headers,
    pub(super) regions: Regions,
    pub(super) metadata: Metadata,
    pub(super) locator: Option<ParentLocator>,
    pub(super) table: Table,
    pub(super) census: Census,
    pub(super) space: Space,
    /// The replayed log, where there was one.
    pub(super) overlay: Option<Arc<Overlay>>,
    /// Where metadata is to be read from: the overlay or the file.
    pub(super) view: Arc<dyn Storage>,
}

/// Reads and validates everything, through the log if there is one. Writes nothing.
pub(super) fn parse(storage: &Arc<dyn Storage>, issue: OnIssue<'_>) -> Result<Parsed, Stop> {
    let headers = read_headers(&**storage)?;
    let overlay = if headers.current.log_guid.is_zero() {
        None
    } else {
        Some(Arc::new(Overlay::replay(storage.clone(), &headers.current)?))
    };
    let view: Arc<dyn Storage> = match &overlay {
        Some(overlay) => overlay.clone(),
        None => storage.clone(),
    };
    let file_len = view.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
    assert!(file_len <= MAX_FILE_SIZE.next_multiple_of(MIB), "checked with the headers and with the log");
    let regions = read_regions(&*view)?;
    let mut space = reserve(&headers.current, &regions, file_len)?;
    let metadata = read_metadata(&*view, regions.metadata)?;
    let layout = BlockLayout::new(&metadata);
    space.set_block(layout.units_per_block());
    let table = Table::new(regions.bat, layout, metadata.has_parent, file_len);
    let locator = match &metadata.locator {
        Some(item) if metadata.has_parent => Some(ParentLocator::decode(item)?),
        _ => None,
    };
    let census = table.validate(&*view, &mut space, issue)?;
    Ok(Parsed { headers, regions, metadata, locator, table, census, space, overlay, view })
}

/// Marks what is not a block.
fn reserve(header: &Header, regions: &Regions, file_len: u64) -> Result<Space, Corruption> {
    let mut space = Space::new(file_len.div_ceil(MIB));
    let _ = space.mark(0, 1);
    let log = (header.log_len != 0).then_some(("the log", header.log_offset, header.log_len));
    let regions = regions.all().map(|(what, region)| (what, region.offset, region.len));
    for (what, offset, len) in log.into_iter().chain(regions) {
        let len = u64::from(len);
        if !space.mark(offset / MIB, len / MIB) {
            return Err(Corruption::Overlap { what: what.into(), offset, len });
        }
    }
    Ok(space)
}

impl Parsed {
    /// Whether the log changes what is not metadata, or extends the file: then payload too has to be read through it.
    pub(super) fn log_reaches_payload(&self) -> bool {
        let Some(overlay) = &self.overlay else { return false };
        let tables = (TABLE_OFFSETS[0], TABLE_OFFSETS[1] + TABLE_SIZE as u64);
        let regions = self.regions.all().map(|(_, r)| (r.offset, r.offset + u64::from(r.len)));
        let bitmaps = self.census.bitmaps.iter().map(|unit| (unit * MIB, (unit + 1) * MIB));
        let mut metadata: Vec<(u64, u64)> = std::iter::once(tables).chain(regions).chain(bitmaps).collect();
        metadata.sort_unstable();
        overlay.extends() || overlay.touches_outside(&metadata)
    }
}

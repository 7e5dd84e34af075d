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

/// As much of a file as could be made sense of.
#[derive(Debug, Default)]
pub(super) struct Examined {
    pub(super) headers: Option<Headers>,
    pub(super) overlay: Option<Arc<Overlay>>,
    pub(super) view: Option<Arc<dyn Storage>>,
    pub(super) regions: Option<Regions>,
    pub(super) metadata: Option<Metadata>,
    pub(super) locator: Option<ParentLocator>,
    pub(super) table: Option<Table>,
    pub(super) census: Option<Census>,
    pub(super) space: Option<Space>,
}

/// Reads and validates everything, through the log if there is one. Writes nothing. What is wrong goes to `issue`, which
/// may stop the reading; else it goes on where that makes sense, and `found` holds what it has come to.
pub(super) fn examine(
    storage: &Arc<dyn Storage>,
    found: &mut Examined,
    issue: OnIssue<'_>,
) -> Result<(), Stop> {
    let mut log_is_known = true;
    let headers = read_headers(&**storage, &mut |corruption| {
        log_is_known = false;
        issue(corruption)
    })?;
    let Some(headers) = headers else { return Ok(()) };
    let current = headers.current;
    found.headers = Some(headers);
    if log_is_known && !current.log_guid.is_zero() {
        match Overlay::replay(storage.clone(), &current) {
            Ok(overlay) => found.overlay = Some(Arc::new(overlay)),
            Err(Stop::Corrupt(corruption)) => issue(corruption)?,
            Err(other) => return Err(other),
        }
    }
    let view: Arc<dyn Storage> = match &found.overlay {
        Some(overlay) => overlay.clone(),
        None => storage.clone(),
    };
    found.view = Some(view.clone());
    let file_len = view.len().map_err(|e| ImageError::io("reading the size of the file", e))?;
    assert!(file_len <= MAX_FILE_SIZE.next_multiple_of(MIB), "checked with the headers and with the log");
    let Some(regions) = read_regions(&*view, issue)? else { return Ok(()) };
    let mut space = reserve(&current, &regions, file_len, issue)?;
    let (bat, region) = (regions.bat, regions.metadata);
    found.regions = Some(regions);
    let Some(metadata) = read_metadata(&*view, region, issue)? else { return Ok(()) };
    let layout = BlockLayout::new(&metadata);
    space.set_block(layout.units_per_block());
    if let Some(item) = metadata.locator.as_ref().filter(|_| metadata.has_parent) {
        match ParentLocator::decode(item) {
            Ok(locator) => found.locator = Some(locator),
            Err(corruption) => issue(corruption)?,
        }
    }
    let table = Table::new(bat, layout, metadata.has_parent, file_len);
    found.metadata = Some(metadata);
    found.census = table.validate(&*view, &mut space, issue)?;
    (found.table, found.space) = (Some(table), Some(space));
    Ok(())
}

/// Reads and validates everything, through the log if there is one. Writes nothing.
///
/// # Errors
/// The first rule that is broken; what the file says.
pub(super) fn parse(storage: &Arc<dyn Storage>) -> Result<Parsed, Stop> {
    let mut found = Examined::default();
    examine(storage, &mut found, &mut |corruption| Err(corruption.into()))?;
    Ok(found.into_parsed().expect("what is missing has stopped the reading"))
}

impl Examined {
    /// All of it, if nothing is missing.
    pub(super) fn into_parsed(self) -> Option<Parsed> {
        Some(Parsed {
            headers: self.headers?,
            regions: self.regions?,
            metadata: self.metadata?,
            locator: self.locator,
            table: self.table?,
            census: self.census?,
            space: self.space?,
            overlay: self.overlay,
            view: self.view?,
        })
    }
}

/// Marks what is not a block.
fn reserve(header: &Header, regions: &Regions, file_len: u64, issue: OnIssue<'_>) -> Result<Space, Stop> {
    let units = file_len.div_ceil(MIB);
    let mut space = Space::new(units);
    let _ = space.mark(0, 1);
    let log = (header.log_len != 0).then_some(("the log", header.log_offset, header.log_len));
    let regions = regions.all().map(|(what, region)| (what, region.offset, region.len));
    for (what, offset, len) in log.into_iter().chain(regions) {
        let len = u64::from(len);
        let (first, count) = (offset / MIB, len / MIB);
        // Of what lies beyond the end that was said already.
        if first.saturating_add(count) <= units && !space.mark(first, count) {
            issue(Corruption::Overlap { what: what.into(), offset, len })?;
        }
    }
    Ok(space)
}

impl Parsed {
    /// Whether the log changes what is not metadata: then payload too has to be read through it. So it has where the log
    /// extends a file that does not end on a sector.
    pub(super) fn log_reaches_payload(&self) -> bool {
        let Some(overlay) = &self.overlay else { return false };
        let tables = (TABLE_OFFSETS[0], TABLE_OFFSETS[1] + TABLE_SIZE as u64);
        let regions = self.regions.all().map(|(_, r)| (r.offset, r.offset + u64::from(r.len)));
        let bitmaps = self.census.bitmaps.iter().map(|unit| (unit * MIB, (unit + 1) * MIB));
        let mut metadata: Vec<(u64, u64)> = std::iter::once(tables).chain(regions).chain(bitmaps).collect();
        metadata.sort_unstable();
        overlay.touches_outside(&metadata) || overlay.extends_within_sector()
    }

    /// Where the payload that is in the file ends, if replaying the log would extend the file by zeroes.
    pub(super) fn payload_end(&self) -> Result<u64, ImageError> {
        match &self.overlay {
            Some(overlay) => overlay.inner_len(),
            None => Ok(u64::MAX),
        }
    }
}

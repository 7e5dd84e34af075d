//! What is unusual, wasteful, or wrong with a spare copy, of an image whose structures can be read: see [`super::check()`].

use super::MIB;
use super::bat::{BatEntry, Table, state};
use super::check::{LOG_DIRTY, finding, mended_by, of_corruption, without_stale_place};
use super::compact::gaps_with_data;
use super::corruption::Stop;
use super::header::{HEADER_OFFSETS, HEADER_SIZE, Header, Headers};
use super::le::{u16_at, u32_at, u64_at};
use super::log_scan::LogReader;
use super::metadata::{
    BlockLayout, EntryOwner, FILE_PARAMETERS, Metadata, entries_of, read_table, usual_flags,
};
use super::offline::{first_data, for_each_data, read};
use super::parse::{Examined, Parsed};
use super::region::{Regions, TABLE_OFFSETS, read_tables};
use super::space::Space;
use crate::{Finding, ImageError, Severity, Storage};

/// So many findings of one kind are told one by one.
const EACH_MAX: usize = 100;

/// Adds what is to be said besides broken rules.
pub(super) fn audit(
    storage: &dyn Storage,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let Some(headers) = &found.headers else { return Ok(()) };
    look_at_headers(storage, headers, found, out)?;
    look_at_log(storage, headers, found, out)?;
    let (Some(view), Some(regions)) = (&found.view, &found.regions) else { return Ok(()) };
    look_at_regions(&**view, regions, found, out)?;
    let Some(metadata) = &found.metadata else { return Ok(()) };
    look_at_metadata(&**view, regions, metadata, found, out)?;
    if found.census.is_none() || !out.iter().all(|f| f.severity < Severity::Damage) {
        return Ok(());
    }
    let (Some(table), Some(space)) = (&found.table, &found.space) else { return Ok(()) };
    look_at_table(&**view, table, found, out)?;
    if metadata.has_parent {
        look_at_bitmaps(&**view, table, metadata, out)?;
    }
    look_at_space(storage, table, space, found.overlay.is_some(), out)
}

fn note(code: &str, structure: &str, offset: u64, message: String) -> Finding {
    finding(code, structure, Some(offset), Severity::Note, message)
}

// --- headers and log -------------------------------------------------------------------------------------------------

fn look_at_headers(
    storage: &dyn Storage,
    headers: &Headers,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let (spare_number, number) = (2 - headers.slot, headers.slot + 1);
    let rewrite = format!("rewrites header {spare_number} from header {number}");
    if let Some(corruption) = &headers.spare {
        out.push(mended_by(of_corruption(corruption, Severity::Warning, found), &rewrite));
    }
    for (slot, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        let mut raw = vec![0; HEADER_SIZE];
        read(storage, &mut raw, offset)?;
        let Ok(header) = Header::decode(&raw) else { continue };
        if raw[80..].iter().any(|b| *b != 0) {
            let message = format!("header {}: reserved bytes are not 0 (2.2.2)", slot + 1);
            out.push(note("vhdx-header-reserved", "header", offset, message));
        }
        let same = Header { sequence: headers.current.sequence, ..header } == headers.current;
        if slot != headers.slot && !same {
            let message = format!(
                "header {spare_number} has number {:#x} and is out of date: header {number} with {:#x} says something else, \
                 so that the one could not stand in for the other (2.2.2.1)",
                header.sequence, headers.current.sequence
            );
            out.push(mended_by(note("vhdx-header-stale", "header", offset, message), &rewrite));
        }
    }
    let current = &headers.current;
    if let Err(corruption) = current.validate_for_writing() {
        out.push(of_corruption(&corruption, Severity::Warning, found));
    }
    if current.log_guid.is_zero() && current.log_version != 0 {
        let message = format!(
            "header LogVersion is {}; it has to be 0, and the log is empty (2.2.2)",
            current.log_version
        );
        let version = note("vhdx-log-version", "header", HEADER_OFFSETS[headers.slot], message);
        out.push(mended_by(version, "sets LogVersion to 0"));
    }
    Ok(())
}

fn look_at_log(
    storage: &dyn Storage,
    headers: &Headers,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let Some(overlay) = &found.overlay else { return Ok(()) };
    let offset = headers.current.log_offset;
    let message =
        "the image was not closed: its log holds changes, which are replayed when it is opened (2.3.3)";
    let dirty = note(LOG_DIRTY, "log", offset, message.into());
    out.push(mended_by(dirty, "replays the log into the file"));
    let active = LogReader::new(storage, &headers.current).active_sequence().map_err(ImageError::from)?;
    let head = active.head();
    if !head.flushed.is_multiple_of(MIB) || !head.last.is_multiple_of(MIB) {
        let message = format!(
            "log entry {}: FlushedFileOffset is {:#x} and LastFileOffset {:#x}; both are multiples of 1 MiB (2.3.1.1)",
            head.sequence, head.flushed, head.last
        );
        out.push(note("vhdx-log-file-offsets", "log", offset, message));
    }
    let Some(regions) = &found.regions else { return Ok(()) };
    let differing = found.metadata.as_ref().is_some_and(|m| m.has_parent);
    let tables = (TABLE_OFFSETS[0], TABLE_OFFSETS[1] + super::region::TABLE_SIZE as u64);
    let mut metadata: Vec<(u64, u64)> = vec![tables];
    metadata.extend(regions.all().map(|(_, r)| (r.offset, r.offset + u64::from(r.len))));
    metadata.sort_unstable();
    if !differing && overlay.touches_outside(&metadata) {
        let message = "the log changes what is not metadata (2.3)";
        out.push(note("vhdx-log-payload", "log", offset, message.into()));
    }
    Ok(())
}

// --- regions and metadata --------------------------------------------------------------------------------------------

fn look_at_regions(
    view: &dyn Storage,
    regions: &Regions,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let tables = read_tables(view)?;
    if let Some(corruption) = &regions.spare {
        let repair = match &tables {
            [Err(_), _] => "copies region table 2 to region table 1",
            _ => "copies region table 1 to region table 2",
        };
        out.push(mended_by(of_corruption(corruption, Severity::Warning, found), repair));
    }
    let valid = tables.iter().zip(TABLE_OFFSETS).find_map(|(table, at)| Some((table.as_ref().ok()?, at)));
    let Some((table, offset)) = valid else { return Ok(()) };
    let entry = |index: u64| &table[16 + index as usize * 32..48 + index as usize * 32];
    let required = |index: u64| u32_at(entry(index), 28);
    let count = u64::from(u32_at(table, 8));
    if u32_at(table, 12) != 0 || (0..count).any(|index| required(index) > 1) {
        let message = "the region table has reserved fields that are not 0 (2.2.3)";
        out.push(note("vhdx-region-reserved", "region table", offset, message.into()));
    }
    for index in (0..count).filter(|index| required(*index) & 1 == 0) {
        let guid = super::guid::Guid(super::le::bytes_at(entry(index), 0));
        if [regions.bat.guid, regions.metadata.guid].contains(&guid) {
            let message =
                format!("region {guid} is not marked as required; other software may refuse that (2.2.3.2)");
            out.push(note("vhdx-region-not-required", "region table", offset + 16 + index * 32, message));
        }
    }
    Ok(())
}

fn look_at_metadata(
    view: &dyn Storage,
    regions: &Regions,
    metadata: &Metadata,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let region = regions.metadata;
    let table = read_table(view, region)?;
    let used = 32 + usize::from(u16_at(&table, 10)) * 32;
    let reserved_header = u16_at(&table, 8) != 0 || table[12..32].iter().any(|b| *b != 0);
    let reserved_entries = table.get(32..used).unwrap_or(&[]).chunks_exact(32).any(|entry| {
        // 29 bits and the two that follow; the specification counts them in two fields.
        u32_at(entry, 24) >> 3 != 0 || u32_at(entry, 28) != 0
    });
    if reserved_header || reserved_entries {
        let message = "the metadata table has reserved fields that are not 0 (2.6.1)";
        out.push(note("vhdx-metadata-reserved", "metadata", region.offset, message.into()));
    }
    for (index, item) in entries_of(&table).enumerate() {
        if let Some(usual) = usual_flags(&item).filter(|usual| *usual != item.flags & 7) {
            let message = format!(
                "metadata item {}: its flags are {:#x}, and those of its kind are {usual:#x} (2.6.2)",
                item.id,
                item.flags & 7
            );
            let at = region.offset + 32 + index as u64 * 32;
            out.push(note("vhdx-metadata-flags", "metadata", at, message));
        }
    }
    if let Some(item) = entries_of(&table).find(|item| item.id == FILE_PARAMETERS && !item.is_user()) {
        let (at, mut flags) = (region.offset + u64::from(item.offset) + 4, [0; 4]);
        read(view, &mut flags, at)?;
        let flags = u32_at(&flags, 0);
        if flags >> 2 != 0 {
            let message = format!("File Parameters: reserved bits are set ({flags:#x}) (2.6.2.1)");
            out.push(note("vhdx-metadata-reserved", "metadata", at, message));
        }
    }
    if metadata.locator.is_some() && !metadata.has_parent {
        let message = "there is a parent locator, but File Parameters says that there is no parent (2.6.2.6)";
        out.push(note("vhdx-parent-locator-unused", "metadata", region.offset, message.into()));
    }
    if let Some(linkage) = found.locator.as_ref().and_then(|l| l.linkage2) {
        let message = format!("parent_linkage2 is {linkage}: a merge is, or was, under way (2.6.2.6.3)");
        out.push(note("vhdx-parent-linkage2", "parent locator", region.offset, message));
    }
    Ok(())
}

// --- the table -------------------------------------------------------------------------------------------------------

/// Says what was found of one kind: the first ones one by one, and how many there are.
struct Several {
    told: usize,
    more: u64,
}

impl Several {
    fn new() -> Self {
        Self { told: 0, more: 0 }
    }

    fn push(&mut self, out: &mut Vec<Finding>, finding: impl FnOnce() -> Finding) {
        if self.told == EACH_MAX {
            self.more += 1;
        } else {
            self.told += 1;
            out.push(finding());
        }
    }

    fn end(self, out: &mut Vec<Finding>, repairable: bool) {
        if self.more == 0 {
            return;
        }
        let Some(last) = out.last().cloned() else { return };
        let message = format!("{} more like the last one", self.more);
        let more = finding("vhdx-findings-left-out", &last.structure, None, Severity::Note, message);
        out.push(if repairable { mended_by(more, "does the same with them") } else { more });
    }
}

/// What blocks with data and other structures take, without the old places of blocks that have none; and the units of the
/// file.
pub(super) fn placed(storage: &dyn Storage, parsed: &Parsed) -> Result<(Space, u64), ImageError> {
    let regions = parsed.regions.all().map(|(_, r)| (r.offset, r.len));
    let log = (parsed.headers.current.log_offset, parsed.headers.current.log_len);
    placed_by(storage, &parsed.table, regions.chain([log]))
}

fn placed_by(
    view: &dyn Storage,
    table: &Table,
    others: impl Iterator<Item = (u64, u32)>,
) -> Result<(Space, u64), ImageError> {
    let file_units = table.file_len.div_ceil(MIB);
    let mut space = Space::new(file_units);
    // What a broken image places behind its end takes no space of the file; the map must not grow to wherever it says.
    let mark = |space: &mut Space, start: u64, units: u64| {
        let units = units.min(file_units.saturating_sub(start));
        if units > 0 {
            let _ = space.mark(start, units);
        }
    };
    mark(&mut space, 0, 1);
    for (offset, len) in others {
        mark(&mut space, offset / MIB, u64::from(len) / MIB);
    }
    let layout = table.layout;
    table.stream(view, |index, entry| {
        let units = match layout.owner_of(index) {
            Some(EntryOwner::Payload(_)) => layout.units_per_block(),
            Some(EntryOwner::Bitmap(_)) => 1,
            None => return Ok(()),
        };
        if matches!(entry.state(), state::FULLY_PRESENT | state::PARTIALLY_PRESENT) {
            mark(&mut space, entry.unit(), units);
        }
        Ok(())
    })?;
    Ok((space, file_units))
}

fn look_at_table(
    view: &dyn Storage,
    table: &Table,
    found: &Examined,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let layout = table.layout;
    let regions = found.regions.as_ref().into_iter().flat_map(|r| r.all());
    let log = found.headers.as_ref().map(|h| (h.current.log_offset, h.current.log_len));
    let others = regions.map(|(_, r)| (r.offset, r.len)).chain(log);
    let (mut blocks, file_units) = placed_by(view, table, others)?;
    let (mut stale, mut anchors, mut padding, mut placed) = (Several::new(), 0_u64, None, 0_u64);
    table.stream(view, |index, entry| {
        let owner = layout.owner_of(index);
        let at = table.region.offset + index * 8;
        placed +=
            u64::from(matches!(owner, Some(EntryOwner::Payload(_))) && entry.state() == state::FULLY_PRESENT);
        if owner.is_none() {
            padding.get_or_insert(at);
        }
        let mended = without_stale_place(owner, entry, layout.units_per_block(), file_units, &mut blocks);
        if mended != entry {
            stale.push(out, || stale_entry(index, at, entry, mended));
        } else if matches!(entry.state(), state::UNDEFINED | state::UNMAPPED) && entry.unit() != 0 {
            anchors += 1;
        }
        Ok(())
    })?;
    stale.end(out, true);
    if anchors > 0 {
        let message = format!(
            "{anchors} blocks without data keep their old places, where nothing else is put; compacting the image gives them \
             back (2.5.1.1)"
        );
        out.push(note("vhdx-bat-anchor", "BAT", table.region.offset, message));
    }
    let end = table.region.offset + layout.entries * 8;
    let behind = first_data(view, end, table.region.offset + u64::from(table.region.len))?;
    if let Some(at) = padding.or(behind) {
        let message = "behind the last entry the BAT region is not 0; it is not looked at (2.5)";
        out.push(note("vhdx-bat-padding", "BAT", at, message.into()));
    }
    if found.metadata.as_ref().is_some_and(|m| m.leave_allocated && !m.has_parent) && placed < layout.blocks {
        let message = format!(
            "{} of the {} blocks of this fixed image have no place yet; they read as zeroes, and the file grows when they \
             are written (2.6.2.1)",
            layout.blocks - placed,
            layout.blocks
        );
        out.push(note("vhdx-fixed-unallocated", "BAT", table.region.offset, message));
    }
    Ok(())
}

fn stale_entry(index: u64, at: u64, entry: BatEntry, mended: BatEntry) -> Finding {
    let raw = entry.0;
    let (code, severity, why) = match entry.state() {
        state::ZERO => (
            "vhdx-bat-stale",
            Severity::Warning,
            "names a place though its block is zeroes, which Hyper-V refuses",
        ),
        state::UNDEFINED | state::UNMAPPED => (
            "vhdx-bat-anchor-place",
            Severity::Warning,
            "names an old place that lies beyond the end of the file or is another structure's",
        ),
        _ => ("vhdx-bat-stale", Severity::Note, "names a place though its block has no data"),
    };
    let message = format!("BAT entry {index} at {at:#x} ({raw:#018x}) {why} (2.5.1.1)");
    mended_by(finding(code, "BAT", Some(at), severity, message), format!("sets the entry to {:#x}", mended.0))
}

// --- sector bitmaps --------------------------------------------------------------------------------------------------

/// How many blocks there are of a kind, and where the entry of the first one is.
#[derive(Default)]
struct Count {
    blocks: u64,
    first: Option<(u64, u64)>,
}

impl Count {
    fn add(&mut self, block: u64, at: u64) {
        self.blocks += 1;
        self.first.get_or_insert((block, at));
    }

    fn tell(&self, code: &str, what: &str, out: &mut Vec<Finding>) {
        if let Some((block, at)) = self.first {
            let message = format!("{} {what}, the first is block {block}", self.blocks);
            out.push(note(code, "sector bitmap", at, message));
        }
    }
}

#[derive(Default)]
struct BitmapCounts {
    empty: Count,
    full: Count,
    stray: Count,
    unused: Count,
}

fn look_at_bitmaps(
    view: &dyn Storage,
    table: &Table,
    metadata: &Metadata,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let layout = table.layout;
    let mut counts = BitmapCounts::default();
    let mut chunk_entries: Vec<(u64, BatEntry)> = Vec::new();
    table.stream(view, |index, entry| {
        match layout.owner_of(index) {
            Some(EntryOwner::Payload(block)) => {
                let chunk = block / layout.chunk_ratio;
                if chunk_entries.first().is_some_and(|(first, _)| first / layout.chunk_ratio != chunk) {
                    chunk_entries.clear();
                }
                chunk_entries.push((block, entry));
            }
            Some(EntryOwner::Bitmap(chunk)) if entry.state() == state::FULLY_PRESENT => {
                chunk_entries.retain(|(block, _)| block / layout.chunk_ratio == chunk);
                let bitmap = read_bitmap(view, entry.unit() * MIB)?;
                count_chunk(table, metadata, chunk, &bitmap, &chunk_entries, &mut counts);
            }
            _ => {}
        }
        Ok::<(), Stop>(())
    })?;
    counts.empty.tell("vhdx-partial-empty", "partially present blocks have no sector (2.5.1.1)", out);
    counts.full.tell("vhdx-partial-full", "partially present blocks have all their sectors (2.5.1.1)", out);
    let stray = "blocks have bits in their sector bitmap though they are not partially present, or behind the disk's end (2.4)";
    counts.stray.tell("vhdx-bitmap-stray", stray, out);
    counts.unused.tell(
        "vhdx-bitmap-unused",
        "sector bitmap blocks are not looked at by any block (2.5.1.2)",
        out,
    );
    Ok(())
}

/// A sector bitmap block.
fn read_bitmap(view: &dyn Storage, at: u64) -> Result<Vec<u8>, ImageError> {
    let mut bitmap = vec![0; MIB as usize];
    for_each_data(view, at, at + MIB, |start, len| {
        let from = (start - at) as usize;
        read(view, &mut bitmap[from..from + len as usize], start)?;
        Ok(true)
    })?;
    Ok(bitmap)
}

fn count_chunk(
    table: &Table,
    metadata: &Metadata,
    chunk: u64,
    bitmap: &[u8],
    entries: &[(u64, BatEntry)],
    counts: &mut BitmapCounts,
) {
    let layout: BlockLayout = table.layout;
    let sectors = layout.block_size / u64::from(metadata.logical_sector);
    let mut states = entries.iter().peekable();
    let first = chunk * layout.chunk_ratio;
    let mut looked_at = false;
    for (block, bits) in (first..).zip(bitmap.chunks_exact((sectors / 8) as usize)) {
        let entry = states.next_if(|(b, _)| *b == block).map_or(BatEntry(0), |(_, entry)| *entry);
        let last = block + 1 == layout.blocks;
        let inside = match block < layout.blocks {
            false => 0,
            true if last => layout.last_block_len / u64::from(metadata.logical_sector),
            true => sectors,
        };
        let at = table.region.offset + layout.index_of(block) * 8;
        let (own, beyond) = count_bits(bits, inside);
        if entry.state() == state::PARTIALLY_PRESENT {
            looked_at = true;
            match own {
                0 => counts.empty.add(block, at),
                own if own == inside => counts.full.add(block, at),
                _ => {}
            }
        }
        let ignored = !matches!(entry.state(), state::PARTIALLY_PRESENT | state::FULLY_PRESENT);
        if beyond > 0 || (own > 0 && ignored) {
            counts.stray.add(block, at);
        }
    }
    if !looked_at {
        counts.unused.add(first, table.region.offset + ((chunk + 1) * (layout.chunk_ratio + 1) - 1) * 8);
    }
}

/// The bits that are set below `inside`, and from there on.
fn count_bits(bits: &[u8], inside: u64) -> (u64, u64) {
    let ones = |bytes: &[u8]| -> u64 {
        let words = bytes.chunks_exact(8);
        let rest: u64 = words.remainder().iter().map(|b| u64::from(b.count_ones())).sum();
        words.map(|w| u64::from(u64_at(w, 0).count_ones())).sum::<u64>() + rest
    };
    let (whole, rest) = bits.split_at((inside / 8) as usize);
    let split = rest.first().map_or((0, 0), |byte| {
        let mask = (1_u16 << (inside % 8)) as u8;
        let mask = mask.wrapping_sub(1);
        (u64::from((byte & mask).count_ones()), u64::from((byte & !mask).count_ones()))
    });
    (ones(whole) + split.0, split.1 + ones(rest.get(1..).unwrap_or(&[])))
}

// --- space -----------------------------------------------------------------------------------------------------------

fn look_at_space(
    storage: &dyn Storage,
    table: &Table,
    space: &Space,
    dirty: bool,
    out: &mut Vec<Finding>,
) -> Result<(), ImageError> {
    let leaked = gaps_with_data(storage, space)?;
    let leaked_bytes: u64 = leaked.iter().map(|(_, len)| len).sum();
    if let Some((first, _)) = leaked.first() {
        let message = format!(
            "{leaked_bytes} bytes in {} places between structures hold data that belongs to nothing, the first at {first:#x}; \
             a crash or other software has left them (2.1)",
            leaked.len()
        );
        let leak = finding("vhdx-space-leaked", "file", Some(*first), Severity::Warning, message);
        out.push(mended_by(leak, "makes holes of them"));
    }
    let unused = space.unused() * MIB - leaked_bytes;
    if unused > 0 {
        let message = format!("{unused} bytes between structures are not used, and hold nothing (2.1)");
        out.push(finding("vhdx-space-unused", "file", None, Severity::Note, message));
    }
    let end = space.end() * MIB;
    if table.file_len > end {
        let holds = first_data(storage, end, table.file_len)?.is_some();
        let severity = if holds && !dirty { Severity::Warning } else { Severity::Note };
        let message = format!(
            "{} bytes behind the last structure are not used{} (2.1)",
            table.file_len - end,
            if holds { ", and hold data" } else { "" }
        );
        let slack = finding("vhdx-space-slack", "file", Some(end), severity, message);
        out.push(mended_by(slack, format!("cuts the file at {end:#x}")));
    }
    Ok(())
}

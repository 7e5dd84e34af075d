//! Checking an image against the specification, and mending what needs no guessing.
//!
//! [`examine`] finds what keeps an image from being used; it goes on behind what it finds where that
//! makes sense, so that one broken rule does not hide the next. What is merely unusual, wasteful or a spare copy is looked
//! for here and in `audit`. Every finding has one of these codes:
//!
//! | code | section | what | `--repair` |
//! |---|---|---|---|
//! | `vhdx-file-too-short`, `-too-large` | 2.2 | the file cannot be a VHDX | |
//! | `vhdx-no-valid-header`, `vhdx-headers-ambiguous` | 2.2.2 | there is no current header | |
//! | `vhdx-header` | 2.2.2 | the spare header is torn (warning) | written anew |
//! | `vhdx-header-stale` | 2.2.2.1 | the spare header is older in more than its number (note) | written anew |
//! | `vhdx-header-reserved` | 2.2.2 | reserved bytes are not 0 (note) | |
//! | `vhdx-header-sequence-exhausted` | 2.2.2.1 | can only be read (warning) | |
//! | `vhdx-version`, `vhdx-log-version` | 2.2.2 | unknown versions; of a log that is empty: a note | log version set to 0 |
//! | `vhdx-log-length`, `vhdx-log-offset` | 2.2.2 | the log's place; no log at all: a warning | |
//! | `vhdx-beyond-end` | 2.1 | a structure beyond the end of the file | |
//! | `vhdx-overlap` | 2.1, 2.2.3.2 | structures share space | |
//! | `vhdx-no-valid-region-table` | 2.2.3 | neither copy is valid | |
//! | `vhdx-region-table`, `vhdx-region-tables-differ` | 2.2.3 | the copies are not alike (warning) | copied from the valid (first) one |
//! | `vhdx-region-place`, `-duplicate`, `-unknown`, `-missing`, `-too-large` | 2.2.3.2 | an entry of the table | |
//! | `vhdx-region-reserved`, `vhdx-region-not-required` | 2.2.3 | unusual fields (note) | |
//! | `vhdx-log-empty`, `vhdx-file-truncated` | 2.3.3 | the log cannot be replayed | |
//! | `vhdx-log-target`, `-too-large`, `-last-file-offset` | 2.3.1 | the log would write what it must not | |
//! | `vhdx-log-dirty` | 2.3.3 | the image was not closed (note) | log replayed |
//! | `vhdx-log-file-offsets` | 2.3.1.1 | FlushedFileOffset, LastFileOffset off 1 MiB (note) | |
//! | `vhdx-log-payload` | 2.3 | the log changes what is not metadata (note) | |
//! | `vhdx-metadata-table`, `-item-place`, `-duplicate`, `-unknown`, `-missing` | 2.6.1 | the metadata table | |
//! | `vhdx-metadata-reserved`, `vhdx-metadata-flags` | 2.6.1.2, 2.6.2 | unusual fields (note) | |
//! | `vhdx-incomplete` | | whoever wrote the file was interrupted | |
//! | `vhdx-block-size`, `vhdx-virtual-size`, `vhdx-sector-size` | 2.6.2 | values that are not possible | |
//! | `vhdx-parent-locator` | 2.6.2.6 | the parent locator is unsound | |
//! | `vhdx-parent-locator-unused`, `vhdx-parent-linkage2` | 2.6.2.6 | a locator without HasParent; a merge under way (notes) | |
//! | `vhdx-bat-too-small` | 2.5 | the region cannot hold the table | |
//! | `vhdx-bat-state`, `-reserved`, `-place`, `-overlap` | 2.5.1 | an entry | |
//! | `vhdx-sector-bitmap-missing` | 2.5.1.2 | a partially present block without bitmap | |
//! | `vhdx-bat-stale` | 2.5.1.1 | a place where none is meant (note; of zeroes a warning, since Hyper-V refuses it) | set to 0 |
//! | `vhdx-bat-anchor`, `vhdx-bat-anchor-place` | 2.5.1.1 | the old place of an unmapped block (note); one that cannot be (warning) | the second set to 0 |
//! | `vhdx-bat-padding` | 2.5 | something behind the table's last entry (note) | |
//! | `vhdx-fixed-unallocated` | 2.6.2.1 | blocks of a fixed image without a place (note) | |
//! | `vhdx-partial-empty`, `vhdx-partial-full` | 2.5.1.1 | partially present blocks with no or all sectors (note) | |
//! | `vhdx-bitmap-stray`, `vhdx-bitmap-unused` | 2.4 | bits, bitmap blocks, that nothing looks at (note) | |
//! | `vhdx-space-leaked`, `vhdx-space-slack` | 2.1 | data that belongs to nothing, between structures or at the end (warning) | punched, cut off |
//! | `vhdx-space-unused` | 2.1 | holes between structures (note) | |
//! | `vhdx-findings-left-out` | | there is more of the same | |
//!
//! Nothing is mended in an image that is damaged: what its structures say could be wrong.

use std::sync::Arc;

use super::bat::{BatEntry, state};
use super::compact::gaps_with_data;
use super::corruption::{Corruption, Stop};
use super::header::HEADER_OFFSETS;
use super::metadata::EntryOwner;
use super::offline::{Content, Offline, Pages, punch};
use super::parse::{Examined, examine};
use super::region::TABLE_OFFSETS;
use super::{audit, space::Space};
use crate::{CheckReport, Finding, ImageError, Severity, Storage};

/// So many findings are told at most; a damaged table could have millions.
const FINDINGS_MAX: usize = 1000;

/// Checks every rule of the specification that an image can break. With `repair`, what can be mended without guessing is,
/// so that a crash at any moment leaves an image that holds the same; nothing is in an image that is damaged.
///
/// # Errors
/// What the file says, and a file that is no VHDX; damage is a finding.
pub fn check(storage: Arc<dyn Storage>, repair: bool) -> Result<CheckReport, ImageError> {
    let mut findings = look(&storage)?;
    if repair && findings.iter().any(|f| f.repairable) {
        let only_log = findings.iter().filter(|f| f.repairable).all(|f| f.code == LOG_DIRTY);
        mend(&storage, only_log)?;
        let left = look(&storage)?;
        for finding in findings.iter_mut().filter(|f| f.repairable) {
            finding.repaired = !left.iter().any(|l| l.code == finding.code && l.offset == finding.offset);
        }
    }
    findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
    Ok(CheckReport { findings })
}

/// The code of a log that is to be replayed.
pub(super) const LOG_DIRTY: &str = "vhdx-log-dirty";

/// Everything that is to be said of a file.
fn look(storage: &Arc<dyn Storage>) -> Result<Vec<Finding>, ImageError> {
    let mut found = Examined::default();
    let mut broken = Vec::new();
    let examined = examine(storage, &mut found, &mut |corruption| {
        broken.push(corruption.clone());
        if broken.len() < FINDINGS_MAX { Ok(()) } else { Err(Stop::Corrupt(corruption)) }
    });
    let mut findings: Vec<Finding> =
        broken.iter().map(|c| of_corruption(c, Severity::Damage, &found)).collect();
    match examined {
        Err(Stop::Other(e)) => return Err(e),
        Err(Stop::Corrupt(_)) => {
            let message = format!("only the first {FINDINGS_MAX} broken rules are listed");
            findings.push(finding("vhdx-findings-left-out", "file", None, Severity::Note, message));
            return Ok(findings);
        }
        Ok(()) => {}
    }
    audit::audit(&**storage, &found, &mut findings)?;
    let writable = found.headers.as_ref().is_some_and(|h| h.current.validate_for_writing().is_ok());
    if !writable || !broken.is_empty() {
        for finding in &mut findings {
            (finding.repairable, finding.repair) = (false, None);
        }
    }
    Ok(findings)
}

/// A finding that is not mended.
pub(super) fn finding(
    code: &str,
    structure: &str,
    offset: Option<u64>,
    severity: Severity,
    message: String,
) -> Finding {
    let (code, structure) = (code.to_owned(), structure.to_owned());
    Finding { code, severity, structure, offset, message, repairable: false, repair: None, repaired: false }
}

/// A finding that is mended by what the words say.
pub(super) fn mended_by(finding: Finding, repair: impl Into<String>) -> Finding {
    Finding { repairable: true, repair: Some(repair.into()), ..finding }
}

/// A broken rule as a finding, with the place of the structure where the rule itself does not know one.
pub(super) fn of_corruption(corruption: &Corruption, severity: Severity, found: &Examined) -> Finding {
    let structure = corruption.structure();
    let regions = found.regions.as_ref();
    let place = || match structure {
        "header" => found.headers.as_ref().map(|h| HEADER_OFFSETS[h.slot]),
        "log" => found.headers.as_ref().map(|h| h.current.log_offset),
        "region table" => Some(TABLE_OFFSETS[0]),
        "metadata" | "parent locator" => regions.map(|r| r.metadata.offset),
        "BAT" => regions.map(|r| match corruption {
            Corruption::SectorBitmapMissing { index } => r.bat.offset + index * 8,
            _ => r.bat.offset,
        }),
        _ => None,
    };
    let offset = corruption.offset().or_else(place);
    finding(corruption.code(), structure, offset, severity, corruption.to_string())
}

/// What an entry of the BAT is once its place, where none is meant, is gone. `blocks` is the space that blocks with data
/// and other structures take, and takes in the anchors that may be.
pub(super) fn without_stale_place(
    owner: Option<EntryOwner>,
    entry: BatEntry,
    units: u64,
    file_units: u64,
    blocks: &mut Space,
) -> BatEntry {
    match (owner, entry.state()) {
        (None, _) | (Some(_), state::FULLY_PRESENT | state::PARTIALLY_PRESENT) => entry,
        (Some(EntryOwner::Bitmap(_)), _) => BatEntry(0),
        (Some(EntryOwner::Payload(_)), state::UNDEFINED | state::UNMAPPED) => {
            let inside = entry.unit().checked_add(units).is_some_and(|end| end <= file_units);
            let sound = entry.unit() == 0 || (inside && blocks.mark(entry.unit(), units));
            if sound { entry } else { BatEntry(entry.state().into()) }
        }
        (Some(EntryOwner::Payload(_)), state) => BatEntry(state.into()),
    }
}

/// Mends what is repairable.
fn mend(storage: &Arc<dyn Storage>, only_log: bool) -> Result<(), ImageError> {
    // Replays the log.
    let mut image = Offline::open(storage)?;
    if only_log {
        return image.close();
    }
    // Writes both headers, and cuts off what is behind the last structure.
    image.begin(Content::Stays)?;
    let mut pages = Pages::default();
    let bat = image.parsed.regions.bat;
    image.put_region(&mut pages, bat, bat.offset, bat.len)?;
    image.commit(pages)?;
    let (mut blocks, file_units) = audit::placed(&**storage, &image.parsed)?;
    let layout = image.layout();
    image.rewrite_entries(|index, entry| {
        let owner = layout.owner_of(index);
        Ok(without_stale_place(owner, entry, layout.units_per_block(), file_units, &mut blocks))
    })?;
    for (at, len) in gaps_with_data(&**storage, &image.parsed.space)? {
        punch(&**storage, at, len)?;
    }
    image.close()
}

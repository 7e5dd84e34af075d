//! Giving a closed differencing disk another parent.
//!
//! The header has two sectors, so it is never changed where it is in use: the footer, which is one sector, is pointed to
//! another header, and back.
//!
//! ```text
//!   1  room at the end of the file │ there the new paths and a new header │ copy │ footer → new header
//!   2  the old header and paths are nobody's now: the new ones are written to their places │ copy │ footer → there
//!   3  what was added in step 1 and is no longer needed is cleared, and the file is cut
//! ```
//!
//! Each `│` is a sync. A crash leaves the old link or the new one, in one whole header.

use std::ops::Range;

use crate::{ErrorKind, ImageError, NewParentLink, Storage};

use super::SECTOR;
use super::footer::{DiskType, FOOTER_LEN};
use super::grow::PAGE;
use super::header::{COOKIE, HEADER_LEN};
use super::locator::{EncodedLink, Locator};
use super::offline::{Blocks, Closed, first_nonzero};

/// Replaces what a differencing disk that nobody uses says of its parent: id, name and paths. The caller makes sure that
/// the new parent has the content that the disk was made over. Paths of kinds that are not written here are dropped.
///
/// A crash leaves the old link or the new one.
///
/// # Errors
/// [`ErrorKind::InvalidParameter`] for a disk that has no parent and for paths that a VHD cannot say; else as
/// [`super::resize()`].
pub fn relink(storage: &dyn Storage, link: &NewParentLink) -> Result<(), ImageError> {
    let (mut disk, blocks) = Closed::open_tidy(storage)?;
    let blocks = blocks.filter(|_| disk.disk_type == DiskType::Differencing).ok_or_else(|| {
        ImageError::new(
            ErrorKind::InvalidParameter,
            "VHD: only a differencing disk has a parent, and this one is none",
        )
    })?;
    let link = EncodedLink::new(link)?;
    let old_home = disk.header_at();
    let home = home(&disk, &blocks)?;
    let mut raw = disk.read_header()?;

    let away = disk.used_end(&blocks)?.next_multiple_of(PAGE);
    let mut places = Vec::new();
    let mut end = away + PAGE;
    for path in &link.paths {
        places.push(end);
        end += path.space();
    }
    disk.make_room(end)?;
    // Whatever lay there, such as the old footer, is not to be left between the paths.
    disk.punch(away..end)?;
    link.put(&mut raw, &places);
    for (path, &at) in link.paths.iter().zip(&places) {
        disk.write(&path.bytes, at)?;
    }
    disk.write(&raw, away)?;
    disk.sync()?;
    disk.set_footer(disk.footer.with_data_offset(away))?;

    let old: Vec<Range<u64>> =
        blocks.body.header.locators.iter().map(|l| l.offset..l.offset + u64::from(l.len)).collect();
    for range in &old {
        disk.punch(range.clone())?;
    }
    if let Some(back) = old_places(&disk, &blocks, &link, &Locator::all(&raw), home)? {
        for (path, &at) in link.paths.iter().zip(&back) {
            disk.write(&path.bytes, at)?;
        }
        places = back;
    }
    link.put(&mut raw, &places);
    disk.write(&raw, home)?;
    disk.sync()?;
    disk.set_footer(disk.footer.with_data_offset(home))?;

    let (mut disk, blocks) = Closed::open(storage)?;
    if let Some(blocks) = &blocks {
        let used_end = disk.used_end(blocks)?;
        disk.punch(away..away + HEADER_LEN)?;
        if home != old_home {
            disk.punch(old_home..old_home + HEADER_LEN)?;
        }
        disk.punch(used_end..disk.at)?;
        disk.cut(used_end)?;
    }
    disk.sync()
}

/// Where the header shall be in the end: where it is, or, if an earlier attempt was interrupted while its usual place was
/// being written, there.
fn home(disk: &Closed<'_>, blocks: &Blocks) -> Result<u64, ImageError> {
    let usual = FOOTER_LEN..FOOTER_LEN + HEADER_LEN;
    let meets = |other: Range<u64>| other.start < usual.end && usual.start < other.end;
    let block = blocks.body.shape.block_len();
    let taken = disk.structures(blocks).into_iter().any(meets)
        || blocks.placed().map(|(_, entry)| u64::from(entry) * SECTOR).any(|at| meets(at..at + block));
    let mut cookie = [0; COOKIE.len()];
    disk.storage
        .read_at(&mut cookie, usual.start)
        .map_err(|e| ImageError::io(format!("reading the header's usual place at {}", usual.start), e))?;
    Ok(if taken || cookie != *COOKIE { disk.header_at() } else { usual.start })
}

/// The places of the old paths for the new ones of their kinds, if all of those have one where they fit.
fn old_places(
    disk: &Closed<'_>,
    blocks: &Blocks,
    link: &EncodedLink,
    new: &[Locator],
    home: u64,
) -> Result<Option<Vec<u64>>, ImageError> {
    let old = &blocks.body.header.locators;
    let mut taken = disk.structures(blocks);
    taken.push(home..home + HEADER_LEN);
    taken.extend(blocks.placed().map(|(_, entry)| u64::from(entry) * SECTOR).map(|at| at..at + SECTOR));
    let mut places = Vec::new();
    for (path, locator) in link.paths.iter().zip(new) {
        let Some(same) = old.iter().find(|o| o.code == locator.code && o.len > 0) else { return Ok(None) };
        let range = same.offset..same.offset + path.bytes.len() as u64;
        let next = taken.iter().map(|t| t.start).filter(|&start| start > same.offset).min();
        if next.unwrap_or(disk.at).min(disk.at) < range.end || !reads_zero(disk, range)? {
            return Ok(None);
        }
        places.push(same.offset);
    }
    Ok(Some(places))
}

/// Whether a range that may begin anywhere reads as zeroes.
fn reads_zero(disk: &Closed<'_>, range: Range<u64>) -> Result<bool, ImageError> {
    first_nonzero(disk.storage, range).map(|found| found.is_none())
}

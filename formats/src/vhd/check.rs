//! What `check` looks at, and mends.

use crate::{CheckReport, Finding, ImageError, Severity, Storage};

use super::corruption::Fault;
use super::footer::DiskType;
use super::grow::sync;
use super::layout::{self, ABSENT, Body, CopyState, Found};
use super::{Corruption, SECTOR, put_footer_back};

/// Reads everything that the image says of itself and reports what breaks the specification or wastes space.
///
/// With `repair`, and when nothing is wrong that cannot be mended without guessing, a lost footer is put back from its
/// copy, and a bad copy is renewed from the footer. Content is never touched.
///
/// # Errors
/// Only when the file cannot be read or, repairing, written: what is wrong with the image is in the report.
pub fn check(storage: &dyn Storage, repair: bool) -> Result<CheckReport, ImageError> {
    let mut report = CheckReport::default();
    match examine(storage, repair, &mut report) {
        Ok(()) => {}
        Err(Fault::Corrupt(c)) => report.findings.push(damage(&c)),
        Err(Fault::Image(e)) => return Err(e),
    }
    report.findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
    Ok(report)
}

fn examine(storage: &dyn Storage, repair: bool, report: &mut CheckReport) -> Result<(), Fault> {
    let found = layout::find_footer(storage)?;
    let virtual_size = found.virtual_size()?;
    look_at_footer(&found, report);
    if found.disk_type == DiskType::Fixed {
        look_at_fixed(&found, virtual_size, report);
        return Ok(());
    }
    let mut faults = Vec::new();
    let body = layout::read_body(storage, &found, virtual_size, &mut faults)?;
    report.findings.extend(faults.iter().map(damage));
    let repair = repair && faults.is_empty();
    mend_footers(storage, &found, &body, repair, report)?;
    if faults.is_empty() {
        look_at_blocks(storage, &found, &body, report)?;
    }
    Ok(())
}

fn damage(c: &Corruption) -> Finding {
    let (structure, offset) = c.place();
    finding(c.code(), Severity::Damage, structure, offset, c.to_string())
}

fn finding(code: &str, severity: Severity, structure: &str, offset: Option<u64>, message: String) -> Finding {
    Finding {
        code: code.into(),
        severity,
        structure: structure.into(),
        offset,
        message,
        repairable: false,
        repair: None,
        repaired: false,
    }
}

fn look_at_footer(found: &Found, report: &mut CheckReport) {
    let note = |code, message: &str| finding(code, Severity::Note, "footer", found.at, message.into());
    if found.footer.saved_state() {
        let message = "a virtual machine was suspended with this disk: it can be opened for reading only";
        report.findings.push(note("vhd-saved-state", message));
    }
    if found.footer.features() & 2 == 0 {
        let message = "features: bit 1 is reserved and always set, but is not";
        report.findings.push(note("vhd-features", message));
    }
    if found.at.is_some() && found.file_len % SECTOR == SECTOR - 1 {
        let message = "the footer has 511 bytes, as Virtual PC wrote it before 2004";
        report.findings.push(note("vhd-footer-short", message));
    }
}

fn look_at_fixed(found: &Found, virtual_size: u64, report: &mut CheckReport) {
    let spare = found.limit() - virtual_size;
    if spare > 0 {
        let message = format!("{spare} bytes between the content and the footer belong to nobody");
        report.findings.push(finding(
            "vhd-unused-space",
            Severity::Warning,
            "file",
            Some(virtual_size),
            message,
        ));
    }
}

/// Reports, and with `repair` mends, footers that are missing or do not match.
fn mend_footers(
    storage: &dyn Storage,
    found: &Found,
    body: &Body,
    repair: bool,
    report: &mut CheckReport,
) -> Result<(), Fault> {
    let (code, severity, offset, message) = match (found.at, found.copy) {
        (None, _) => (
            "vhd-footer-missing",
            Severity::Damage,
            None,
            "the file does not end in a footer, and only the copy at 0 is valid, as after a power cut while it grew",
        ),
        (_, CopyState::Bad) => {
            ("vhd-copy-bad", Severity::Warning, Some(0), "the copy of the footer at 0 is damaged")
        }
        (_, CopyState::Different) => (
            "vhd-copy-differs",
            Severity::Warning,
            Some(0),
            "the copy of the footer at 0 is valid, but differs from the footer, which counts",
        ),
        (_, CopyState::None | CopyState::Same) => return Ok(()),
    };
    let mut found_this = finding(code, severity, "footer", offset, message.into());
    found_this.repairable = true;
    if repair {
        if found.at.is_none() {
            let used_end = layout::first_free(storage, body, found.limit())?;
            put_footer_back(storage, found, used_end)?;
        } else {
            storage
                .write_at(found.footer.bytes(), 0)
                .map_err(|e| ImageError::io("renewing the footer's copy at 0", e))?;
            sync(storage)?;
        }
        found_this.repaired = true;
    }
    report.findings.push(found_this);
    Ok(())
}

fn look_at_blocks(
    storage: &dyn Storage,
    found: &Found,
    body: &Body,
    report: &mut CheckReport,
) -> Result<(), Fault> {
    if body.surplus > 0 {
        let message = format!(
            "{} entries beyond the disk's last block are in use and waste their blocks",
            body.surplus
        );
        report.findings.push(finding("vhd-surplus-blocks", Severity::Warning, "block table", None, message));
    }
    let present = body.table.iter().filter(|&&e| e != ABSENT).count() as u64;
    let used = body.structures_end + (present + body.surplus) * body.shape.block_len();
    let unused = found.limit().saturating_sub(used);
    if unused >= body.shape.block_size.max(1 << 20) {
        let message = format!("{unused} bytes of the file belong to no block and no structure");
        report.findings.push(finding("vhd-unused-space", Severity::Warning, "file", None, message));
    }
    let mut bitmap = vec![0; body.shape.bitmap_used() as usize];
    let mut partial = 0u64;
    let mut first = None;
    for &entry in body.table.iter().filter(|&&e| e != ABSENT) {
        let at = u64::from(entry) * SECTOR;
        storage
            .read_at(&mut bitmap, at)
            .map_err(|e| ImageError::io(format!("reading the sector bitmap at {at}"), e))?;
        if found.disk_type == DiskType::Dynamic && bitmap.iter().any(|&b| b != 0xff) {
            partial += 1;
            first = first.or(Some(at));
        }
    }
    if partial > 0 {
        let message = format!(
            "{partial} blocks have bitmaps that do not mark all their sectors as written; the data counts here, but \
             other software may read such sectors as zeroes"
        );
        report.findings.push(finding("vhd-bitmap-partial", Severity::Note, "sector bitmap", first, message));
    }
    Ok(())
}

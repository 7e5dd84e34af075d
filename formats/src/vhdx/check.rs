//! Checking, and repairing what needs no guessing.

use std::sync::Arc;

use super::corruption::{Corruption, Stop};
use super::parse::{Parsed, parse};
use super::region::repair_tables;
use super::{MIB, replay};
use crate::{CheckReport, Finding, ImageError, Severity, Storage};

/// So many findings are told at most; a damaged table could have millions.
const FINDINGS_MAX: usize = 1000;

fn finding(corruption: &Corruption, severity: Severity, repairable: bool) -> Finding {
    Finding {
        code: corruption.code().to_owned(),
        severity,
        structure: corruption.structure().to_owned(),
        offset: corruption.offset(),
        message: corruption.to_string(),
        repairable,
        repair: None,
        repaired: false,
    }
}

fn note(code: &str, structure: &str, severity: Severity, message: String, repairable: bool) -> Finding {
    Finding {
        code: code.to_owned(),
        severity,
        structure: structure.to_owned(),
        offset: None,
        message,
        repairable,
        repair: None,
        repaired: false,
    }
}

/// Checks every rule of the specification that an image can break. With `repair`, replays a log that was left and mends
/// spare copies of headers and region tables.
///
/// # Errors
/// What the file says, and a file that is no VHDX; damage is a finding.
pub fn check(storage: Arc<dyn Storage>, repair: bool) -> Result<CheckReport, ImageError> {
    let mut findings = Vec::new();
    let parsed = parse(&storage, &mut |corruption| {
        findings.push(finding(&corruption, Severity::Damage, false));
        if findings.len() < FINDINGS_MAX { Ok(()) } else { Err(Stop::Corrupt(corruption)) }
    });
    match parsed {
        Ok(parsed) => {
            let sound = findings.is_empty();
            look_at(&parsed, &mut findings);
            if repair && sound {
                mend(&storage, parsed, &mut findings)?;
            }
        }
        Err(Stop::Corrupt(corruption)) => {
            let last = finding(&corruption, Severity::Damage, false);
            if findings.last() != Some(&last) {
                findings.push(last);
            }
        }
        Err(Stop::Other(e)) => return Err(e),
    }
    findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
    Ok(CheckReport { findings })
}

fn look_at(parsed: &Parsed, findings: &mut Vec<Finding>) {
    if let Some(corruption) = &parsed.headers.spare {
        findings.push(finding(corruption, Severity::Warning, true));
    }
    if let Some(corruption) = &parsed.regions.spare {
        findings.push(finding(corruption, Severity::Warning, true));
    }
    if parsed.overlay.is_some() {
        let message = "the image was not closed: its log holds changes, which are replayed when it is opened";
        findings.push(note("vhdx-log-dirty", "log", Severity::Note, message.into(), true));
    }
    let unused = parsed.space.unused();
    if unused > 0 {
        let message = format!("{unused} MiB between structures are not used by anything");
        findings.push(note("vhdx-space-unused", "file", Severity::Note, message, false));
    }
    let end = parsed.space.end() * MIB;
    if parsed.table.file_len > end {
        let message = format!("{} bytes behind the last structure are not used", parsed.table.file_len - end);
        findings.push(note("vhdx-space-slack", "file", Severity::Note, message, false));
    }
    for (index, raw) in &parsed.census.stale {
        let message = format!("BAT entry {index} is {raw:#x}: it names a place though its block has no data");
        findings.push(note("vhdx-bat-stale", "BAT", Severity::Note, message, false));
    }
}

fn mend(storage: &Arc<dyn Storage>, parsed: Parsed, findings: &mut [Finding]) -> Result<(), ImageError> {
    if findings.iter().all(|f| !f.repairable) {
        return Ok(());
    }
    let mut headers = parsed.headers.clone();
    let dirty = parsed.overlay.is_some();
    replay(storage, parsed)?;
    repair_tables(&**storage)?;
    if !dirty && headers.spare.is_some() {
        headers.update_both(&**storage, |_| ())?;
    }
    findings.iter_mut().filter(|f| f.repairable).for_each(|f| f.repaired = true);
    Ok(())
}

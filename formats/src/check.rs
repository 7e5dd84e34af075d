//! Checking images by path, and what a check reports, in the words that every format shares.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::open::{at, choose_format, lock_for, open_file};
use crate::parents::{Child, FileId, Gate};
use crate::{FileStorage, Format, ImageError, ImageType, LayerOptions, OpenError, dispatch};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Unusual, harmless.
    Note,
    /// Space is wasted, or a spare copy of a structure is bad; the content is sound.
    Warning,
    /// The image breaks its specification.
    Damage,
}

/// One thing that `check` found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable name to match on, such as `vhdx-header-checksum`.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// Which structure of the file.
    pub structure: String,
    /// Its byte offset in the file, where there is one.
    pub offset: Option<u64>,
    /// What was found, what was expected, and the rule.
    pub message: String,
    /// Whether `check --repair` can mend it without guessing.
    pub repairable: bool,
    /// What `check --repair` does about it, such as "rewrites header 2 from header 1"; `None` where it does nothing.
    #[serde(default)]
    pub repair: Option<String>,
    /// Whether this run mended it.
    pub repaired: bool,
}

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Everything that was found, worst first.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether nothing worse than a warning is left unmended.
    pub fn is_sound(&self) -> bool {
        !self.findings.iter().any(|f| f.severity == Severity::Damage && !f.repaired)
    }
}

/// Checks the image at `path`, in the format said or that of its name (see [`crate::open()`]). With `repair`, what can be
/// mended without guessing is; that takes the image's exclusive lock, checking alone a shared one.
///
/// # Errors
/// When the file cannot be opened, locked, read or written. What is wrong with the image is in the report.
pub fn check(path: impl AsRef<Path>, format: Option<Format>, repair: bool) -> Result<CheckReport, OpenError> {
    let path = path.as_ref();
    let file = open_file(path, !repair)?;
    lock_for(path, &file, !repair)?;
    let format = choose_format(path, &file, format)?;
    dispatch::check(format, Arc::new(FileStorage::new(file)), repair).map_err(|e| at(path, e))
}

/// [`check`] of an image, and then of the parents that it is read from, which are looked for in `parents` (see
/// [`OpenOptions::parents`](crate::OpenOptions::parents)). Parents are never repaired here. One that is not found is
/// damage: `chain-parent`.
///
/// # Errors
/// As [`check`].
pub fn check_with_parents(
    path: impl AsRef<Path>,
    format: Option<Format>,
    repair: bool,
    parents: &[PathBuf],
) -> Result<CheckReport, OpenError> {
    let path = path.as_ref();
    let mut gate = Gate::new(parents, true);
    let mut report = check(path, format, repair)?;
    let file = open_file(path, true)?;
    let format = choose_format(path, &file, format)?;
    if format == Format::Raw || !report.is_sound() {
        return Ok(report);
    }
    lock_for(path, &file, true)?;
    let id = FileId::of(&file).map_err(|e| at(path, ImageError::io("looking at the file", e)))?;
    let options = LayerOptions { read_only: true, ..LayerOptions::default() };
    let image =
        dispatch::open_layer(format, Arc::new(FileStorage::new(file)), &options).map_err(|e| at(path, e))?;
    if image.image_type() != ImageType::Differencing {
        return Ok(report);
    }
    let walk = gate.walk(Child { path, image: &*image, file: id });
    for parent in &walk.parents {
        let found =
            dispatch::check(format, parent.storage.clone(), false).map_err(|e| at(&parent.path, e))?;
        report.findings.extend(found.findings.into_iter().map(|finding| Finding {
            structure: format!("parent {}: {}", parent.path.display(), finding.structure),
            // Only a check of the parent itself mends it.
            repairable: false,
            repair: None,
            ..finding
        }));
    }
    report.findings.extend(walk.missing.map(|missing| Finding {
        code: "chain-parent".into(),
        severity: Severity::Damage,
        structure: format!("parent of {}", missing.child.display()),
        offset: None,
        message: format!("the chain ends here before its base: {}", missing.reason),
        repairable: false,
        repair: None,
        repaired: false,
    }));
    report.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok(report)
}

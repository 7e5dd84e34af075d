//! What `check` reports, in the words that every format shares.

use serde::{Deserialize, Serialize};

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

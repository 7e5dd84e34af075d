//! What is told of a move while it runs.

use serde::{Deserialize, Serialize};

/// Why a move is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "why", content = "message")]
pub enum PauseReason {
    /// Somebody asked for it.
    User,
    /// The target failed.
    TargetError(String),
    /// The target has no space left.
    Space(String),
}

impl std::fmt::Display for PauseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User => f.write_str("paused by request"),
            Self::TargetError(message) => write!(f, "the target failed: {message}"),
            Self::Space(message) => write!(f, "the target has no space left: {message}"),
        }
    }
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum JobState {
    /// Not begun.
    Queued,
    /// The first copy of everything is being made.
    Copying,
    /// Guest writes go to both disks, and what is dirty is copied.
    Mirroring,
    /// Both sides are equal; what is left is verifying, the switch and the commit.
    Synced,
    /// The target is the disk; what is left is to finish it and to delete the source.
    Committed,
    /// All is done.
    Done,
    /// No progress until it is resumed. The guest is served all the same.
    Paused {
        /// Why.
        reason: PauseReason,
    },
    /// The move failed; the source is the disk, and the target is discarded.
    Failed {
        /// Why.
        reason: String,
    },
    /// The move was cancelled; the source is the disk, and the target is discarded.
    Cancelled,
}

impl JobState {
    /// Whether nothing will happen any more.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done | Self::Failed { .. } | Self::Cancelled)
    }

    /// The word of the control API.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Copying => "copying",
            Self::Mirroring => "mirroring",
            Self::Synced => "synced",
            Self::Committed => "committed",
            Self::Done => "done",
            Self::Paused { .. } => "paused",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How far a move is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Both sides are equal and verified as asked: a switch takes effect at once.
    pub ready: bool,
    /// Bytes of the disk.
    pub bytes_total: u64,
    /// Bytes that copies wrote to the target.
    pub bytes_copied: u64,
    /// Bytes that guest writes wrote to both disks.
    pub bytes_mirrored: u64,
    /// Bytes that are dirty or being copied. All of the disk until it is scanned.
    pub bytes_dirty: u64,
    /// Bytes that did not have to be copied, because the source does not hold them or they are zeroes.
    pub bytes_skipped_zero: u64,
    /// Bytes a second that were copied (or verified) in the last seconds.
    pub rate_bytes_per_s: u64,
    /// Seconds until nothing is left to copy or to verify at this rate; `None` while there is no rate.
    pub eta_s: Option<u64>,
    /// Sweeps over the disk that were begun.
    pub passes: u32,
    /// Seconds spent on the first copy.
    pub copying_s: f64,
    /// Seconds spent on what was dirty after it.
    pub mirroring_s: f64,
    /// Seconds spent on verifying.
    pub verify_s: f64,
    /// Seconds from the commit's flush until the target was the disk.
    pub commit_s: f64,
    /// Bytes that were verified.
    pub bytes_verified: u64,
    /// Bytes that are to be verified, those included that are done.
    pub bytes_to_verify: u64,
    /// What the guest's 99th percentile may be, in microseconds.
    pub max_guest_p99_us: Option<u64>,
    /// The 99th percentile of the guest's reads and writes of the last two seconds, in microseconds; `None` of none.
    pub guest_p99_us: Option<u64>,
    /// The last thing that went wrong without ending the move.
    pub warning: Option<String>,
}

//! The control API: HTTP/1.1 with JSON on a Unix socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/vm` | | [`VmInfo`] |
//! | `POST /v1/vm/pause` (`resume`, `stop`) | | [`VmInfo`] |
//! | `POST /v1/vm/save` | [`SaveRequest`] | [`MigrationInfo`] |
//! | `GET /v1/guest` | | the test guest's report |
//! | `POST /v1/guest` | [`GuestRequest`] | the test guest's report |
//! | `POST /v1/migration` | [`SendRequest`] | [`MigrationInfo`] |
//! | `GET /v1/migration` | | [`MigrationInfo`] |
//! | `POST /v1/migration/cancel` (`retry`, `resume-here`) | | [`MigrationInfo`] |
//! | `POST /v1/migration/discard` | | [`VmInfo`] |
//! | `POST /v1/check` | [`SendRequest`] | [`crate::machine::CompatibilityReport`] |
//!
//! Every failure answers with a status of 4xx or 5xx and an [`ErrorBody`]. Sizes are bytes, rates bytes a second.

pub mod client;
pub mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::machine::DeviceDescription;

/// The body of every failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorInfo,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorInfo {
    /// A stable word to match on: `not-found`, `invalid`, `state`, `busy`, `incompatible`, `cancelled`, `io`, `internal`.
    pub kind: String,
    /// One sentence that names the thing, the reason and what to do.
    pub message: String,
}

/// The machine of this process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// `waiting` (for a machine to come in), `arriving`, `prepared` (everything is here, and its source is to say that it runs
    /// here), `created`, `running`, `paused`, `gone`, `shutdown`, `failed`.
    pub state: String,
    /// Why it failed, or what it waits for.
    pub error: Option<String>,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Number of processors.
    pub vcpus: u32,
    /// What the guest's processors are called.
    pub cpu: String,
    /// The baseline that the guest was started on.
    pub baseline: Option<String>,
    /// Disks and network cards.
    pub devices: Vec<DeviceDescription>,
    /// How often processors left the guest.
    pub exits: u64,
}

/// Asks for a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendRequest {
    /// `unix:PATH`, or `tcp:HOST:PORT`.
    pub to: String,
    /// Longest time for which the machine may stand still, ms.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// Give up after so long, ms; none: never.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// What then: `cancel` (the machine stays here) or `force` (it stands still for as long as it takes).
    #[serde(default = "default_on_timeout")]
    pub on_timeout: String,
    /// Connections that carry memory, 1 to 16.
    #[serde(default = "default_connections")]
    pub connections: u32,
    /// At most so many bytes a second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// `none`, `lz4` or `zstd`.
    #[serde(default = "default_compression")]
    pub compress: String,
    /// If the guest writes faster than it is copied: run it on the target and fetch what is missing.
    #[serde(default)]
    pub postcopy: bool,
    /// If the guest writes faster than it is copied: slow it down.
    #[serde(default)]
    pub auto_converge: bool,
    /// Files for mutual TLS.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// Allow TCP without TLS.
    #[serde(default)]
    pub insecure_plain_tcp: bool,
    /// What becomes of the disks: `keep` (the daemon that serves them goes on), `release` (their daemon lets the images go and
    /// the target's daemon opens them), `commit` (they are being moved, and are synced: the move is committed while the
    /// machine stands still, then released).
    #[serde(default = "default_storage")]
    pub storage: String,
}

/// Files for mutual TLS, PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Who signs the certificates of both sides.
    pub ca: PathBuf,
    /// This side's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The name in the other side's certificate, if it is not the host's in the address.
    #[serde(default)]
    pub name: Option<String>,
}

fn default_downtime_ms() -> u64 {
    300
}

fn default_on_timeout() -> String {
    "cancel".into()
}

fn default_connections() -> u32 {
    2
}

fn default_compression() -> String {
    "none".into()
}

fn default_storage() -> String {
    "keep".into()
}

/// Asks for the machine to be saved to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// Absolute path of the file, which must not exist.
    pub path: PathBuf,
    /// As in [`SendRequest`].
    #[serde(default = "default_storage")]
    pub storage: String,
}

/// Tells the test guest something.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRequest {
    /// Verify all memory and disks now. The answer comes when that is done.
    #[serde(default)]
    pub verify: bool,
    /// Write memory at this rate from now on, bytes a second; 0: as fast as it can.
    #[serde(default)]
    pub rate: Option<u64>,
    /// Stop working (true) or go on (false).
    #[serde(default)]
    pub stop: Option<bool>,
}

/// The names of a migration's steps, the first being step 1.
pub const STEPS: [&str; 8] = [
    "the configuration is created on the target",
    "the memory is copied",
    "what was written meanwhile is copied, in rounds",
    "the machine pauses here",
    "the last memory and the state of processors and devices follow",
    "the machine runs on the target",
    "the network learns its new place",
    "the machine ends here",
];

/// A migration of this process's machine, the one that is under way or the last one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// Its id, the same on both sides.
    pub id: String,
    /// On the target `arriving` (the machine runs here, pages may be missing), then `arrived`. On the source `running`, `done`,
    /// `cancelled`, `failed`, or `unresolved`: the target was told to run the machine and can't be reached,
    /// so the machine stands still here until the target answers or somebody decides.
    pub state: String,
    /// Where to.
    pub to: String,
    /// The step that is under way, 1 to 8, or 0 before the first.
    pub step: u32,
    /// What it is called.
    pub step_name: String,
    /// Round of copying, from 1.
    pub round: u32,
    /// Bytes of the machine's memory.
    pub memory_bytes: u64,
    /// Pages sent, in all rounds.
    pub pages_sent: u64,
    /// Pages of zeroes that were not sent, or as a mark only.
    pub pages_zero: u64,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// Bytes of memory that are to be sent in this round.
    pub dirty_bytes: u64,
    /// How fast memory is copied.
    pub rate_bytes_per_s: u64,
    /// How fast the guest writes memory.
    pub dirty_rate_bytes_per_s: u64,
    /// How long the machine would stand still if it paused now, ms.
    pub expected_downtime_ms: u64,
    /// How much of the time the processors are made to rest.
    pub throttle_percent: u32,
    /// How long the machine stood still, from its pause here until the target said that it runs, us.
    pub downtime_us: Option<u64>,
    /// Since it began, ms.
    pub elapsed_ms: u64,
    /// Pages that the guest waited for on the target after it ran there.
    pub postcopy_faults: u64,
    /// How long the guest waited for such a page, us: median and 99th percentile.
    pub postcopy_wait_us: Option<[u64; 2]>,
    /// Why it failed, if so.
    pub error: Option<String>,
}

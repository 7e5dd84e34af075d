//! Wire types of the control API: HTTP/1.1 with JSON on a Unix socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/disks` | | `[DiskInfo]` |
//! | `POST /v1/disks` | [`AttachRequest`] | [`DiskInfo`] |
//! | `GET /v1/disks/{id}` | | [`DiskInfo`] |
//! | `DELETE /v1/disks/{id}?force=true` | | `{}` |
//! | `POST /v1/disks/{id}/flush` | | `{}` |
//! | `POST /v1/disks/{id}/snapshot` | [`SnapshotRequest`] | [`DiskInfo`] |
//! | `POST /v1/disks/{id}/resize` | [`ResizeRequest`] | [`Resized`] |
//! | `POST /v1/disks/{id}/release?force=true&wait_ms=1000` | | [`Handover`] |
//! | `POST /v1/disks/{id}/reclaim` | | [`DiskInfo`] |
//! | `POST /v1/moves` | [`MoveRequest`] | [`Job`] |
//! | `GET /v1/jobs` | | `[Job]` |
//! | `GET /v1/jobs/{job}` | | [`Job`] |
//! | `PATCH /v1/jobs/{job}` | [`JobSettings`] | [`Job`] |
//! | `POST /v1/jobs/{job}/pause` (`resume`, `switch`, `cancel`) | | [`Job`] |
//! | `GET /v1/jobs/{job}/receipt` | | [`Receipt`] |
//! | `GET /v1/events?follow=true` | | one [`Event`] a line |
//! | `GET /metrics` | | Prometheus text format |
//! | `GET /openapi.json` | | the OpenAPI document |
//!
//! Every failure answers with a status of 4xx or 5xx and an [`ErrorBody`]. Sizes are bytes, rates bytes a second.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorInfo,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorInfo {
    /// A stable word to match on: `not-found`, `exists`, `busy`, `invalid`, `locked`, `no-space`, `corrupt`,
    /// `unsupported`, `io`, `state`, `internal`.
    pub kind: String,
    /// One sentence that names the thing, the reason and what to do.
    pub message: String,
}

/// Asks for an image to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The disk's name: 1 to 64 of letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
    pub id: String,
    /// Absolute path of the image.
    pub image: String,
    /// Absolute path of the vhost-user socket to listen on.
    pub socket: String,
    /// `raw`, `vhd` or `vhdx`; from the name's ending when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Most queues that a front end may use, 1 to 64.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Threads that serve the queues, 1 to `queues`.
    #[serde(default = "default_io_threads")]
    pub io_threads: u16,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Absolute paths: folders in which parents of the image may be opened, and files that may be its parents.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<String>,
    /// Takes the image over from another daemon: the number in its [`Handover`], with which the disk begins here. Refused when
    /// anybody has taken the image with this number or a higher one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// What another daemon needs to serve a disk that was released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Handover {
    /// The disk's name.
    pub id: String,
    /// Absolute path of the image.
    pub image: String,
    /// Absolute paths of the image and its parents, newest first.
    pub chain: Vec<String>,
    /// `raw`, `vhd` or `vhdx`.
    pub format: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// The guest's sector size.
    pub sector_size: u32,
    /// Queues that were offered.
    pub queues: u16,
    /// Threads that served the queues.
    pub io_threads: u16,
    /// Whether writes were refused.
    pub read_only: bool,
    /// Whether the guest has its write cache on. The taking daemon finds this beside the image by itself.
    pub write_cache: bool,
    /// What to attach the image with: [`AttachRequest::generation`]. One more than the disk has had here.
    pub generation: u64,
}

impl Handover {
    /// The request with which another daemon takes the disk over, to be served at `socket`.
    pub fn attach_at(&self, socket: &str) -> AttachRequest {
        AttachRequest {
            id: self.id.clone(),
            image: self.image.clone(),
            socket: socket.to_owned(),
            format: Some(self.format.clone()),
            queues: self.queues,
            io_threads: self.io_threads,
            read_only: self.read_only,
            parents: self.chain.iter().skip(1).cloned().collect(),
            generation: Some(self.generation),
        }
    }
}

fn default_queues() -> u16 {
    1
}

fn default_io_threads() -> u16 {
    1
}

/// A disk that is served.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// The disk's name.
    pub id: String,
    /// Path of the image that is the disk now.
    pub image: String,
    /// Paths of the image and its parents, newest first.
    pub chain: Vec<String>,
    /// `raw`, `vhd` or `vhdx`.
    pub format: String,
    /// `fixed`, `dynamic` or `differencing`.
    #[serde(rename = "type")]
    pub image_type: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// The guest's sector size.
    pub sector_size: u32,
    /// Path of the vhost-user socket.
    pub socket: String,
    /// Queues offered.
    pub queues: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a front end is connected and its rings run.
    pub connected: bool,
    /// Counts the changes of the disk's image, and of the daemon that serves it.
    pub generation: u64,
    /// Whether the disk was released for another daemon: it is not served, and its image not open.
    #[serde(default)]
    pub released: bool,
    /// The move that is under way.
    pub job: Option<String>,
    /// Why the disk can't be written any more, if so.
    pub failed: Option<String>,
    /// Read requests completed.
    pub reads: u64,
    /// Write and write-zeroes requests completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards completed.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Latencies from taking a request to its completion, since the disk was attached.
    pub latency_us: LatencyInfo,
}

/// Asks for a new differencing image in which a disk goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Absolute path of the new image, which must not exist.
    pub to: String,
}

/// Asks for another size of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// The new size, a multiple of the sector size.
    pub size_bytes: u64,
    /// Allow a size that is smaller than before; what is cut off must not hold anything.
    #[serde(default)]
    pub shrink: bool,
}

/// A disk that has another size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resized {
    /// The disk as it is now.
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// Whether the guest was told; if not, it sees the new size when it next connects.
    pub guest_told: bool,
}

/// Latencies of the two kinds of requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyInfo {
    /// Reads.
    pub read: Percentiles,
    /// Writes.
    pub write: Percentiles,
}

/// Percentiles in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99 of 100 are faster.
    pub p99: f64,
    /// 999 of 1,000 are faster.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

/// Asks for a move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The disks to move, by name.
    pub disks: Vec<String>,
    /// Absolute path: a file, or a folder in which names are kept.
    pub to: String,
    /// Format of the target; from its name, else the source's, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// `dynamic` or `fixed`; the source's when absent.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub image_type: Option<String>,
    /// Block size of the target in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// `after-copy` or `from-start`.
    #[serde(default = "default_mirror")]
    pub mirror: String,
    /// `auto` or `manual`.
    #[serde(default = "default_switch")]
    pub switch: String,
    /// `none`, `sample` or `full`.
    #[serde(default = "default_verify")]
    pub verify: String,
    /// Copying and verifying may use at most this many bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take: copying and verifying are slowed down for that,
    /// to 8 MiB a second at least. Without it, or with 0, they are slowed down where the guest sees 1.4 times what it sees
    /// without them, to 32 MiB a second at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_guest_p99_us: Option<u64>,
    /// Leave the source where it is after the switch.
    #[serde(default)]
    pub keep_source: bool,
    /// A copy at one point in time; the disk stays where it is.
    #[serde(default)]
    pub copy_only: bool,
    /// A chain becomes one image, and its parents stay. Otherwise each image of it becomes one of its own.
    #[serde(default)]
    pub flatten: bool,
    /// Where single files of the chains go, all others to `to`. A file that goes to where it is stays there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FilePlace>,
    /// `pause`, `retry` or `abort`.
    #[serde(default = "default_on_target_error")]
    pub on_target_error: String,
}

/// Where one file of a chain goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePlace {
    /// Absolute path of the file.
    pub file: String,
    /// Absolute path of the new file, or of a folder in which the name is kept.
    pub to: String,
}

/// Asks for a merge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeRequest {
    /// Absolute path of the image of the chain that takes all newer ones; the parent of the newest when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
    /// Copying and verifying may use at most this many bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take: copying and verifying are slowed down for that,
    /// to 8 MiB a second at least. Without it, or with 0, they are slowed down where the guest sees 1.4 times what it sees
    /// without them, to 32 MiB a second at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_guest_p99_us: Option<u64>,
    /// `none`, `sample` or `full`.
    #[serde(default = "default_verify")]
    pub verify: String,
}

fn default_mirror() -> String {
    "after-copy".into()
}
fn default_switch() -> String {
    "auto".into()
}
fn default_verify() -> String {
    "full".into()
}
fn default_on_target_error() -> String {
    "pause".into()
}

/// Changes of a running job; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSettings {
    /// Bytes a second; 0 takes the limit away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take; 0 takes the budget away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_guest_p99_us: Option<u64>,
}

/// A move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// The job's id.
    pub job: String,
    /// The disks that it moves.
    pub disks: Vec<String>,
    /// `queued`, `copying`, `mirroring`, `synced`, `committed`, `done`, `paused`, `failed` or `cancelled`.
    pub state: String,
    /// Whether it is `synced` and both images are verified as asked, so that a switch takes effect at once.
    #[serde(default)]
    pub ready: bool,
    /// Paths of the source images.
    pub source: Vec<String>,
    /// Paths of the target images.
    pub target: Vec<String>,
    /// What there is to copy, as known so far.
    pub bytes_total: u64,
    /// Copied so far, what was copied twice counted twice.
    pub bytes_copied: u64,
    /// Written by the guest to both images.
    pub bytes_mirrored: u64,
    /// Not yet equal on both images.
    pub bytes_dirty: u64,
    /// Not copied because the source holds nothing or zeroes there.
    pub bytes_skipped_zero: u64,
    /// Bytes compared by verification.
    pub bytes_verified: u64,
    /// Copy rate of the last seconds.
    pub rate_bytes_per_s: u64,
    /// Seconds that copying and verifying will still take at this rate.
    pub eta_s: u64,
    /// Passes over the disk.
    pub passes: u32,
    /// Microseconds that 99 of 100 of the guest's reads and writes may take, where that was asked for.
    #[serde(default)]
    pub max_guest_p99_us: Option<u64>,
    /// Microseconds that 99 of 100 of the guest's reads and writes took in the last two seconds; null where there were none.
    #[serde(default)]
    pub guest_p99_us: Option<u64>,
    /// Time spent in each phase.
    pub phases: JobPhases,
    /// The switch.
    pub switch: JobSwitch,
    /// `full`, `sample` or `none`: how the target was verified.
    pub verified: String,
    /// Whether the source is gone.
    pub source_deleted: bool,
    /// Parents of the source that were left all the same, since something else uses them.
    #[serde(default)]
    pub sources_kept: Vec<String>,
    /// Why it is paused or failed.
    pub error: Option<ErrorInfo>,
}

impl Job {
    /// Whether nothing will happen to it any more.
    pub fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "done" | "failed" | "cancelled")
    }
}

/// Seconds spent in each phase.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobPhases {
    /// The initial copy.
    pub copying_s: f64,
    /// Replicating outstanding dirty extents while writes go to both.
    pub mirroring_s: f64,
    /// Comparing both images.
    pub verify_s: f64,
    /// From the decision to switch to the durable record.
    pub commit_s: f64,
}

/// How the switch went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobSwitch {
    /// From the decision to the durable commit record, in microseconds.
    pub commit_us: u64,
    /// The longest that a guest request took between the decision and the end of the switch, in microseconds.
    pub longest_guest_wait_us: u64,
}

/// What a finished move did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// The job as it ended.
    pub job: Job,
    /// When it was started, RFC 3339, UTC.
    pub started: String,
    /// When it ended, RFC 3339, UTC.
    pub ended: String,
    /// The disk's generation before and after.
    pub generation: [u64; 2],
    /// SHA-256 over the journal's records up to here, in hexadecimal: two receipts of one move agree in it.
    pub journal_sha256: String,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts from 1 in each run of the daemon.
    pub seq: u64,
    /// When, RFC 3339, UTC.
    pub time: String,
    /// `disk-attached`, `disk-detached`, `disk-connected`, `disk-disconnected`, `disk-failed`, `disk-snapshot`,
    /// `disk-resized`, `disk-released`, `disk-reclaimed`, `job-state`.
    pub kind: String,
    /// The disk that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The job that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// The job's new state, the reason, and so on.
    pub message: String,
}

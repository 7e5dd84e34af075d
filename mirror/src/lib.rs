//! The move of a disk, as a pure state machine.
//!
//! [`Machine`] decides; its caller does. What happens outside (a copy ended, a guest wants to write, a record is
//! durable) comes in as an [`Event`], and what is to be done comes out as [`Action`]s. There is no clock, no file, no
//! thread and no await in this room, so a seed can drive a move through any interleaving (see the simulator in
//! `tests/mirror`), and the same code runs in the daemon.
//!
//! ```text
//!   after-copy:  Plan ─► Tracked ─► scan ─► copy all ─► Mirrored ─► copy what is dirty ─► synced
//!   from-start:  Plan ─► Mirrored ─► scan ─► copy all ──────────────────────────────────► synced
//!
//!   synced ─► verify ─► (switch) ─► flush target ─► Committed ─► Target ─► finish ─► delete source ─► Done
//!   copy-only:            synced ─► verify ─► (switch) ─► Source ─► flush target ─► finish ─► Done
//!   cancel, failure before the commit:            Source ─► discard target ─► Cancelled | Failed
//! ```
//!
//! # What holds at every moment
//!
//! * **M1** Each extent is equal on both sides, or dirty, or in flight.
//! * **M2** Where writes are mirrored, no guest write and no copy are in flight on the same extent, and guest writes
//!   that overlap are done one after the other.
//! * **M3** Dirty is cleared before a copy is asked for; any failure sets it again.
//! * **M4** A guest write is completed when its extents are dirty, or when it is on both disks.
//! * **M5** Tracking is live before the source is scanned.
//! * **M6** The commit is asked for only when nothing is dirty, in flight as a copy, or begun under an older route.
//!   From then until it is known to be durable no write is completed that is not on both disks.
//! * **M7** Every exit leaves exactly one authoritative disk; before the commit a target's error is never the guest's.
//! * **M8** Nothing that a failed attempt did is relied on by the next one.
//! * **M9** A guest's flush is durable on each disk that could become authoritative (see [`Event::FlushFailed`]).
//! * **M10** The source is deleted only when the target is verified as asked, finished, and recorded as finished.
//!
//! # What a guest write to both kinds of extents does
//!
//! A write that touches dirty extents only goes to the source: the extents stay dirty, and a later copy takes them
//! along. One that touches any clean extent goes to both disks, and the dirty extents among its own *stay dirty*. The
//! clean ones stay equal since both sides got the bytes; the dirty ones may hold anything on the target until a later
//! copy, which cannot be in flight at the same time. So while mirroring nothing but a failure can enlarge the dirty
//! set, and the move ends.
//!
//! # Order among writes and copies
//!
//! Guest writes and copies stand in one queue. Each runs as soon as nothing *earlier* that conflicts with it is still
//! there (bytes for two writes, extents where a copy is involved). Everything waits for earlier ones only, so nothing
//! can wait in a circle and nothing starves: a copy that only finds extents with guest writes on them queues up
//! behind these, and the guest's next writes queue up behind the copy.
//!
//! # What the caller owes
//!
//! * Actions are carried out in the order in which they are given. In particular [`Action::SetRoute`] is visible to all
//!   workers before a [`Action::CompleteWrite`] that follows it is told to the guest.
//! * A discard leaves zeroes behind, on both sides.
//! * A copy makes the target equal to what the source held at some time since the copy was asked for: zeroes too have
//!   to be written or discarded on the target unless it is known to read as zeroes there.
//! * Reads follow the route: source under every route but [`Route::Target`].
//!
//! This room must not know formats of files, virtio, HTTP, or the time of day.
#![forbid(unsafe_code)]

mod config;
mod event;
mod journal;
mod latency;
mod machine;
mod progress;

pub use config::{
    BYTES_PER_EXTENT_MAX, BYTES_PER_EXTENT_MIN, Config, ConfigError, MirrorMode, OnTargetError, Plan,
    SwitchMode, Verify,
};
pub use event::{
    Action, CopyId, CopyResult, Event, ExtentRange, Route, Side, Tick, VerifyResult, WriteId, WriteKind,
    WriteTo,
};
pub use journal::{
    JournalError, Receipt, Record, RecordedOptions, RecordedPhase, Recovery, Tail, decode_all, encode,
    recover,
};
pub use latency::Latencies;
pub use machine::Machine;
pub use progress::{JobState, PauseReason, Progress};
pub use roaring::RoaringBitmap;

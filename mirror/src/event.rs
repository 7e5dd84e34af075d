//! What comes in and what goes out.

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use crate::{JobState, Latencies, Record};

/// A point in time: microseconds since any fixed moment of the caller's choice. It never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// This point in time, `us` microseconds later.
    pub const fn plus_us(self, us: u64) -> Self {
        Self(self.0.saturating_add(us))
    }

    /// Microseconds since `earlier`, 0 when that is later.
    pub const fn us_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A guest write's (or flush's) name, chosen by the caller, unique among those in flight.
pub type WriteId = u64;
/// A copy's or verification's name, chosen by the machine, never used twice.
pub type CopyId = u64;

/// Extents that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExtentRange {
    /// The first one.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl ExtentRange {
    /// The extents that `len` bytes at `offset` touch; none when `len` is 0.
    ///
    /// # Panics
    /// When the range ends beyond 64 bits, or beyond 2^32 - 1 extents.
    pub fn touched_by(offset: u64, len: u64, extent_size: u64) -> Self {
        let end = offset.checked_add(len).expect("a request that was checked against the disk's size");
        let first = offset / extent_size;
        let count = if len == 0 { 0 } else { end.div_ceil(extent_size) - first };
        Self {
            first: u32::try_from(first).expect("extents are numbered in 32 bits"),
            count: u32::try_from(count).expect("extents are numbered in 32 bits"),
        }
    }

    /// One past the last one.
    pub fn end(self) -> u32 {
        self.first.checked_add(self.count).expect("extents are numbered in 32 bits")
    }

    /// Whether this one is among them.
    pub fn contains(self, extent: u32) -> bool {
        extent.checked_sub(self.first).is_some_and(|ahead| ahead < self.count)
    }

    /// Whether any extent is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.count > 0 && other.count > 0 && self.first < other.end() && other.first < self.end()
    }
}

/// What the data path does with guest requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// All goes to the source; nothing is told to the machine.
    Source,
    /// All goes to the source. When a write, write zeroes or discard has ended (well or not) and before the guest is told,
    /// [`Event::Dirtied`] is delivered.
    Tracked,
    /// Reads go to the source. Writes, write zeroes and discards ask by [`Event::WriteBegin`] and wait for
    /// [`Action::StartWrite`], and then by [`Event::WriteEnd`] for [`Action::CompleteWrite`].
    Mirrored,
    /// All goes to the target; nothing is told to the machine.
    Target,
}

/// One of the two images of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The image that the disk is moved from.
    Source,
    /// The image that the disk is moved to.
    Target,
}

/// What a guest does to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WriteKind {
    /// Bytes.
    Write,
    /// Write zeroes.
    Zeroes,
    /// Discard, which leaves zeroes behind on both sides.
    Discard,
}

/// Where a guest write is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WriteTo {
    /// To the source; its extents are dirty (or the target no longer matters).
    SourceOnly,
    /// To both disks, with the same bytes (copied once, before, since the guest may change its buffer).
    Both,
}

/// How a copy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyResult {
    /// The target holds what the source holds (or held at some time since the copy was asked for).
    Done {
        /// Bytes that were written to the target.
        bytes_written: u64,
        /// Bytes that were zeroes, so that nothing had to be written for them.
        bytes_zero: u64,
    },
    /// The source could not be read.
    SourceError(String),
    /// The target could not be written.
    TargetError(String),
    /// The target has no space left.
    TargetFull(String),
}

/// How a verification ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerifyResult {
    /// Both sides read the same.
    Equal,
    /// They differ.
    Different {
        /// The first byte of the disk that differs.
        offset: u64,
    },
    /// The source could not be read.
    SourceError(String),
    /// The target could not be read.
    TargetError(String),
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The move is to begin. Nothing touches the target before the plan is durable; from the first [`Action::SetRoute`] on it
    /// exists under its temporary name and reads as zeroes, but for what a move that goes on after a restart has copied.
    Start,
    /// What the caller has to do before [`Event::Start`] has failed: the move does not begin.
    PreparationFailed(String),
    /// The data path uses this route, and every request begun under an earlier one has ended (its `Dirtied` or `WriteEnd`
    /// was delivered). Only the route that was asked for last counts; others may be told or not.
    RouteSettled(Route),
    /// The extents that the source holds; all others read as zeroes on both sides. (For a move that goes on after a
    /// restart: the extents that may differ.)
    Scanned(RoaringBitmap),
    /// The source could not be scanned.
    ScanFailed(String),
    /// [`Route::Tracked`]: a guest write, write zeroes or discard ended, well or not.
    Dirtied(ExtentRange),
    /// [`Route::Mirrored`]: a guest write wants to start.
    WriteBegin {
        /// Its name until `CompleteWrite`.
        id: WriteId,
        /// The first byte of the disk.
        offset: u64,
        /// How many bytes. The range lies within the disk.
        len: u64,
        /// What it does.
        kind: WriteKind,
    },
    /// A guest write that was started has ended on each side that it went to.
    WriteEnd {
        /// Its name.
        id: WriteId,
        /// Whether it succeeded on the source.
        source_ok: bool,
        /// How it ended on the target; `None` if it went to the source only.
        target: Option<Result<(), String>>,
    },
    /// A guest's flush under [`Route::Mirrored`] that went to both disks failed on the target (on the source it may have
    /// succeeded or failed). It is answered by [`Action::CompleteWrite`] with this id, at once or, while the commit is
    /// being recorded, later.
    ///
    /// What a failed flush has lost no later flush brings back, though it may report success. So from the first one that
    /// fails until [`Action::FlushSourceOnly`] every flush of the target that ends counts as failed: the guest's own, and
    /// that of [`Action::FlushTarget`].
    FlushFailed {
        /// Its name, of the same kind as a write's.
        id: WriteId,
        /// What the target said.
        error: String,
    },
    /// A copy ended.
    CopyEnd {
        /// Which one.
        id: CopyId,
        /// How.
        result: CopyResult,
    },
    /// A verification ended.
    VerifyEnd {
        /// Which one.
        id: CopyId,
        /// How.
        result: VerifyResult,
    },
    /// [`Action::FlushTarget`] is done: all that had reached the target when it was asked for is durable.
    TargetFlushed(Result<(), String>),
    /// The record last asked for is durable. An error says nothing about whether it is.
    Recorded(Result<(), String>),
    /// [`Action::FinishTarget`] is done.
    TargetFinished(Result<(), String>),
    /// [`Action::DeleteSource`] is done.
    SourceDeleted(Result<(), String>),
    /// [`Action::DiscardTarget`] is done.
    TargetDiscarded(Result<(), String>),
    /// No further copy, verification or commit, until `Resume`. Ignored once the commit was asked for.
    Pause,
    /// Goes on after a pause, whoever asked for it, and after a target's error.
    Resume,
    /// Back to the source. Ignored once the commit was asked for (for a copy, once it is recorded as complete).
    Cancel,
    /// The target may become the disk as soon as both sides are equal.
    Switch,
    /// Another limit, in bytes a second.
    SetBandwidth(Option<u64>),
    /// Another budget: what the guest's 99th percentile may be, in microseconds.
    SetMaxGuestP99(Option<u64>),
    /// How long the guest's reads and writes took that ended since this was last told. To be told about every 50 ms, of none
    /// too, for as long as the move lasts; where it never is, the guest counts as idle.
    GuestServed(Latencies),
    /// Time has passed ([`Action::Wake`]).
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Use this route from now on, and say so with [`Event::RouteSettled`].
    SetRoute(Route),
    /// Find the extents that the source holds: [`Event::Scanned`].
    Scan,
    /// Make the target equal to the source: [`Event::CopyEnd`].
    Copy {
        /// Its name.
        id: CopyId,
        /// Which extents. The last one may end beyond the disk.
        range: ExtentRange,
    },
    /// Compare both sides: [`Event::VerifyEnd`].
    Verify {
        /// Its name.
        id: CopyId,
        /// Which extents. The last one may end beyond the disk.
        range: ExtentRange,
    },
    /// The guest's write may go.
    StartWrite {
        /// Its name.
        id: WriteId,
        /// Where to.
        to: WriteTo,
    },
    /// The guest may be told.
    CompleteWrite {
        /// Its name.
        id: WriteId,
        /// Whose result the guest gets: the source's before the commit, the target's after it.
        result_of: Side,
    },
    /// Make all that has reached the target durable: [`Event::TargetFlushed`]. From before that flush begins a guest's
    /// flush under [`Route::Mirrored`] goes to both disks (before, it goes to the source only).
    FlushTarget,
    /// From here on a guest's flush under [`Route::Mirrored`] goes to the source only again, and flushes of the target that
    /// failed before are forgotten: what they may have lost is dirty.
    FlushSourceOnly,
    /// Append this to the journal, durably: [`Event::Recorded`]. One at a time.
    Record(Record),
    /// Give the target its final name, durably, and make it the disk's image in the disk's record (but for a copy):
    /// [`Event::TargetFinished`]. It may be asked for again and has to be fine with being done already.
    FinishTarget,
    /// Delete the source: [`Event::SourceDeleted`]. It may be asked for again.
    DeleteSource,
    /// Delete the target under its temporary name: [`Event::TargetDiscarded`]. It may be asked for again.
    DiscardTarget,
    /// Apply [`Event::Tick`] at this time or soon after it. One alarm is enough: of several, the earliest is kept, and each
    /// tick asks anew for what is still to be waited for.
    Wake(Tick),
    /// The job's state is now another one.
    StateChanged(JobState),
}

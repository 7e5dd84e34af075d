//! The machine itself: its state, and which event goes where.
//!
//! ```text
//!   Queued ─► Planning ─► Opening ─► Copying ─► Mirroring ◄─► Synced ─► Committing ─► Committed ─► Ended(Done)
//!                                        (from start: ─┘)        └────► Detaching (a copy) ──────────┘
//!   before the decision, from anywhere: Unwinding ─► Ended(Cancelled | Failed)
//! ```
//!
//! An event first changes the state, then what became ready in the queue is told to go, and then `pump` looks at what
//! can be begun. Each of these may be done twice without harm.

mod commit;
mod copier;
mod governor;
mod pace;
mod queue;
mod status;
#[cfg(test)]
mod tests;
mod unwind;
mod verifier;
mod writes;

use std::collections::VecDeque;

use roaring::RoaringBitmap;

use crate::{
    Action, Config, CopyId, Event, ExtentRange, JobState, MirrorMode, PauseReason, Record, Route, Tick,
    WriteId,
};
use copier::Counts;
use governor::{Governor, Limits};
use pace::{Backoff, Pace, RateMeter};
use queue::{Queue, Work};
use status::{Clocks, Shown};
use unwind::Outcome;
use verifier::Verifier;

/// One move of one disk.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    extents: u32,
    stage: Stage,
    /// The route that was asked for last.
    route: Route,
    /// Whether the data path uses it and all that began before has ended.
    settled: bool,
    scan: Scan,
    /// Extents that may differ and are not being copied.
    dirty: RoaringBitmap,
    queue: Queue,
    /// Where the copier's sweep is.
    cursor: u32,
    /// The sweep began again at the disk's start, and nothing was copied since.
    wrapped: bool,
    /// The first copy of everything is through.
    is_initial_done: bool,
    verifier: Verifier,
    flush: Flush,
    /// Guest flushes go to both disks.
    flushes_both: bool,
    decision: Decision,
    /// Writes (and flushes) that ended, but not well on both disks, while it is not known whether the commit is durable.
    held: Vec<WriteId>,
    next_id: CopyId,

    is_paused: bool,
    is_switch_asked: bool,
    /// An error of the target paused the move.
    error_pause: Option<PauseReason>,
    /// After an error of the target: when to try again.
    retry_at: Option<Tick>,
    target_backoff: Backoff,

    /// The record that is being made durable.
    record: Option<Record>,
    records_wanted: VecDeque<Record>,
    is_synced_recorded: bool,
    /// A step of an ending that failed and is to be tried again.
    again: Option<(Tick, Again)>,
    step_backoff: Backoff,
    is_source_deleted: bool,
    /// On the way back: nothing uses the target any more.
    has_left_target: bool,

    pace: Pace,
    governor: Governor,
    /// When the bandwidth limit, or the guest, allows more.
    pace_at: Option<Tick>,
    /// The caller's alarm: the earliest [`Action::Wake`] since the last [`Event::Tick`].
    wake_at: Option<Tick>,
    counts: Counts,
    meter: RateMeter,
    clocks: Clocks,
    shown: Shown,
    warning: Option<String>,
}

/// Where the move is.
#[derive(Debug, Clone, PartialEq)]
enum Stage {
    Queued,
    /// The plan is being recorded.
    Planning,
    /// Tracking (or mirroring) is being switched on, and then the source is scanned.
    Opening,
    /// The first copy, while guest writes go to the source only.
    Copying,
    /// Guest writes are mirrored, or about to be; something is dirty or in flight.
    Mirroring,
    /// Nothing is dirty and everything is mirrored.
    Synced,
    /// The commit record was asked for: there is no way back.
    Committing,
    /// The target is the disk.
    Committed,
    /// A copy at one point in time: guest requests are back on the source.
    Detaching,
    /// Going back to the source.
    Unwinding(Outcome),
    /// Nothing will happen any more.
    Ended(JobState),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scan {
    NotAsked,
    Asked,
    Done,
}

/// The flush of the target before the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    None,
    /// `covers_all`: nothing had to be copied since it was asked for.
    InFlight {
        covers_all: bool,
    },
    Done,
}

/// The record after which there is no way back: the commit, or the completion of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Open,
    /// Asked for; it may be durable or not.
    Asked,
    Known,
}

/// What is tried again after a failure.
#[derive(Debug, Clone, PartialEq)]
enum Again {
    Record(Box<Record>),
    Finish,
    DeleteSource,
    DiscardTarget,
}

impl Machine {
    /// A move that has not begun.
    ///
    /// # Panics
    /// When the configuration does not pass [`Config::check`].
    pub fn new(config: Config) -> Self {
        if let Err(error) = config.check() {
            panic!("a machine needs a checked configuration: {error}");
        }
        let extents = config.extent_count();
        let limits = Limits {
            extent_size: config.extent_size,
            copy_bytes_max: config.copy_bytes_max,
            in_flight_max: config.copies_in_flight_max,
        };
        Self {
            extents,
            stage: Stage::Queued,
            route: Route::Source,
            settled: true,
            scan: Scan::NotAsked,
            dirty: RoaringBitmap::new(),
            queue: Queue::new(),
            cursor: 0,
            wrapped: true,
            is_initial_done: false,
            verifier: Verifier::new(&config),
            flush: Flush::None,
            flushes_both: false,
            decision: Decision::Open,
            held: Vec::new(),
            next_id: 0,
            is_paused: false,
            is_switch_asked: false,
            error_pause: None,
            retry_at: None,
            target_backoff: Backoff::default(),
            record: None,
            records_wanted: VecDeque::new(),
            is_synced_recorded: false,
            again: None,
            step_backoff: Backoff::default(),
            is_source_deleted: false,
            has_left_target: false,
            pace: Pace::new(config.bandwidth),
            governor: Governor::new(limits, config.max_guest_p99_us),
            pace_at: None,
            wake_at: None,
            counts: Counts::default(),
            meter: RateMeter::default(),
            clocks: Clocks::default(),
            shown: Shown::Queued,
            warning: None,
            config,
        }
    }

    /// Takes one event and appends what is to be done, in order, to `actions`.
    ///
    /// # Panics
    /// When the caller breaks its side of the contract: an end of something that was not begun, a write outside the disk,
    /// a write that would need mirroring under a route that never mirrored.
    pub fn apply(&mut self, now: Tick, event: Event, actions: &mut Vec<Action>) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
        }
        match event {
            Event::WriteBegin { id, offset, len, kind: _ } => self.write_begun(id, offset, len),
            Event::WriteEnd { id, source_ok, target } => {
                self.write_ended(now, id, source_ok, target, actions)
            }
            Event::Dirtied(range) => self.dirtied(range),
            other => self.apply_rare(now, other, actions),
        }
        self.start_ready(now, actions);
        self.pump(now, actions);
        self.show(now, actions);
        self.ask_to_be_woken(now, actions);
    }

    /// The caller copied this many bytes from `begun` until now, before the move began: the guest is to be spared by that, too.
    /// Nothing more is to be copied so before [`Machine::may_copy_beside`] says that it may.
    pub fn copied_beside(&mut self, begun: Tick, now: Tick, bytes: u64) {
        self.governor.did_beside(begun, now, bytes);
    }

    /// Whether the caller may go on with what it copies before the move begins; else when to ask again, or sooner.
    ///
    /// # Errors
    /// That time.
    pub fn may_copy_beside(&mut self, now: Tick) -> Result<(), Tick> {
        self.governor.free_at(now).map_or(Ok(()), Err)
    }

    fn apply_rare(&mut self, now: Tick, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::WriteBegin { .. } | Event::WriteEnd { .. } | Event::Dirtied(_) => {
                unreachable!("handled before")
            }
            Event::Start => self.start(now, actions),
            Event::RouteSettled(route) => self.route_settled(route, actions),
            Event::Scanned(extents) => self.scanned(&extents),
            Event::ScanFailed(error) => {
                self.scan = Scan::NotAsked;
                self.fail(format!("the source could not be scanned: {error}"), actions);
            }
            Event::PreparationFailed(why) => self.fail(why, actions),
            Event::FlushFailed { id, error } => self.guest_flush_failed(now, id, error, actions),
            Event::CopyEnd { id, result } => self.copy_ended(now, id, result, actions),
            Event::VerifyEnd { id, result } => self.verify_ended(now, id, result, actions),
            Event::TargetFlushed(result) => self.target_flushed(now, result, actions),
            Event::Recorded(result) => self.recorded(now, result, actions),
            Event::TargetFinished(result) => self.target_finished(now, result, actions),
            Event::SourceDeleted(result) => self.source_deleted(now, result, actions),
            Event::TargetDiscarded(result) => self.target_discarded(now, result, actions),
            Event::Pause => self.is_paused = self.is_open(),
            Event::Resume => self.resume(),
            Event::Cancel => self.cancel(actions),
            Event::Switch => self.is_switch_asked = true,
            Event::SetBandwidth(limit) => self.pace.set(now, limit),
            Event::SetMaxGuestP99(budget_us) => self.governor.set_budget(now, budget_us),
            Event::GuestServed(latencies) => self.governor.hear(now, latencies),
            // The caller's alarm has gone off, and it has no other: what is still waited for is asked for anew.
            Event::Tick => self.wake_at = None,
        }
    }

    fn start(&mut self, now: Tick, actions: &mut Vec<Action>) {
        if self.stage == Stage::Queued {
            self.stage = Stage::Planning;
            self.clocks.begin(now);
            self.ask_record(Record::plan(&self.config), actions);
        }
    }

    /// The plan is durable: tracking has to be live before the source is scanned (M5).
    fn open(&mut self, actions: &mut Vec<Action>) {
        self.stage = Stage::Opening;
        match self.config.mode {
            MirrorMode::AfterCopy => self.set_route(Route::Tracked, actions),
            MirrorMode::FromStart => self.set_route(Route::Mirrored, actions),
        }
    }

    fn set_route(&mut self, route: Route, actions: &mut Vec<Action>) {
        let is_allowed = match (self.route, route) {
            (Route::Source, Route::Tracked | Route::Mirrored) => self.stage == Stage::Opening,
            (Route::Tracked, Route::Mirrored) => self.settled && self.scan == Scan::Done,
            (Route::Tracked | Route::Mirrored, Route::Source) => self.decision == Decision::Open,
            (Route::Mirrored, Route::Target) => self.settled && self.decision == Decision::Known,
            _ => false,
        };
        assert!(is_allowed, "no move goes from {:?} to {route:?} in {:?}", self.route, self.stage);
        self.route = route;
        self.settled = false;
        actions.push(Action::SetRoute(route));
    }

    fn route_settled(&mut self, route: Route, actions: &mut Vec<Action>) {
        if route != self.route || self.settled {
            return;
        }
        self.settled = true;
        match (&self.stage, route) {
            (Stage::Opening, Route::Tracked | Route::Mirrored) => {
                self.scan = Scan::Asked;
                actions.push(Action::Scan);
            }
            (Stage::Committed, Route::Target) => {
                assert!(
                    !self.queue.has_writes() && self.held.is_empty(),
                    "settled with mirrored writes in flight"
                );
                actions.push(Action::FinishTarget);
            }
            (Stage::Detaching | Stage::Unwinding(_), Route::Source) => {
                assert!(!self.queue.has_writes(), "settled with mirrored writes in flight");
            }
            _ => {}
        }
    }

    fn scanned(&mut self, held_by_source: &RoaringBitmap) {
        assert!(self.scan == Scan::Asked, "a scan ended that was not asked for");
        assert!(
            held_by_source.max().is_none_or(|last| last < self.extents),
            "the scan found extents beyond the disk"
        );
        self.scan = Scan::Done;
        if self.stage != Stage::Opening {
            return;
        }
        self.dirty |= held_by_source;
        self.counts.bytes_skipped_zero = self.config.disk_size - self.bytes_of_dirty();
        self.stage = match self.route {
            Route::Tracked => Stage::Copying,
            _ => Stage::Mirroring,
        };
    }

    fn dirtied(&mut self, range: ExtentRange) {
        assert!(range.end() <= self.extents, "{range:?} is beyond the disk's {} extents", self.extents);
        if !self.is_open() {
            // On the way back to the source nothing is copied any more. After a decision all was mirrored: such a
            // write would be lost on the target.
            assert!(
                self.decision == Decision::Open,
                "a tracked write ended after its route was settled away"
            );
            return;
        }
        self.mark_dirty(range);
    }

    /// The extents may differ (again). Whatever was verified of them has to be verified anew.
    fn mark_dirty(&mut self, range: ExtentRange) {
        if range.count > 0 {
            self.dirty.insert_range(range.first..range.end());
            self.verifier.outdate(range);
        }
    }

    /// Nothing that was written to the target can be relied on: after a failed flush it may be lost, even if a later
    /// flush succeeds.
    fn mark_all_dirty(&mut self, actions: &mut Vec<Action>) {
        self.dirty.insert_range(0..self.extents);
        self.verifier.restart();
        self.flushes_both = false;
        actions.push(Action::FlushSourceOnly);
    }

    /// Whether there is a way back and the move has not taken it.
    fn is_open(&self) -> bool {
        let is_under_way = match &self.stage {
            Stage::Queued
            | Stage::Planning
            | Stage::Opening
            | Stage::Copying
            | Stage::Mirroring
            | Stage::Synced => true,
            Stage::Committing
            | Stage::Committed
            | Stage::Detaching
            | Stage::Unwinding(_)
            | Stage::Ended(_) => false,
        };
        is_under_way && self.decision == Decision::Open
    }

    /// Whether an error of the target stops the move for now. Guest writes then go to the source only, since the
    /// target would only slow them down; their extents are dirty until the move goes on.
    fn is_target_suspended(&self) -> bool {
        self.error_pause.is_some() || self.retry_at.is_some()
    }

    fn may_work(&self) -> bool {
        self.is_open() && !self.is_paused && !self.is_target_suspended()
    }

    fn resume(&mut self) {
        self.is_paused = false;
        self.error_pause = None;
        self.retry_at = None;
        self.target_backoff.reset();
    }

    /// Equal on both sides, with everything that guests write from now on on both sides too.
    fn is_synced(&self) -> bool {
        self.scan == Scan::Done
            && self.route == Route::Mirrored
            && self.settled
            && self.dirty.is_empty()
            && self.queue.copies() == 0
    }

    /// Begins whatever can be begun.
    fn pump(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.pace_at = None;
        if self.queue.has_waiting_others() && !self.may_work() {
            self.drop_waiting_others();
            self.start_ready(now, actions);
        }
        if self.stage == Stage::Synced && !self.is_synced() {
            self.leave_synced(now, actions);
        }
        if matches!(self.stage, Stage::Copying | Stage::Mirroring) && self.may_work() {
            self.pump_copies(now, actions);
            if self.stage == Stage::Mirroring && self.is_synced() {
                self.enter_synced(actions);
            }
        }
        if self.stage == Stage::Synced && self.may_work() {
            self.pump_synced(now, actions);
        }
        self.pump_endings(now, actions);
    }

    /// Tells what has become ready in the queue to go.
    fn start_ready(&mut self, now: Tick, actions: &mut Vec<Action>) {
        while let Some(slot) = self.queue.next_ready() {
            let entry = *self.queue.entry(slot);
            match entry.work {
                Work::Write(id) => self.start_write(slot, id, entry.extents, actions),
                work if !self.may_work() => self.undo_waiting(work, slot),
                Work::Copy(id) => self.start_copy(now, id, entry.extents, actions),
                Work::Guard(id) => self.start_guarded(now, slot, id, entry.extents, actions),
            }
        }
    }

    /// Takes waiting copies and guards out of the queue: guest writes must not wait for them while the move stands.
    fn drop_waiting_others(&mut self) {
        let mut dropped = Vec::new();
        self.queue.remove_waiting_others(|entry| dropped.push(entry));
        for entry in dropped {
            self.forget(entry.work, entry.extents);
        }
    }

    fn undo_waiting(&mut self, work: Work, slot: queue::Slot) {
        let entry = self.queue.remove(slot);
        self.forget(work, entry.extents);
    }

    /// A copy or guard that never ran: its extents are still dirty, or still to be verified.
    fn forget(&mut self, work: Work, range: ExtentRange) {
        self.pace.give_back(self.bytes_of(range));
        if matches!(work, Work::Guard(_)) {
            self.verifier.put_back(range);
        }
    }

    /// When the next copy or verification may begin, unless that is now.
    fn free_at(&mut self, now: Tick) -> Option<Tick> {
        self.pace.free_at(now).max(self.governor.free_at(now))
    }

    /// Bytes of the disk in these extents.
    fn bytes_of(&self, range: ExtentRange) -> u64 {
        let start = u64::from(range.first) * self.config.extent_size;
        let end = u64::from(range.end()) * self.config.extent_size;
        end.min(self.config.disk_size).saturating_sub(start)
    }

    fn bytes_of_dirty(&self) -> u64 {
        let last = self.extents - 1;
        let bytes = self.dirty.len() * self.config.extent_size;
        let missing = u64::from(self.extents) * self.config.extent_size - self.config.disk_size;
        if self.dirty.contains(last) { bytes - missing } else { bytes }
    }

    fn next_id(&mut self) -> CopyId {
        self.next_id += 1;
        self.next_id
    }

    fn ask_to_be_woken(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let wanted = [self.retry_at, self.pace_at, self.again.as_ref().map(|&(at, _)| at)];
        let Some(at) = wanted.into_iter().flatten().min() else { return };
        if self.wake_at.is_none_or(|known| at < known) {
            self.wake_at = Some(at.max(now));
            actions.push(Action::Wake(at.max(now)));
        }
    }
}

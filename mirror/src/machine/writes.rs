//! Guest writes while they are mirrored.

use super::queue::{Slot, Work};
use super::{Decision, Machine, Scan, Stage};
use crate::{Action, ExtentRange, Route, Side, Tick, WriteId, WriteTo};

impl Machine {
    pub(super) fn write_begun(&mut self, id: WriteId, offset: u64, len: u64) {
        let end = offset.checked_add(len).filter(|&end| end <= self.config.disk_size);
        let Some(end) = end else {
            panic!(
                "write {id} of {len} bytes at {offset} is not within the disk's {} bytes",
                self.config.disk_size
            )
        };
        let extents = ExtentRange::touched_by(offset, len, self.config.extent_size);
        self.assert_may_begin(id);
        self.queue.insert(Work::Write(id), extents, (offset, end));
        if self.route == Route::Source {
            // Back on the source the target no longer matters, or is complete without this write.
            self.queue.release_writes();
        }
    }

    /// A worker that saw the mirrored route may ask late, but not later than the next route is settled.
    fn assert_may_begin(&self, id: WriteId) {
        let is_fine = match self.route {
            Route::Mirrored => true,
            Route::Target => !self.settled,
            Route::Tracked => false,
            Route::Source => self.stage != Stage::Queued,
        };
        assert!(is_fine, "write {id} asks to be mirrored while the route is {:?}", self.route);
    }

    /// The write's turn has come: nothing that it could collide with is in flight.
    pub(super) fn start_write(
        &mut self,
        slot: Slot,
        id: WriteId,
        extents: ExtentRange,
        actions: &mut Vec<Action>,
    ) {
        let to = self.choose(extents);
        self.queue.set_route(slot, to);
        self.verifier.touch(extents);
        actions.push(Action::StartWrite { id, to });
    }

    fn choose(&mut self, extents: ExtentRange) -> WriteTo {
        let span = extents.first..extents.end();
        match self.route {
            Route::Source => WriteTo::SourceOnly,
            Route::Target => WriteTo::Both,
            Route::Tracked => unreachable!("no write asks to be mirrored while it is tracked"),
            Route::Mirrored if self.decision != Decision::Open => {
                assert!(self.dirty.is_empty(), "the commit was asked for while something was dirty");
                WriteTo::Both
            }
            Route::Mirrored if self.scan != Scan::Done || self.is_target_suspended() => {
                self.mark_dirty(extents);
                WriteTo::SourceOnly
            }
            Route::Mirrored if extents.count > 0 && self.dirty.contains_range(span) => WriteTo::SourceOnly,
            Route::Mirrored => WriteTo::Both,
        }
    }

    pub(super) fn write_ended(
        &mut self,
        now: Tick,
        id: WriteId,
        source_ok: bool,
        target: Option<Result<(), String>>,
        actions: &mut Vec<Action>,
    ) {
        let Some(slot) = self.queue.write_slot(id) else { panic!("write {id} ended without having begun") };
        let entry = self.queue.remove(slot);
        assert!(entry.running, "write {id} ended before it was told to start");
        assert!(
            target.is_some() == (entry.to == WriteTo::Both),
            "write {id} did not go where it was told to"
        );
        let target_error = target.and_then(Result::err);
        if entry.to == WriteTo::Both && target_error.is_none() {
            self.counts.bytes_mirrored += entry.bytes.1 - entry.bytes.0;
        }
        match self.decision {
            Decision::Known if self.route == Route::Target => {
                actions.push(Action::CompleteWrite { id, result_of: Side::Target });
            }
            Decision::Asked if self.route == Route::Mirrored => {
                assert!(
                    entry.to == WriteTo::Both,
                    "write {id} is on the source only while the commit is recorded"
                );
                if source_ok && target_error.is_none() {
                    actions.push(Action::CompleteWrite { id, result_of: Side::Source });
                } else {
                    // Either disk may be the authority now. What the guest is told has to wait until it is known.
                    self.held.push(id);
                }
            }
            _ => {
                self.write_ended_undecided(now, entry.extents, entry.to, source_ok, target_error, actions);
                actions.push(Action::CompleteWrite { id, result_of: Side::Source });
            }
        }
    }

    /// The source is the disk. Unless the write is on both disks, its extents have to be dirty before the guest is told (M4).
    fn write_ended_undecided(
        &mut self,
        now: Tick,
        extents: ExtentRange,
        to: WriteTo,
        source_ok: bool,
        target_error: Option<String>,
        actions: &mut Vec<Action>,
    ) {
        if !self.is_open() {
            if let (Stage::Detaching, Some(error)) = (&self.stage, target_error) {
                self.fail(format!("the target failed as the copy was being completed: {error}"), actions);
            }
            return;
        }
        assert!(self.route == Route::Mirrored, "a mirrored write ended under {:?}", self.route);
        match to {
            WriteTo::SourceOnly => {
                let is_dirty = self.dirty.contains_range(extents.first..extents.end());
                assert!(is_dirty, "{extents:?} were copied while a write to them was in flight");
            }
            WriteTo::Both if source_ok && target_error.is_none() => {}
            WriteTo::Both => self.mark_dirty(extents),
        }
        if let Some(error) = target_error {
            self.target_failed(now, error, actions);
        }
    }

    /// A guest's flush failed on the target: what it held may be lost there.
    pub(super) fn guest_flush_failed(
        &mut self,
        now: Tick,
        id: WriteId,
        error: String,
        actions: &mut Vec<Action>,
    ) {
        match self.decision {
            Decision::Known if self.route == Route::Target => {
                actions.push(Action::CompleteWrite { id, result_of: Side::Target });
            }
            Decision::Asked if self.route == Route::Mirrored => self.held.push(id),
            _ => {
                if self.is_open() {
                    self.mark_all_dirty(actions);
                    self.target_failed(now, error, actions);
                } else if self.stage == Stage::Detaching {
                    self.fail(format!("the target failed as the copy was being completed: {error}"), actions);
                }
                actions.push(Action::CompleteWrite { id, result_of: Side::Source });
            }
        }
    }
}

//! What is copied next, and what the end of a copy means.

use super::queue::Work;
use super::{Machine, Stage};
use crate::{
    Action, CopyId, CopyResult, ExtentRange, OnTargetError, PauseReason, Record, RecordedPhase, Route, Tick,
};

/// Bytes of a copy at most while guest writes may have to wait for it.
const MIRRORED_COPY_BYTES_MAX: u64 = 256 << 10;

/// What was done so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) bytes_copied: u64,
    pub(super) bytes_mirrored: u64,
    pub(super) bytes_skipped_zero: u64,
    pub(super) bytes_verified: u64,
    pub(super) passes: u32,
}

/// What a look for something to copy found.
enum Found {
    Run(ExtentRange),
    /// All that is dirty is being written by the guest (this is the first such extent) ...
    OnlyWritten(u32),
    /// ... or being copied or about to be.
    Nothing,
}

impl Machine {
    /// Starts copies until there are enough in flight, the limit is reached, or nothing is left.
    pub(super) fn pump_copies(&mut self, now: Tick, actions: &mut Vec<Action>) {
        let allowed = self.governor.copies();
        while self.queue.copies() < allowed.in_flight {
            if self.dirty.is_empty() {
                self.first_pass_may_be_through(actions);
                return;
            }
            self.pace_at = self.free_at(now);
            if self.pace_at.is_some() {
                return;
            }
            let range = match self.find_ahead(allowed.bytes) {
                Found::Run(range) => range,
                Found::OnlyWritten(_) | Found::Nothing if self.stage == Stage::Copying => {
                    self.first_pass_may_be_through(actions);
                    continue;
                }
                Found::OnlyWritten(extent) => ExtentRange { first: extent, count: 1 },
                Found::Nothing => return,
            };
            self.queue_copy(range);
            self.start_ready(now, actions);
        }
    }

    /// After the first sweep guest writes are mirrored, so that what is dirty by then can only become less.
    fn first_pass_may_be_through(&mut self, actions: &mut Vec<Action>) {
        if self.stage != Stage::Copying {
            return;
        }
        self.stage = Stage::Mirroring;
        self.is_initial_done = true;
        self.restart_sweep();
        self.set_route(Route::Mirrored, actions);
        self.ask_record(Record::Phase { phase: RecordedPhase::Mirroring }, actions);
    }

    fn restart_sweep(&mut self) {
        self.cursor = 0;
        self.wrapped = true;
    }

    /// The next thing to copy, of at most so many bytes: ahead of the sweep, else (but in the first sweep) from the start again.
    fn find_ahead(&mut self, bytes_max: u64) -> Found {
        let ahead = self.find(self.cursor..self.extents, bytes_max);
        if matches!(ahead, Found::Run(_)) || self.stage == Stage::Copying || self.cursor == 0 {
            return ahead;
        }
        let end = std::mem::take(&mut self.cursor);
        self.wrapped = true;
        match (self.find(0..end, bytes_max), ahead) {
            (Found::Nothing, ahead) => ahead,
            (behind, _) => behind,
        }
    }

    fn find(&self, span: std::ops::Range<u32>, bytes_max: u64) -> Found {
        let mut only_written = None;
        let mut at = span.start;
        while at < span.end {
            let Some(first) = self.dirty.range(at..span.end).next() else { break };
            match self.queue.holder(first) {
                None => return Found::Run(self.free_part(first, span.end, bytes_max)),
                Some((end, is_written)) => {
                    if is_written && only_written.is_none() {
                        only_written = Some(first);
                    }
                    at = end;
                }
            }
        }
        only_written.map_or(Found::Nothing, Found::OnlyWritten)
    }

    /// As much of the dirty run that begins at `first`, before `end`, as one copy may have and nothing in the queue holds.
    fn free_part(&self, first: u32, end: u32, bytes_max: u64) -> ExtentRange {
        let bytes_max = match self.route {
            Route::Mirrored => bytes_max.min(MIRRORED_COPY_BYTES_MAX.max(self.config.extent_size)),
            _ => bytes_max,
        };
        let count_max = u32::try_from(bytes_max / self.config.extent_size).unwrap_or(u32::MAX);
        let end_max = first.saturating_add(count_max).min(end);
        // No further than a copy may go: a run over all of a large disk would be followed for each copy.
        let run = self.dirty.range(first..end_max).next_range();
        let end_max = run.map_or(end_max, |run| run.end() + 1);
        let end = (first + 1..end_max).find(|&extent| self.queue.holder(extent).is_some()).unwrap_or(end_max);
        ExtentRange { first, count: end - first }
    }

    fn queue_copy(&mut self, range: ExtentRange) {
        self.pace.take(self.bytes_of(range));
        if self.wrapped {
            self.wrapped = false;
            self.counts.passes += 1;
        }
        self.cursor = range.end();
        let id = self.next_id();
        self.queue.insert(Work::Copy(id), range, (0, 0));
    }

    /// The copy's turn has come: no guest write to its extents is in flight where writes are mirrored.
    pub(super) fn start_copy(
        &mut self,
        now: Tick,
        id: CopyId,
        range: ExtentRange,
        actions: &mut Vec<Action>,
    ) {
        // One by one, since it is a few: a range is looked for in all of the set.
        let removed = (range.first..range.end()).filter(|extent| self.dirty.remove(*extent)).count();
        assert!(removed == range.count as usize, "copy {id} of {range:?}: only {removed} of them are dirty");
        self.verifier.touch(range);
        self.governor.begun(now);
        actions.push(Action::Copy { id, range });
    }

    pub(super) fn copy_ended(
        &mut self,
        now: Tick,
        id: CopyId,
        result: CopyResult,
        actions: &mut Vec<Action>,
    ) {
        let Some(slot) = self.queue.other_slot(id) else { panic!("copy {id} ended without having begun") };
        let entry = self.queue.remove(slot);
        assert!(entry.running && entry.work == Work::Copy(id), "copy {id} ended before it was told to start");
        let range = entry.extents;
        self.governor.ended(now, self.bytes_of(range));
        if let CopyResult::Done { bytes_written, bytes_zero } = result {
            self.counts.bytes_copied += bytes_written;
            self.counts.bytes_skipped_zero += bytes_zero;
            self.meter.note(now, self.bytes_of(range));
            if !self.is_target_suspended() {
                self.target_backoff.reset();
            }
            return;
        }
        if !self.is_open() {
            return;
        }
        self.mark_dirty(range);
        match result {
            CopyResult::Done { .. } => unreachable!("handled before"),
            CopyResult::SourceError(error) => {
                let offset = u64::from(range.first) * self.config.extent_size;
                self.fail(
                    format!("the source could not be read at byte {offset} or after: {error}"),
                    actions,
                );
            }
            CopyResult::TargetError(error) => self.target_failed(now, error, actions),
            CopyResult::TargetFull(error) => self.target_full(error, actions),
        }
    }

    /// The target failed: what is wrong there is dirty already, and the policy says how to go on.
    pub(super) fn target_failed(&mut self, now: Tick, error: String, actions: &mut Vec<Action>) {
        assert!(self.is_open(), "an error of the target in {:?} can't stop the move", self.stage);
        self.warning = Some(format!("the target failed: {error}"));
        match self.config.on_target_error {
            OnTargetError::Pause => {
                self.error_pause.get_or_insert(PauseReason::TargetError(error));
            }
            OnTargetError::Retry if self.retry_at.is_none() => {
                self.retry_at = Some(self.target_backoff.next(now))
            }
            OnTargetError::Retry => {}
            OnTargetError::Abort => self.fail(format!("the target failed: {error}"), actions),
        }
    }

    /// Trying again makes no space: somebody has to.
    fn target_full(&mut self, error: String, actions: &mut Vec<Action>) {
        if self.config.on_target_error == OnTargetError::Abort {
            return self.fail(format!("the target has no space left: {error}"), actions);
        }
        self.warning = Some(format!("the target has no space left: {error}"));
        self.error_pause = Some(PauseReason::Space(error));
    }
}

//! From equal sides to the end: flush, decision, finishing, deleting the source.

use super::unwind::{ATTEMPTS_MAX, Outcome};
use super::{Again, Decision, Flush, Machine, Stage};
use crate::{Action, Receipt, Record, RecordedPhase, Route, Side, SwitchMode, Tick, WriteTo};

impl Machine {
    pub(super) fn enter_synced(&mut self, actions: &mut Vec<Action>) {
        self.stage = Stage::Synced;
        self.is_initial_done = true;
        if !std::mem::replace(&mut self.is_synced_recorded, true) {
            self.ask_record(Record::Phase { phase: RecordedPhase::Synced }, actions);
        }
    }

    /// A failure made something dirty again.
    pub(super) fn leave_synced(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.stage = Stage::Mirroring;
        self.flush = match self.flush {
            Flush::None | Flush::Done => Flush::None,
            Flush::InFlight { .. } => Flush::InFlight { covers_all: false },
        };
        if std::mem::take(&mut self.flushes_both) {
            actions.push(Action::FlushSourceOnly);
        }
        // Guards are for sides that are held equal.
        self.drop_waiting_others();
        self.start_ready(now, actions);
    }

    /// Both sides are equal: verify, wait for the switch, flush, commit. Each step looks anew, since a failure may have
    /// led away from here and back in between.
    pub(super) fn pump_synced(&mut self, now: Tick, actions: &mut Vec<Action>) {
        if !self.pump_verifier(now, actions) {
            return;
        }
        if self.config.switch == SwitchMode::Manual && !self.is_switch_asked {
            return;
        }
        if self.config.copy_only {
            // From here on the guest's writes go to the source only: the target stays as it is at this point in time.
            self.stage = Stage::Detaching;
            self.set_route(Route::Source, actions);
            self.queue.release_writes();
            self.start_ready(now, actions);
            return;
        }
        match self.flush {
            Flush::None => self.flush_target(actions),
            Flush::InFlight { .. } => {}
            Flush::Done if self.record.is_some() => {}
            Flush::Done => self.commit(actions),
        }
    }

    fn flush_target(&mut self, actions: &mut Vec<Action>) {
        assert!(self.flush == Flush::None, "one flush of the target at a time");
        self.flush = Flush::InFlight { covers_all: true };
        self.flushes_both = true;
        actions.push(Action::FlushTarget);
    }

    pub(super) fn target_flushed(
        &mut self,
        now: Tick,
        result: Result<(), String>,
        actions: &mut Vec<Action>,
    ) {
        let Flush::InFlight { covers_all } = self.flush else {
            panic!("a flush ended that was not asked for")
        };
        self.flush = Flush::None;
        match result {
            Ok(()) if covers_all => self.flush = Flush::Done,
            Ok(()) => {}
            Err(error) if self.is_open() => {
                self.mark_all_dirty(actions);
                self.target_failed(now, error, actions);
            }
            Err(error) if self.stage == Stage::Detaching => {
                self.fail(format!("the copy could not be made durable: {error}"), actions);
            }
            Err(_) => {}
        }
    }

    /// The one step without a way back (M6).
    fn commit(&mut self, actions: &mut Vec<Action>) {
        assert!(
            self.is_synced() && self.may_work() && self.verifier.is_complete(),
            "nothing is committed before it is due"
        );
        let is_mirrored = self.queue.writes().all(|write| !write.running || write.to == WriteTo::Both);
        assert!(is_mirrored, "a write to the source only is in flight though nothing is dirty");
        assert!(self.decision == Decision::Open && self.held.is_empty(), "a move is committed once");
        self.decision = Decision::Asked;
        self.stage = Stage::Committing;
        let generation =
            self.config.plan.generation.checked_add(1).expect("checked: generations fit in 64 bits");
        self.ask_record(Record::Committed { generation }, actions);
    }

    fn committed(&mut self, actions: &mut Vec<Action>) {
        assert!(self.stage == Stage::Committing, "a commit was recorded that was not asked for");
        self.decision = Decision::Known;
        self.stage = Stage::Committed;
        self.step_backoff.reset();
        self.set_route(Route::Target, actions);
        for id in self.held.drain(..) {
            actions.push(Action::CompleteWrite { id, result_of: Side::Target });
        }
    }

    /// Appends a record when the one before it is durable (or has failed).
    pub(super) fn ask_record(&mut self, record: Record, actions: &mut Vec<Action>) {
        if self.record.is_some() {
            self.records_wanted.push_back(record);
        } else {
            self.record = Some(record.clone());
            actions.push(Action::Record(record));
        }
    }

    pub(super) fn recorded(&mut self, now: Tick, result: Result<(), String>, actions: &mut Vec<Action>) {
        let Some(record) = self.record.take() else {
            panic!("a record was made durable that was not asked for")
        };
        match result {
            Ok(()) => self.record_is_durable(now, record, actions),
            Err(error) => self.record_failed(now, record, &error, actions),
        }
        if self.record.is_none()
            && let Some(next) = self.records_wanted.pop_front()
        {
            self.ask_record(next, actions);
        }
    }

    fn record_is_durable(&mut self, now: Tick, record: Record, actions: &mut Vec<Action>) {
        match record {
            Record::Plan { .. } if self.stage == Stage::Planning => self.open(actions),
            Record::Plan { .. } | Record::Phase { .. } => {}
            Record::Committed { .. } => self.committed(actions),
            Record::CopyComplete => {
                self.decision = Decision::Known;
                self.step_backoff.reset();
                actions.push(Action::FinishTarget);
            }
            Record::TargetFinished => {
                self.step_backoff.reset();
                if self.config.copy_only || self.config.keep_source {
                    self.ask_done(now, actions);
                } else {
                    actions.push(Action::DeleteSource);
                }
            }
            Record::SourceDeleted => self.ask_done(now, actions),
            Record::Cancelled | Record::Failed { .. } if self.is_given_up_late() => {
                self.step_backoff.reset();
                actions.push(Action::DiscardTarget);
            }
            Record::Done { .. } | Record::Cancelled | Record::Failed { .. } => self.end(),
        }
    }

    /// It is not known whether the record is durable: what it permits is not done, and what it forbids neither.
    fn record_failed(&mut self, now: Tick, record: Record, error: &str, actions: &mut Vec<Action>) {
        self.warning = Some(format!("the journal could not be written: {error}"));
        match record {
            Record::Plan { .. } => self.fail(format!("the journal could not be written: {error}"), actions),
            Record::Phase { .. } => {}
            Record::SourceDeleted => self.ask_done(now, actions),
            Record::Committed { .. } | Record::CopyComplete | Record::TargetFinished => {
                self.try_again(now, Again::Record(Box::new(record)));
            }
            Record::Done { .. } | Record::Cancelled | Record::Failed { .. } => {
                if self.step_backoff.attempts() < ATTEMPTS_MAX {
                    self.try_again(now, Again::Record(Box::new(record)));
                } else {
                    self.end();
                }
            }
        }
    }

    pub(super) fn try_again(&mut self, now: Tick, what: Again) {
        assert!(self.again.is_none(), "one step of an ending at a time");
        self.again = Some((self.step_backoff.next(now), what));
    }

    pub(super) fn target_finished(
        &mut self,
        now: Tick,
        result: Result<(), String>,
        actions: &mut Vec<Action>,
    ) {
        assert!(self.decision == Decision::Known, "a target was finished without a decision");
        let Err(error) = result else {
            self.step_backoff.reset();
            return self.ask_record(Record::TargetFinished, actions);
        };
        let reason = format!("the target could not be given its final name: {error}");
        self.warning = Some(reason.clone());
        if self.config.copy_only && self.step_backoff.attempts() >= ATTEMPTS_MAX {
            // The disk never left the source, so a copy can be given up even now.
            self.begin_unwinding(Outcome::Failed(reason), actions);
        } else {
            self.try_again(now, Again::Finish);
        }
    }

    pub(super) fn source_deleted(
        &mut self,
        now: Tick,
        result: Result<(), String>,
        actions: &mut Vec<Action>,
    ) {
        assert!(self.stage == Stage::Committed && !self.config.keep_source, "the source was to stay");
        match result {
            Ok(()) => {
                self.step_backoff.reset();
                self.is_source_deleted = true;
                self.ask_record(Record::SourceDeleted, actions);
            }
            Err(error) => {
                self.warning = Some(format!("the source could not be deleted: {error}"));
                if self.step_backoff.attempts() < ATTEMPTS_MAX {
                    self.try_again(now, Again::DeleteSource);
                } else {
                    self.ask_done(now, actions);
                }
            }
        }
    }

    fn ask_done(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.step_backoff.reset();
        let receipt = Receipt {
            bytes_total: self.config.disk_size,
            bytes_copied: self.counts.bytes_copied,
            bytes_mirrored: self.counts.bytes_mirrored,
            bytes_skipped_zero: self.counts.bytes_skipped_zero.min(self.config.disk_size),
            bytes_verified: self.counts.bytes_verified,
            verified: self.config.verify,
            passes: self.counts.passes,
            duration_us: self.clocks.since_begin_us(now),
            commit_us: self.clocks.commit_us(),
            source_deleted: self.is_source_deleted,
            warning: self.warning.clone(),
        };
        self.ask_record(Record::Done { receipt }, actions);
    }

    /// The steps of an ending that wait for more than one thing, or for time.
    pub(super) fn pump_endings(&mut self, now: Tick, actions: &mut Vec<Action>) {
        if let Some((_, again)) = self.again.take_if(|(at, _)| *at <= now) {
            match again {
                Again::Record(record) => self.ask_record(*record, actions),
                Again::Finish => actions.push(Action::FinishTarget),
                Again::DeleteSource => actions.push(Action::DeleteSource),
                Again::DiscardTarget => actions.push(Action::DiscardTarget),
            }
        }
        match self.stage {
            Stage::Detaching if self.settled && self.decision == Decision::Open => match self.flush {
                Flush::None => self.flush_target(actions),
                Flush::InFlight { .. } => {}
                Flush::Done if self.record.is_some() => {}
                Flush::Done => {
                    self.decision = Decision::Asked;
                    self.ask_record(Record::CopyComplete, actions);
                }
            },
            Stage::Unwinding(_) => self.pump_unwinding(actions),
            _ => {}
        }
    }
}

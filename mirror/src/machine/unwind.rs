//! The way back to the source, when the move is cancelled or has failed before its decision.

use super::{Again, Decision, Flush, Machine, Scan, Stage};
use crate::{Action, JobState, Record, Route, Tick};

/// How often a step of an ending is tried again before the move ends without it.
pub(super) const ATTEMPTS_MAX: u32 = 5;

/// How a move ends that goes back.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    Cancelled,
    Failed(String),
}

impl Outcome {
    fn record(&self) -> Record {
        match self {
            Self::Cancelled => Record::Cancelled,
            Self::Failed(reason) => Record::Failed { reason: reason.clone() },
        }
    }

    fn state(&self) -> JobState {
        match self {
            Self::Cancelled => JobState::Cancelled,
            Self::Failed(reason) => JobState::Failed { reason: reason.clone() },
        }
    }
}

impl Machine {
    pub(super) fn cancel(&mut self, actions: &mut Vec<Action>) {
        if self.may_turn_back() {
            self.begin_unwinding(Outcome::Cancelled, actions);
        }
    }

    pub(super) fn fail(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.may_turn_back() {
            self.begin_unwinding(Outcome::Failed(reason), actions);
        } else {
            self.warning = Some(reason);
        }
    }

    /// Once the commit was asked for it may be durable, and the target must not be discarded any more.
    fn may_turn_back(&self) -> bool {
        self.decision == Decision::Open && !matches!(self.stage, Stage::Unwinding(_) | Stage::Ended(_))
    }

    pub(super) fn begin_unwinding(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        assert!(self.decision == Decision::Open || self.config.copy_only, "a commit is not undone");
        self.stage = Stage::Unwinding(outcome);
        self.has_left_target = false;
        self.records_wanted.clear();
        self.again = None;
        self.step_backoff.reset();
        if self.route != Route::Source {
            self.set_route(Route::Source, actions);
        }
        // The target no longer matters: no write has to wait for another one's order, or for a copy.
        self.queue.release_writes();
    }

    /// The target may be discarded when nothing uses it any more: neither guest writes nor copies.
    pub(super) fn pump_unwinding(&mut self, actions: &mut Vec<Action>) {
        let is_quiet = self.settled
            && self.queue.others().next().is_none()
            && self.verifier.is_idle()
            && self.scan != Scan::Asked
            && !matches!(self.flush, Flush::InFlight { .. })
            && self.record.is_none();
        if !is_quiet || self.has_left_target {
            return;
        }
        self.has_left_target = true;
        if self.is_given_up_late() {
            // The journal says that the copy is complete: it has to say otherwise before the copy is gone.
            if let Stage::Unwinding(outcome) = &self.stage {
                self.ask_record(outcome.record(), actions);
            }
        } else {
            actions.push(Action::DiscardTarget);
        }
    }

    pub(super) fn target_discarded(
        &mut self,
        now: Tick,
        result: Result<(), String>,
        actions: &mut Vec<Action>,
    ) {
        let Stage::Unwinding(outcome) = &self.stage else {
            panic!("a target was discarded in {:?}", self.stage)
        };
        let record = outcome.record();
        if let Err(error) = result {
            self.warning = Some(format!("the unfinished target could not be deleted: {error}"));
            if self.step_backoff.attempts() < ATTEMPTS_MAX {
                return self.try_again(now, Again::DiscardTarget);
            }
        }
        self.step_backoff.reset();
        if self.is_given_up_late() {
            self.end();
        } else {
            self.ask_record(record, actions);
        }
    }

    /// A copy that was recorded as complete and could not be finished.
    pub(super) fn is_given_up_late(&self) -> bool {
        matches!(self.stage, Stage::Unwinding(_)) && self.decision != Decision::Open
    }

    /// Nothing more will be done.
    pub(super) fn end(&mut self) {
        let state = match &self.stage {
            Stage::Unwinding(outcome) => outcome.state(),
            Stage::Committed | Stage::Detaching => JobState::Done,
            other => panic!("a move does not end in {other:?}"),
        };
        self.stage = Stage::Ended(state);
    }
}

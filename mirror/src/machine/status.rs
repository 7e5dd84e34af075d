//! What is told of the move: its state, its progress, its times.

use super::pace::seconds;
use super::{Flush, Machine, Scan, Stage};
use crate::{Action, ExtentRange, JobState, PauseReason, Progress, Tick};

/// The state that was told last, without its words, so that comparing it costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Queued,
    Copying,
    Mirroring,
    Synced,
    Committed,
    PausedByUser,
    PausedByTarget,
    PausedForSpace,
    Ended,
}

/// What time is counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Copying,
    Mirroring,
    Verifying,
    Committing,
}

/// Microseconds per phase.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    begun: Option<Tick>,
    current: Option<(Phase, Tick)>,
    sums_us: [u64; 5],
}

impl Clocks {
    pub(super) fn begin(&mut self, now: Tick) {
        self.begun = Some(now);
    }

    pub(super) fn since_begin_us(&self, now: Tick) -> u64 {
        self.begun.map_or(0, |begun| now.us_since(begun))
    }

    pub(super) fn commit_us(&self) -> u64 {
        self.sums_us[Phase::Committing as usize]
    }

    fn enter(&mut self, now: Tick, phase: Phase) {
        match self.current {
            Some((current, _)) if current == phase => {}
            _ => {
                if let Some((left, since)) = self.current {
                    self.sums_us[left as usize] += now.us_since(since);
                }
                self.current = Some((phase, now));
            }
        }
    }

    fn seconds_in(&self, now: Tick, phase: Phase) -> f64 {
        let running_us = match self.current {
            Some((current, since)) if current == phase => now.us_since(since),
            _ => 0,
        };
        seconds(self.sums_us[phase as usize] + running_us)
    }
}

impl Machine {
    /// Where the job stands.
    pub fn state(&self) -> JobState {
        match (self.shown, &self.stage) {
            (_, Stage::Ended(state)) => state.clone(),
            (Shown::Queued, _) => JobState::Queued,
            (Shown::Copying, _) => JobState::Copying,
            (Shown::Mirroring, _) => JobState::Mirroring,
            (Shown::Synced, _) => JobState::Synced,
            (Shown::Committed, _) => JobState::Committed,
            (Shown::PausedByUser, _) => JobState::Paused { reason: PauseReason::User },
            (Shown::PausedByTarget | Shown::PausedForSpace, _) => {
                JobState::Paused { reason: self.error_pause.clone().unwrap_or(PauseReason::User) }
            }
            (Shown::Ended, _) => unreachable!("an ended move stays ended"),
        }
    }

    /// How far the move is.
    pub fn progress(&self, now: Tick) -> Progress {
        let bytes_dirty = self.bytes_unequal();
        let bytes_to_verify = u64::from(self.verifier.extents_to_verify()) * self.config.extent_size;
        let bytes_to_verify = bytes_to_verify.min(self.config.disk_size).max(self.counts.bytes_verified);
        let rate_bytes_per_s = self.meter.rate(now);
        let bytes_left = bytes_dirty + (bytes_to_verify - self.counts.bytes_verified);
        Progress {
            ready: self.stage == Stage::Synced && self.may_work() && self.verifier.is_complete(),
            bytes_total: self.config.disk_size,
            bytes_copied: self.counts.bytes_copied,
            bytes_mirrored: self.counts.bytes_mirrored,
            bytes_dirty,
            // What is copied several times may be zeroes each time.
            bytes_skipped_zero: self.counts.bytes_skipped_zero.min(self.config.disk_size),
            rate_bytes_per_s,
            eta_s: (rate_bytes_per_s > 0).then(|| bytes_left.div_ceil(rate_bytes_per_s.max(1))),
            passes: self.counts.passes,
            copying_s: self.clocks.seconds_in(now, Phase::Copying),
            mirroring_s: self.clocks.seconds_in(now, Phase::Mirroring),
            verify_s: self.clocks.seconds_in(now, Phase::Verifying),
            commit_s: self.clocks.seconds_in(now, Phase::Committing),
            bytes_verified: self.counts.bytes_verified,
            bytes_to_verify,
            max_guest_p99_us: self.governor.budget_us(),
            guest_p99_us: self.governor.guest_p99_us(),
            warning: self.warning.clone(),
        }
    }

    /// Whether both sides may differ anywhere in these extents: something there is dirty, being copied, or being
    /// written. What is not so is equal on both sides (unless it was made durable, it need not be so after a power cut).
    pub fn may_differ(&self, range: ExtentRange) -> bool {
        if self.scan != Scan::Done {
            return true;
        }
        let is_dirty = self.dirty.range_cardinality(range.first..range.end()) > 0;
        is_dirty || self.queue.works_on(range)
    }

    fn bytes_unequal(&self) -> u64 {
        if self.scan != Scan::Done {
            return self.config.disk_size;
        }
        let copying = self.queue.others().filter(|entry| entry.running && !entry.is_guard());
        let bytes_copying: u64 = copying.map(|entry| self.bytes_of(entry.extents)).sum();
        (self.bytes_of_dirty() + bytes_copying).min(self.config.disk_size)
    }

    /// Tells the state when it is another one.
    pub(super) fn show(&mut self, now: Tick, actions: &mut Vec<Action>) {
        self.clocks.enter(now, self.phase());
        let shown = self.shown_now();
        if shown != self.shown {
            self.shown = shown;
            actions.push(Action::StateChanged(self.state()));
        }
    }

    fn shown_now(&self) -> Shown {
        if self.is_open() && self.stage != Stage::Queued {
            match &self.error_pause {
                Some(PauseReason::Space(_)) => return Shown::PausedForSpace,
                Some(_) => return Shown::PausedByTarget,
                None if self.is_paused => return Shown::PausedByUser,
                None => {}
            }
        }
        match &self.stage {
            Stage::Queued => Shown::Queued,
            Stage::Planning | Stage::Opening | Stage::Copying => Shown::Copying,
            Stage::Mirroring if !self.is_initial_done => Shown::Copying,
            Stage::Mirroring => Shown::Mirroring,
            Stage::Synced | Stage::Committing | Stage::Detaching => Shown::Synced,
            Stage::Committed => Shown::Committed,
            Stage::Unwinding(_) => self.shown,
            Stage::Ended(_) => Shown::Ended,
        }
    }

    fn phase(&self) -> Phase {
        match &self.stage {
            Stage::Planning | Stage::Opening | Stage::Copying => Phase::Copying,
            Stage::Mirroring if !self.is_initial_done => Phase::Copying,
            Stage::Mirroring => Phase::Mirroring,
            Stage::Synced if !self.verifier.is_complete() => Phase::Verifying,
            Stage::Synced if self.flush != Flush::None => Phase::Committing,
            Stage::Committing | Stage::Detaching => Phase::Committing,
            Stage::Queued | Stage::Synced | Stage::Committed | Stage::Unwinding(_) | Stage::Ended(_) => {
                Phase::Idle
            }
        }
    }
}

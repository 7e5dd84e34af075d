//! What has to hold, looked at from outside the machine.

use mirror::{ExtentRange, JobState, Record, Recovery, Route};

use crate::history::{SECTOR_BYTES, Sim};
use crate::outside::Job;
use crate::requests::Request;

impl Sim {
    pub(crate) fn check_record(&mut self, record: &Record) {
        if matches!(record, Record::Committed { .. } | Record::CopyComplete) {
            self.decision_asked_at.get_or_insert(self.steps);
        }
        if matches!(record, Record::Committed { .. }) {
            // It is asked for again while it is not known whether it is durable, whatever else is asked for meanwhile.
            let is_first = !std::mem::replace(&mut self.is_commit_asked, true);
            assert!(!self.is_paused || !is_first, "a commit is asked for in a pause");
            for sector in 0..self.sectors {
                let is_equal = self.disks[0].read(sector) == self.disks[1].read(sector);
                assert!(
                    is_equal || self.is_being_written(sector),
                    "M6: sector {sector} differs at the commit"
                );
            }
        }
    }

    /// M9: whatever a power cut would leave on a disk that could be the authority has what the guest has flushed.
    pub(crate) fn check_flushed(&self) {
        let (source, target) = (!self.is_commit_durable, self.is_commit_asked && !self.is_loss_told);
        let disks = [(0, source), (1, target)].into_iter().filter(|&(_, could_be)| could_be);
        for (side, _) in disks {
            for sector in 0..self.sectors {
                for &value in self.disks[side].after_power_cut(sector) {
                    self.oracle.check_after_power_cut(sector, value);
                }
            }
        }
    }

    /// Nothing is on its way to or from a disk that is deleted.
    pub(crate) fn check_deletion_of(&self, side: usize) {
        let is_used = |request: &&Request| request.sides[side].is_used;
        assert!(self.requests.iter().find(is_used).is_none(), "a request is on a disk that is being deleted");
        let is_transfer = |job: &&Job| {
            matches!(job, Job::Copy { .. } | Job::Verify { .. } | Job::Scan { .. } | Job::Flush { .. })
        };
        assert!(
            self.jobs.iter().find(is_transfer).is_none(),
            "a transfer is on a disk that is being deleted"
        );
    }

    /// The limit holds, but for a burst of a tenth of a second and what had been promised before it was set.
    pub(crate) fn check_limit(&mut self, range: ExtentRange) {
        let bytes = u64::from(self.sectors_of(range).len() as u32) * SECTOR_BYTES;
        let Some((rate, since, begun)) = &mut self.limit else { return };
        let allowed = *rate * self.now.us_since(*since) / 1_000_000 + *rate / 10;
        let slack = u64::from(self.config.copies_in_flight_max) * self.config.copy_bytes_max;
        assert!(*begun <= allowed + slack, "{begun} bytes begun where {allowed} and {slack} are allowed");
        *begun += bytes;
    }

    /// M1: what the machine holds for equal is equal.
    pub(crate) fn check_equality(&self) {
        let is_tracked = matches!(self.route, Route::Tracked | Route::Mirrored);
        if !is_tracked || !self.is_scanned || self.is_corrupted || self.is_commit_asked {
            return;
        }
        for extent in 0..self.extents {
            let range = ExtentRange { first: extent, count: 1 };
            let is_equal = |sector| self.disks[0].read(sector) == self.disks[1].read(sector);
            if self.sectors_of(range).all(is_equal) || self.machine.may_differ(range) {
                continue;
            }
            for sector in self.sectors_of(range).filter(|&sector| !is_equal(sector)) {
                assert!(
                    self.is_being_written(sector),
                    "M1: sector {sector} differs, and extent {extent} is not dirty"
                );
            }
        }
    }

    /// Checks the disk that the guest is left with; whether there is anything left to move.
    pub(crate) fn check_end(&mut self, state: &JobState) -> bool {
        assert!(
            self.requests.is_empty() && self.wake_or_job_is_left().is_none(),
            "something is left after the end"
        );
        let is_moved = *state == JobState::Done && !self.config.copy_only;
        assert!(is_moved == (self.route == Route::Target), "the guest is on the wrong disk");
        self.check_as_read(usize::from(is_moved));
        self.check_journal_of_the_end(state);
        match state {
            JobState::Done => {
                self.tally.done += 1;
                assert!(self.is_finished && !self.disks[1].is_deleted, "done without a finished target");
                if self.config.copy_only {
                    self.check_snapshot();
                }
                return false;
            }
            JobState::Failed { reason } => {
                self.tally.failed += 1;
                let is_mismatch = reason.contains("verification found");
                assert!(!is_mismatch || self.is_corrupted, "verification found a difference that is none");
                self.tally.mismatches_found += u32::from(is_mismatch);
            }
            JobState::Cancelled => self.tally.cancelled += 1,
            other => panic!("{other:?} is no end"),
        }
        true
    }

    fn wake_or_job_is_left(&self) -> Option<&Job> {
        self.jobs.first()
    }

    pub(crate) fn check_journal_of_the_end(&self, state: &JobState) {
        let (records, recovery) = self.journal.recover();
        let is_ended = matches!(
            records.last(),
            None | Some(Record::Done { .. } | Record::Cancelled | Record::Failed { .. })
        );
        let is_right = match recovery {
            Recovery::Nothing => true,
            Recovery::SourceIsDisk { restart, .. } => {
                *state != JobState::Done && (!restart || !is_ended) || self.config.copy_only
            }
            Recovery::TargetIsDisk { .. } => *state == JobState::Done && !self.config.copy_only,
        };
        assert!(is_right, "after {state:?} the journal says {recovery:?}");
    }

    pub(crate) fn check_as_read(&mut self, side: usize) {
        let begun = self.oracle.tick();
        for sector in 0..self.sectors {
            let value = self.disks[side].read(sector);
            self.oracle.check(sector, value, begun, "the end");
        }
    }

    pub(crate) fn check_snapshot(&self) {
        let snapshot = self.snapshot.as_ref().expect("a copy has a point in time");
        for (sector, possible) in snapshot.iter().enumerate() {
            let value = self.disks[1].read(sector as u32);
            assert!(
                possible.contains(&value) || self.is_corrupted,
                "copied sector {sector}: {value}, not {possible:?}"
            );
            assert!(self.disks[1].is_durable(sector as u32), "copied sector {sector} is not durable");
        }
    }
}

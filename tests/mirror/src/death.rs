//! The daemon's death, and what the journal says after it.

use mirror::{Record, Recovery};

use crate::history::Sim;

impl Sim {
    /// The daemon is killed, or the power cut; the journal says which disk it is. Whether another move is to follow.
    pub(crate) fn die_and_recover(&mut self) -> bool {
        let is_power_cut = self.dice.one_in(2);
        self.trace(|| format!("dies, power cut: {is_power_cut}"));
        self.drop_requests_on_disks();
        self.drop_jobs_on_disks();
        let (records, recovery) = self.journal.recover();
        let is_done = matches!(records.last(), Some(Record::Done { .. }));
        let is_target = match recovery {
            Recovery::Nothing => is_done && !self.config.copy_only,
            Recovery::SourceIsDisk { .. } => false,
            Recovery::TargetIsDisk { .. } => true,
        };
        self.trace(|| format!("the journal has {records:?}, so {recovery:?}"));
        assert!(is_target || !self.is_commit_durable, "a durable commit is forgotten");
        assert!(!is_target || !self.is_discard_asked, "a discarded target becomes the disk");
        assert!(!is_target || self.is_commit_asked, "a commit that nobody asked for");
        let finish_is_known = matches!(recovery, Recovery::TargetIsDisk { finish: false, .. }) || is_done;
        assert!(!finish_is_known || self.is_finished, "the target is taken for finished");
        if matches!(recovery, Recovery::SourceIsDisk { finish_copy: true, .. }) {
            self.check_snapshot();
        }
        let side = usize::from(is_target);
        self.tally.killed += 1;
        self.tally.source_after_death += u32::from(!is_target);
        self.tally.target_after_death += u32::from(is_target);
        if is_power_cut {
            self.tally.power_cuts += 1;
            self.requests.clear();
            self.disks[side].lose_power(&mut self.dice);
            for sector in (0..self.sectors).filter(|_| !self.is_loss_told) {
                self.oracle.check_after_power_cut(sector, self.disks[side].read(sector));
            }
            self.oracle.restart((0..self.sectors).map(|sector| self.disks[side].read(sector)));
        } else {
            self.check_as_read(side);
        }
        self.disks.swap(0, side);
        true
    }
}

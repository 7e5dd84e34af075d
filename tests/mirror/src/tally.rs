//! How often rare things happened.

/// How often rare things happened, over all histories: so that a simulator that no longer reaches them is noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Tally {
    pub histories: u64,
    pub steps: u64,
    pub done: u32,
    pub cancelled: u32,
    pub failed: u32,
    pub killed: u32,
    pub power_cuts: u32,
    pub source_after_death: u32,
    pub target_after_death: u32,
    pub pauses_by_target: u32,
    pub writes_to_both: u32,
    pub writes_to_source_only: u32,
    pub held: u32,
    pub corruptions: u32,
    pub differences: u32,
    pub mismatches_found: u32,
    pub records_failed: u32,
    pub stragglers: u32,
    pub held_back: u32,
}

impl Tally {
    /// Sums up.
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.steps += other.steps;
        self.done += other.done;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.killed += other.killed;
        self.power_cuts += other.power_cuts;
        self.source_after_death += other.source_after_death;
        self.target_after_death += other.target_after_death;
        self.pauses_by_target += other.pauses_by_target;
        self.writes_to_both += other.writes_to_both;
        self.writes_to_source_only += other.writes_to_source_only;
        self.held += other.held;
        self.corruptions += other.corruptions;
        self.differences += other.differences;
        self.mismatches_found += other.mismatches_found;
        self.records_failed += other.records_failed;
        self.stragglers += other.stragglers;
        self.held_back += other.held_back;
    }
}

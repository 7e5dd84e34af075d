//! One history: a seed's configuration, its steps, its checks.

use mirror::{
    Action, Config, Event, ExtentRange, JobState, Machine, MirrorMode, OnTargetError, Plan, Record, Recovery,
    RoaringBitmap, Route, SwitchMode, Tick, Verify,
};

use crate::dice::Dice;
use crate::disk::Disk;
use crate::journal_file::JournalFile;
use crate::oracle::Oracle;
use crate::outside::Job;
use crate::requests::Request;

/// Bytes of a sector: the least that lands at once.
pub(crate) const SECTOR_BYTES: u64 = 1024;
/// Once the faults have ended, a move has ended within so many steps.
const CALM_STEPS_MAX: u32 = 20_000;
/// A guest's request that waits for nothing but the machine is done within so many steps.
const REQUEST_STEPS_MAX: u32 = 20_000;

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
    }
}

/// Chances of a thousand.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) copy_source: u32,
    pub(crate) copy_target: u32,
    pub(crate) copy_full: u32,
    pub(crate) corrupt: u32,
    pub(crate) write_source: u32,
    pub(crate) write_target: u32,
    pub(crate) guest_flush: u32,
    pub(crate) verify_source: u32,
    pub(crate) verify_target: u32,
    pub(crate) flush: u32,
    pub(crate) scan: u32,
    pub(crate) record: u32,
    pub(crate) finish: u32,
    pub(crate) delete: u32,
    pub(crate) discard: u32,
}

impl Faults {
    fn chosen(dice: &mut Dice) -> Self {
        if dice.one_in(3) {
            return Self::default();
        }
        let mut chance = |often: u32, most: u32| if dice.one_in(often) { dice.within(1, most) } else { 0 };
        Self {
            copy_source: chance(16, 30),
            copy_target: chance(3, 300),
            copy_full: chance(6, 200),
            corrupt: chance(16, 40),
            write_source: chance(4, 200),
            write_target: chance(3, 400),
            guest_flush: chance(4, 500),
            verify_source: chance(16, 60),
            verify_target: chance(6, 300),
            flush: chance(4, 700),
            scan: chance(24, 60),
            record: chance(4, 600),
            finish: chance(6, 1000),
            delete: chance(6, 900),
            discard: chance(6, 900),
        }
    }
}

/// How one move of a history ended.
enum End {
    Ended(JobState),
    Died,
}

/// When the daemon is killed.
#[derive(Debug, Clone, Copy)]
enum Death {
    Never,
    /// At this step.
    At(u32),
    /// So many steps after the record was asked for from which there is no way back.
    AfterDecision(u32),
}

/// Everything outside the machine, and the machine.
pub(crate) struct Sim {
    pub(crate) dice: Dice,
    is_tracing: bool,
    pub(crate) tally: Tally,

    config: Config,
    pub(crate) extents: u32,
    pub(crate) sectors: u32,
    pub(crate) sectors_per_extent: u32,
    pub(crate) machine: Machine,
    actions: Vec<Action>,
    now: Tick,
    wake_at: Option<Tick>,
    pub(crate) steps: u32,

    pub(crate) disks: [Disk; 2],
    pub(crate) oracle: Oracle,
    pub(crate) hot: u32,
    pub(crate) requests: Vec<Request>,
    pub(crate) next_request: u64,
    pub(crate) next_value: u32,
    depth: u32,
    /// Once the faults have ended, the guest writes to one place without a break.
    pub(crate) is_relentless: bool,
    /// The faults have ended.
    pub(crate) is_calm: bool,
    guest_budget: u32,
    pub(crate) jobs: Vec<Job>,
    pub(crate) journal: JournalFile,
    pub(crate) faults: Faults,

    pub(crate) route: Route,
    /// Counts changes of the route.
    pub(crate) epoch: u32,
    is_settled: bool,
    pub(crate) flush_both: bool,
    /// A flush of the target has failed, and what it may have lost is not known to be dirty.
    pub(crate) is_flush_lost: bool,

    pub(crate) is_scanned: bool,
    pub(crate) is_corrupted: bool,
    pub(crate) is_commit_asked: bool,
    /// The step at which the commit's (or completed copy's) record was asked for.
    decision_asked_at: Option<u32>,
    /// Somebody paused the move, and nobody has resumed it.
    is_paused: bool,
    /// What is the guest's disk now failed to flush, and says so: later flushes can't mend that.
    pub(crate) is_loss_told: bool,
    pub(crate) is_commit_durable: bool,
    pub(crate) is_finish_recorded: bool,
    pub(crate) is_finished: bool,
    is_discard_asked: bool,
    /// A copy's point in time: what each sector may hold.
    snapshot: Option<Vec<Vec<u32>>>,
    /// Bytes that copies and verifications have begun since the limit was set.
    limit: Option<(u64, Tick, u64)>,
}

/// Runs the history of a seed: a move amid faults and, unless that one got through, another one without.
///
/// # Panics
/// When anything is not as it has to be.
pub fn run(seed: u64, is_tracing: bool) -> Tally {
    let mut dice = Dice::new(seed);
    let config = chosen_config(&mut dice);
    let mut sim = Sim::new(dice, config, is_tracing);
    sim.faults = Faults::chosen(&mut sim.dice);
    if sim.config.verify != Verify::Full {
        // Only what is verified is promised to be found.
        sim.faults.corrupt = 0;
    }
    let calm_at = sim.dice.within(20, 900);
    let death = match sim.dice.below(6) {
        0 => Death::At(sim.dice.within(1, 700)),
        1 => Death::At(sim.dice.within(1, 150)),
        2 => Death::AfterDecision(sim.dice.within(0, 50)),
        _ => Death::Never,
    };
    let end = sim.run_move(calm_at, death);
    let is_again = match end {
        End::Ended(state) => sim.check_end(&state),
        End::Died => sim.die_and_recover(),
    };
    if is_again {
        sim.next_move();
        match sim.run_move(0, Death::Never) {
            End::Ended(JobState::Done) => sim.check_end(&JobState::Done),
            End::Ended(state) => panic!("without a fault the second move ended as {state:?}"),
            End::Died => unreachable!("the second move is not killed"),
        };
    }
    sim.tally.histories = 1;
    sim.tally
}

fn chosen_config(dice: &mut Dice) -> Config {
    let extent_size = if dice.one_in(4) { 8192 } else { 4096 };
    let extents = if dice.one_in(40) { dice.within(65, 140) } else { dice.within(1, 14) };
    let missing = if dice.one_in(3) { dice.below((extent_size / SECTOR_BYTES) as u32) } else { 0 };
    let disk_size = u64::from(extents) * extent_size - u64::from(missing) * SECTOR_BYTES;
    Config {
        plan: Plan { job: format!("job-{}", dice.below(1000)), generation: 3, ..Plan::default() },
        disk_size,
        extent_size,
        mode: if dice.one_in(2) { MirrorMode::AfterCopy } else { MirrorMode::FromStart },
        switch: if dice.one_in(4) { SwitchMode::Manual } else { SwitchMode::Auto },
        verify: [Verify::None, Verify::Sample, Verify::Full, Verify::Full][dice.below(4) as usize],
        copy_only: dice.one_in(5),
        keep_source: dice.one_in(4),
        on_target_error: [
            OnTargetError::Pause,
            OnTargetError::Retry,
            OnTargetError::Retry,
            OnTargetError::Abort,
        ][dice.below(4) as usize],
        bandwidth: dice.one_in(4).then(|| u64::from(dice.within(500_000, 20_000_000))),
        copies_in_flight_max: dice.within(1, 4),
        copy_bytes_max: extent_size * u64::from(dice.within(1, 6)),
    }
}

impl Sim {
    fn new(mut dice: Dice, config: Config, is_tracing: bool) -> Self {
        let sectors = (config.disk_size / SECTOR_BYTES) as u32;
        let mut source = Disk::new(sectors);
        let sectors_per_extent = (config.extent_size / SECTOR_BYTES) as u32;
        let mut next_value = 1;
        for sector in 0..sectors {
            if (sector / sectors_per_extent) % 3 != 1 && dice.one_in(2) {
                next_value += 1;
                source.land(sector, next_value);
            }
        }
        let mark = source.flush_begins();
        source.flush_succeeds(&mark);
        let oracle = Oracle::new((0..sectors).map(|sector| source.read(sector)));
        Self {
            is_tracing,
            tally: Tally::default(),
            extents: config.extent_count(),
            sectors,
            sectors_per_extent,
            machine: Machine::new(config.clone()),
            actions: Vec::new(),
            now: Tick(u64::from(dice.below(1000))),
            wake_at: None,
            steps: 0,
            disks: [source, Disk::new(sectors)],
            oracle,
            hot: dice.below(sectors),
            requests: Vec::new(),
            next_request: 1,
            next_value,
            depth: dice.within(1, 7),
            is_relentless: dice.one_in(8),
            is_calm: false,
            guest_budget: dice.within(0, 80),
            jobs: Vec::new(),
            journal: JournalFile::default(),
            faults: Faults::default(),
            route: Route::Source,
            epoch: 0,
            is_settled: true,
            flush_both: false,
            is_flush_lost: false,
            is_scanned: false,
            is_corrupted: false,
            is_commit_asked: false,
            decision_asked_at: None,
            is_paused: false,
            is_loss_told: false,
            is_commit_durable: false,
            is_finish_recorded: false,
            is_finished: false,
            is_discard_asked: false,
            snapshot: None,
            limit: None,
            dice,
            config,
        }
    }

    pub(crate) fn trace(&self, line: impl FnOnce() -> String) {
        if self.is_tracing {
            eprintln!("{:5} {:9} {}", self.steps, self.now.0, line());
        }
    }

    /// One move, from its start to its end or the daemon's.
    fn run_move(&mut self, calm_at: u32, death: Death) -> End {
        let first_step = self.steps;
        let starts_at = self.dice.below(20);
        let cancels_at = (calm_at > 0 && self.dice.one_in(6)).then(|| self.dice.below(calm_at));
        self.limit = self.config.bandwidth.map(|rate| (rate, self.now, 0));
        let mut is_calm = false;
        loop {
            let step = self.steps - first_step;
            self.steps += 1;
            self.tally.steps += 1;
            let dies_at = match death {
                Death::Never => None,
                Death::At(step) => Some(step + first_step),
                Death::AfterDecision(steps) => self.decision_asked_at.map(|at| at + steps),
            };
            if dies_at.is_some_and(|at| at < self.steps) {
                return End::Died;
            }
            if step == starts_at {
                self.apply(Event::Start);
            }
            if cancels_at == Some(step) {
                self.apply(Event::Cancel);
            }
            if step >= calm_at && step > starts_at && !is_calm {
                is_calm = true;
                self.calm_down();
            }
            self.pass_time();
            self.step(is_calm);
            self.check_equality();
            let state = self.machine.state();
            if state.is_final() {
                self.drain_requests();
                return End::Ended(state);
            }
            assert!(step < calm_at + CALM_STEPS_MAX, "the move does not end: {state:?} {:?}", self.machine);
        }
    }

    /// The faults end. A move that stands still must not hold up the guest: sometimes that is looked at first.
    fn calm_down(&mut self) {
        self.trace(|| "calm".into());
        self.faults = Faults::default();
        if self.dice.one_in(4) && self.machine.state() != JobState::Queued {
            self.apply(Event::Pause);
            self.drain_requests();
        }
        if self.dice.one_in(2) {
            self.limit = None;
            self.apply(Event::SetBandwidth(None));
        }
        self.is_calm = true;
        self.guest_budget = u32::MAX;
    }

    /// No new requests until all that are there are done.
    fn drain_requests(&mut self) {
        let budget = std::mem::replace(&mut self.guest_budget, 0);
        let first_step = self.steps;
        while !self.requests.is_empty() {
            self.steps += 1;
            assert!(
                self.steps - first_step < 4000,
                "requests hang: {:?} {:?}",
                self.requests,
                self.machine.state()
            );
            self.pass_time();
            self.step(false);
            self.check_equality();
        }
        self.guest_budget = budget;
    }

    fn pass_time(&mut self) {
        let most = if self.dice.one_in(16) { 50_000 } else { 400 };
        self.now = self.now.plus_us(u64::from(self.dice.below(most)));
        if self.wake_at.is_some_and(|at| at <= self.now) {
            self.wake_at = None;
            self.apply(Event::Tick);
        }
    }

    fn step(&mut self, is_calm: bool) {
        match self.dice.below(32) {
            0..=5 if self.may_issue() => return self.take_request(),
            6..=9 if self.may_settle() => return self.settle(),
            10 => return self.control(is_calm),
            11 if self.dice.one_in(64) => {
                let progress = self.machine.progress(self.now);
                assert!(progress.bytes_dirty <= progress.bytes_total);
                return self.check_no_request_hangs(REQUEST_STEPS_MAX);
            }
            _ => {}
        }
        if self.is_relentless && is_calm && self.may_issue() {
            return self.issue();
        }
        let count = (self.requests.len() + self.jobs.len()) as u32;
        if count > 0 {
            let first = self.dice.below(count);
            for offset in 0..count {
                let index = ((first + offset) % count) as usize;
                if index >= self.requests.len() {
                    let index = index - self.requests.len();
                    return self.advance_job(index);
                }
                if self.requests[index].is_runnable() {
                    return self.advance_request(index);
                }
            }
        }
        self.idle(is_calm);
    }

    /// Nothing is on its way: somebody has to act, or time to pass.
    fn idle(&mut self, is_calm: bool) {
        if self.may_settle() {
            self.settle();
        } else if let Some(at) = self.wake_at {
            self.now = self.now.max(at);
        } else {
            let state = self.machine.state();
            let waits_for_people = matches!(state, JobState::Paused { .. })
                || state.is_final()
                || self.config.switch == SwitchMode::Manual
                || !is_calm;
            assert!(waits_for_people, "the move stands still: {:?}", self.machine);
            self.control(is_calm);
        }
    }

    fn may_issue(&self) -> bool {
        self.guest_budget > 0 && (self.requests.len() as u32) < self.depth
    }

    fn take_request(&mut self) {
        self.guest_budget -= 1;
        self.issue();
    }

    /// Everything that began under an earlier route has ended.
    fn may_settle(&self) -> bool {
        !self.is_settled && self.requests.iter().all(|request| !request.is_behind(self.epoch))
    }

    fn settle(&mut self) {
        self.is_settled = true;
        self.apply(Event::RouteSettled(self.route));
    }

    /// Somebody does something to the job.
    fn control(&mut self, is_calm: bool) {
        let state = self.machine.state();
        let event = match self.dice.below(12) {
            // Now people do what is needed, and only that: all else has to go by itself.
            _ if is_calm && matches!(state, JobState::Paused { .. }) => Event::Resume,
            _ if is_calm && self.config.switch == SwitchMode::Manual && state == JobState::Synced => {
                Event::Switch
            }
            _ if is_calm => return,
            0 | 1 => Event::Resume,
            2 => Event::Switch,
            3 | 4 => Event::Pause,
            5 => {
                let limit = self.dice.one_in(2).then(|| u64::from(self.dice.within(200_000, 8_000_000)));
                self.limit = limit.map(|rate| (rate, self.now, 0));
                Event::SetBandwidth(limit)
            }
            _ => Event::Tick,
        };
        self.apply(event);
    }

    pub(crate) fn apply(&mut self, event: Event) {
        self.trace(|| format!("-> {event:?}"));
        match event {
            Event::Pause => self.is_paused = true,
            Event::Resume => self.is_paused = false,
            _ => {}
        }
        let mut actions = std::mem::take(&mut self.actions);
        self.machine.apply(self.now, event, &mut actions);
        for action in actions.drain(..) {
            self.trace(|| format!("   {action:?}"));
            self.carry_out(action);
        }
        self.actions = actions;
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::SetRoute(route) => self.change_route(route),
            Action::Scan => self.jobs.push(Job::Scan { next: 0, found: RoaringBitmap::new() }),
            Action::Copy { id, range } => {
                assert!(!self.is_paused, "a copy starts in a pause");
                self.check_copy(range);
                self.check_limit(range);
                let job = self.new_copy(id, range);
                self.jobs.push(job);
            }
            Action::Verify { id, range } => {
                assert!(!self.is_paused, "a verification starts in a pause");
                self.check_limit(range);
                let job = self.new_verification(id, range);
                self.jobs.push(job);
            }
            Action::StartWrite { id, to } => self.start_write(id, to),
            Action::CompleteWrite { id, result_of } => self.complete_write(id, result_of),
            Action::FlushTarget => {
                self.flush_both = true;
                self.jobs.push(Job::Flush { mark: self.disks[1].flush_begins() });
            }
            Action::FlushSourceOnly => (self.flush_both, self.is_flush_lost) = (false, false),
            Action::Record(record) => {
                let is_one = !self.jobs.iter().any(|job| matches!(job, Job::Record(_)));
                assert!(is_one, "two records at a time");
                self.check_record(&record);
                self.jobs.push(Job::Record(record));
            }
            Action::FinishTarget => {
                assert!(
                    self.is_commit_durable || self.snapshot.is_some(),
                    "the target is finished without a decision"
                );
                self.jobs.push(Job::Finish);
            }
            Action::DeleteSource => {
                self.check_deletion_of(0);
                assert!(
                    self.is_finish_recorded,
                    "M10: the source is deleted before the target is known as finished"
                );
                assert!(!self.config.keep_source, "the source was to stay");
                self.jobs.push(Job::DeleteSource);
            }
            Action::DiscardTarget => {
                self.check_deletion_of(1);
                assert!(!self.is_commit_asked, "M7: the target is discarded though it may be the disk");
                self.is_discard_asked = true;
                self.jobs.push(Job::DiscardTarget);
            }
            Action::Wake(at) => self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at))),
            Action::StateChanged(state) => {
                assert!(state == self.machine.state(), "another state is told than is held");
                let is_error =
                    matches!(&state, JobState::Paused { reason } if *reason != mirror::PauseReason::User);
                self.tally.pauses_by_target += u32::from(is_error);
            }
        }
    }

    fn change_route(&mut self, route: Route) {
        if route == Route::Target {
            assert!(
                self.is_commit_durable,
                "M7: guest requests go to the target before the commit is durable"
            );
        }
        if route == Route::Source && self.config.copy_only {
            let possible = |sector| {
                let in_flight = self.requests.iter().filter(|request| request.is_on_its_way());
                let values =
                    in_flight.filter(|request| request.sectors.contains(&sector)).map(
                        |request| match request.ask {
                            crate::requests::Ask::Write { value, .. } => value,
                            _ => unreachable!("only writes are on their way"),
                        },
                    );
                std::iter::once(self.disks[0].read(sector)).chain(values).collect()
            };
            self.snapshot = Some((0..self.sectors).map(possible).collect());
        }
        self.tally.stragglers += self.requests.iter().filter(|request| request.is_late()).count() as u32;
        self.route = route;
        self.epoch += 1;
        self.is_settled = false;
    }

    fn check_record(&mut self, record: &Record) {
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
    fn check_deletion_of(&self, side: usize) {
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
    fn check_limit(&mut self, range: ExtentRange) {
        let bytes = u64::from(self.sectors_of(range).len() as u32) * SECTOR_BYTES;
        let Some((rate, since, begun)) = &mut self.limit else { return };
        let allowed = *rate * self.now.us_since(*since) / 1_000_000 + *rate / 10;
        let slack = u64::from(self.config.copies_in_flight_max) * self.config.copy_bytes_max;
        assert!(*begun <= allowed + slack, "{begun} bytes begun where {allowed} and {slack} are allowed");
        *begun += bytes;
    }

    /// M1: what the machine holds for equal is equal.
    fn check_equality(&self) {
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
    fn check_end(&mut self, state: &JobState) -> bool {
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

    fn check_journal_of_the_end(&self, state: &JobState) {
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

    fn check_as_read(&mut self, side: usize) {
        let begun = self.oracle.tick();
        for sector in 0..self.sectors {
            let value = self.disks[side].read(sector);
            self.oracle.check(sector, value, begun, "the end");
        }
    }

    fn check_snapshot(&self) {
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

    /// The daemon is killed, or the power cut; the journal says which disk it is. Whether another move is to follow.
    fn die_and_recover(&mut self) -> bool {
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

    /// Another move of the same disk, to a fresh target.
    fn next_move(&mut self) {
        let config = Config {
            disk_size: self.config.disk_size,
            extent_size: self.config.extent_size,
            ..chosen_config(&mut self.dice)
        };
        let copy_extents = self.dice.within(1, 4);
        self.config = Config { copy_bytes_max: u64::from(copy_extents) * config.extent_size, ..config };
        self.machine = Machine::new(self.config.clone());
        self.disks[0].forget_losses();
        self.disks[1] = Disk::new(self.sectors);
        self.journal = JournalFile::default();
        self.faults = Faults::default();
        self.wake_at = None;
        self.route = Route::Source;
        self.epoch += 1;
        self.is_settled = true;
        self.flush_both = false;
        self.is_flush_lost = false;
        self.is_scanned = false;
        self.is_corrupted = false;
        self.is_commit_asked = false;
        self.decision_asked_at = None;
        self.is_paused = false;
        self.is_calm = false;
        self.is_loss_told = false;
        self.is_commit_durable = false;
        self.is_finish_recorded = false;
        self.is_finished = false;
        self.is_discard_asked = false;
        self.snapshot = None;
    }
}

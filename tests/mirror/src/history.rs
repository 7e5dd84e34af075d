//! One history: a seed's configuration, its steps, its checks.

use mirror::{Action, Config, Event, JobState, Machine, RoaringBitmap, Route, SwitchMode, Tick, Verify};

use crate::chosen::{Faults, chosen_config};
use crate::dice::Dice;
use crate::disk::Disk;
use crate::journal_file::JournalFile;
use crate::oracle::Oracle;
use crate::outside::Job;
use crate::requests::Request;
use crate::tally::Tally;

/// Bytes of a sector: the least that lands at once.
pub(crate) const SECTOR_BYTES: u64 = 1024;
/// Once the faults have ended, a move has ended within so many steps.
const CALM_STEPS_MAX: u32 = 20_000;
/// A guest's request that waits for nothing but the machine is done within so many steps.
const REQUEST_STEPS_MAX: u32 = 20_000;

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
    pub(crate) is_tracing: bool,
    pub(crate) tally: Tally,

    pub(crate) config: Config,
    pub(crate) extents: u32,
    pub(crate) sectors: u32,
    pub(crate) sectors_per_extent: u32,
    pub(crate) machine: Machine,
    pub(crate) actions: Vec<Action>,
    pub(crate) now: Tick,
    pub(crate) wake_at: Option<Tick>,
    /// When the machine next hears how long requests took; never, if the caller does not tell.
    pub(crate) hears_at: Option<Tick>,
    pub(crate) steps: u32,

    pub(crate) disks: [Disk; 2],
    pub(crate) oracle: Oracle,
    pub(crate) hot: u32,
    pub(crate) requests: Vec<Request>,
    pub(crate) next_request: u64,
    pub(crate) next_value: u32,
    pub(crate) depth: u32,
    /// Once the faults have ended, the guest writes to one place without a break.
    pub(crate) is_relentless: bool,
    /// The faults have ended.
    pub(crate) is_calm: bool,
    pub(crate) guest_budget: u32,
    pub(crate) jobs: Vec<Job>,
    pub(crate) journal: JournalFile,
    pub(crate) faults: Faults,

    pub(crate) route: Route,
    /// Counts changes of the route.
    pub(crate) epoch: u32,
    pub(crate) is_settled: bool,
    pub(crate) flush_both: bool,
    /// A flush of the target has failed, and what it may have lost is not known to be dirty.
    pub(crate) is_flush_lost: bool,

    pub(crate) is_scanned: bool,
    pub(crate) is_corrupted: bool,
    pub(crate) is_commit_asked: bool,
    /// The step at which the commit's (or completed copy's) record was asked for.
    pub(crate) decision_asked_at: Option<u32>,
    /// Somebody paused the move, and nobody has resumed it.
    pub(crate) is_paused: bool,
    /// What is the guest's disk now failed to flush, and says so: later flushes can't mend that.
    pub(crate) is_loss_told: bool,
    pub(crate) is_commit_durable: bool,
    pub(crate) is_finish_recorded: bool,
    pub(crate) is_finished: bool,
    pub(crate) is_discard_asked: bool,
    /// A copy's point in time: what each sector may hold.
    pub(crate) snapshot: Option<Vec<Vec<u32>>>,
    /// Bytes that copies and verifications have begun since the limit was set.
    pub(crate) limit: Option<(u64, Tick, u64)>,
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
            hears_at: None,
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
        self.hears_at = (!self.dice.one_in(4)).then_some(self.now);
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
        if self.hears_at.is_some_and(|at| at <= self.now) {
            self.hear();
        }
    }

    /// The machine is told how long requests took: what it makes of that is no matter of right or wrong, but must not keep the
    /// move from its end.
    fn hear(&mut self) {
        // Now and then the caller is late.
        let wait_us = if self.dice.one_in(8) { self.dice.below(1_000_000) } else { 50_000 };
        self.hears_at = Some(self.now.plus_us(u64::from(wait_us)));
        let kinds = if self.dice.one_in(3) { 0 } else { self.dice.within(1, 4) };
        let some = |dice: &mut Dice| {
            let us_max = [300, 20_000, 3_000_000][dice.below(3) as usize];
            (u64::from(dice.below(us_max)), u64::from(dice.below(300)))
        };
        let heard = (0..kinds).map(|_| some(&mut self.dice)).collect();
        self.apply(Event::GuestServed(heard));
        self.tally.held_back += u32::from(self.wake_at.is_some());
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
            self.now = self.now.max(self.hears_at.map_or(at, |hears_at| hears_at.min(at)));
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
            6 => {
                let budget_us = self.dice.one_in(2).then(|| u64::from(self.dice.within(1, 2_000)));
                Event::SetMaxGuestP99(budget_us)
            }
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

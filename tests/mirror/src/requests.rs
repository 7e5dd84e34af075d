//! The guest, and the data path that serves it: workers that load the route and may be late to use it.

use std::ops::Range;

use mirror::{Event, ExtentRange, Route, Side, WriteKind, WriteTo};

use crate::disk::FlushMark;
use crate::history::{SECTOR_BYTES, Sim};

/// What a guest asks for.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Read,
    Write { value: u32, kind: WriteKind },
    Flush,
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No worker has looked at it.
    Issued,
    /// A worker has loaded the route, and may be slow to go on.
    Routed,
    /// The machine was asked whether it may start.
    Asking,
    /// On the disks.
    Running,
    /// Ended on the disks.
    Ended,
    /// The machine was told, and has not said yet that the guest may be told.
    Waiting,
}

/// One side's part of a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Transfer {
    /// The request goes there.
    pub(crate) is_used: bool,
    /// Sectors that have not been read or landed.
    pub(crate) left: Vec<u32>,
    pub(crate) is_done: bool,
    /// It fails when so many sectors are left.
    fails_at: Option<usize>,
    pub(crate) failed: bool,
    mark: Option<FlushMark>,
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) ask: Ask,
    pub(crate) sectors: Range<u32>,
    /// When the guest issued it, on the oracle's clock, and in steps.
    begun: u32,
    begun_step: u32,
    pub(crate) stage: Stage,
    pub(crate) route: Route,
    pub(crate) epoch: u32,
    /// Flushes go to both disks (as seen when the route was loaded).
    flush_both: bool,
    pub(crate) sides: [Transfer; 2],
    read: Vec<(u32, u32)>,
}

impl Request {
    pub(crate) fn is_write(&self) -> bool {
        matches!(self.ask, Ask::Write { .. })
    }

    /// A write that may be on one disk and not yet on the other.
    pub(crate) fn is_on_its_way(&self) -> bool {
        self.is_write() && !matches!(self.stage, Stage::Issued)
    }

    /// A mirrored write that was told to start and whose end was not told.
    pub(crate) fn is_mirrored_in_flight(&self) -> bool {
        self.is_write()
            && self.route == Route::Mirrored
            && matches!(self.stage, Stage::Running | Stage::Ended)
    }

    /// It loaded a route before the last change and has not ended.
    pub(crate) fn is_behind(&self, epoch: u32) -> bool {
        self.stage != Stage::Issued && self.epoch != epoch
    }

    /// Its worker loaded the mirrored route and has not asked yet.
    pub(crate) fn is_late(&self) -> bool {
        self.is_write() && self.stage == Stage::Routed && self.route == Route::Mirrored
    }

    pub(crate) fn is_runnable(&self) -> bool {
        !matches!(self.stage, Stage::Asking | Stage::Waiting)
    }
}

pub(crate) fn index_of(side: Side) -> usize {
    match side {
        Side::Source => 0,
        Side::Target => 1,
    }
}

impl Sim {
    /// The guest issues something.
    pub(crate) fn issue(&mut self) {
        let id = self.next_request;
        self.next_request += 1;
        let is_relentless = self.is_relentless && self.is_calm;
        let (ask, sectors) = match self.dice.below(16) {
            _ if is_relentless => {
                self.next_value += 1;
                let sector = (self.hot + self.dice.below(2)).min(self.sectors - 1);
                (Ask::Write { value: self.next_value, kind: WriteKind::Write }, sector..sector + 1)
            }
            0..=3 => (Ask::Read, self.some_sectors(12)),
            4..=10 => {
                self.next_value += 1;
                (Ask::Write { value: self.next_value, kind: WriteKind::Write }, self.some_sectors(10))
            }
            11 => (Ask::Write { value: 0, kind: WriteKind::Zeroes }, self.some_sectors(24)),
            12 => (Ask::Write { value: 0, kind: WriteKind::Discard }, self.some_sectors(self.sectors)),
            _ => (Ask::Flush, 0..0),
        };
        if let Ask::Write { value, .. } = ask {
            self.oracle.write_begins(id, sectors.clone(), value);
        }
        let begun = self.oracle.tick();
        self.trace(|| format!("guest {id}: {ask:?} {sectors:?}"));
        self.requests.push(Request {
            id,
            ask,
            sectors,
            begun,
            begun_step: self.steps,
            stage: Stage::Issued,
            route: Route::Source,
            epoch: 0,
            flush_both: false,
            sides: [Transfer::default(), Transfer::default()],
            read: Vec::new(),
        });
    }

    /// Half of all requests go to a few sectors, so that they collide.
    fn some_sectors(&mut self, len_max: u32) -> Range<u32> {
        let is_hot = self.dice.one_in(2);
        let first = if is_hot {
            (self.hot + self.dice.below(6)).min(self.sectors - 1)
        } else {
            self.dice.below(self.sectors)
        };
        let len_max = if self.dice.one_in(3) { len_max } else { len_max.min(4) };
        let len = self.dice.within(1, len_max.max(1)).min(self.sectors - first);
        first..first + len
    }

    /// One small thing happens to a request.
    pub(crate) fn advance_request(&mut self, index: usize) {
        match self.requests[index].stage {
            Stage::Issued => {
                let (route, epoch, flush_both) = (self.route, self.epoch, self.flush_both);
                let request = &mut self.requests[index];
                (request.route, request.epoch, request.flush_both) = (route, epoch, flush_both);
                request.stage = Stage::Routed;
                if !self.dice.one_in(4) {
                    self.begin(index);
                }
            }
            Stage::Routed => self.begin(index),
            Stage::Running => self.transfer(index),
            Stage::Ended => self.end(index),
            Stage::Asking | Stage::Waiting => unreachable!("such a request waits for the machine"),
        }
    }

    fn begin(&mut self, index: usize) {
        let request = &self.requests[index];
        let (id, route, flush_both) = (request.id, request.route, request.flush_both);
        let home = if route == Route::Target { Side::Target } else { Side::Source };
        match request.ask {
            Ask::Read => self.start(index, &[home]),
            Ask::Flush if route == Route::Mirrored && flush_both => {
                self.start(index, &[Side::Source, Side::Target])
            }
            Ask::Flush => self.start(index, &[home]),
            Ask::Write { kind, .. } if route == Route::Mirrored => {
                let offset = u64::from(request.sectors.start) * SECTOR_BYTES;
                let len = u64::from(request.sectors.len() as u32) * SECTOR_BYTES;
                self.requests[index].stage = Stage::Asking;
                self.apply(Event::WriteBegin { id, offset, len, kind });
            }
            Ask::Write { .. } => self.start(index, &[home]),
        }
    }

    /// The machine says that a write may go.
    pub(crate) fn start_write(&mut self, id: u64, to: WriteTo) {
        let index = self.requests.iter().position(|request| request.id == id).expect("a write that began");
        assert!(self.requests[index].stage == Stage::Asking, "write {id} is started twice");
        self.check_start(index, to);
        match to {
            WriteTo::SourceOnly => self.start(index, &[Side::Source]),
            WriteTo::Both => self.start(index, &[Side::Source, Side::Target]),
        }
    }

    /// M2: no copy and no overlapping write is in flight there (until the way back, when the target no longer matters).
    fn check_start(&mut self, index: usize, to: WriteTo) {
        let request = &self.requests[index];
        let extents = self.extents_of(&request.sectors);
        if self.route == Route::Source {
            assert!(to == WriteTo::SourceOnly, "a write goes to a target that was left behind");
            return;
        }
        assert!(to == WriteTo::Both || self.route == Route::Mirrored, "a write misses the disk");
        assert!(
            to == WriteTo::Both || !self.is_commit_asked,
            "a write to the source only while the commit is recorded"
        );
        assert!(!self.is_copying(extents), "M2: write {} starts during a copy of {extents:?}", request.id);
        for other in self.requests.iter().filter(|other| other.is_mirrored_in_flight()) {
            let overlaps =
                other.sectors.start < request.sectors.end && request.sectors.start < other.sectors.end;
            assert!(!overlaps, "M2: writes {} and {} are in flight together", request.id, other.id);
        }
        self.tally.writes_to_both += u32::from(to == WriteTo::Both);
        self.tally.writes_to_source_only += u32::from(to == WriteTo::SourceOnly);
    }

    fn start(&mut self, index: usize, to: &[Side]) {
        let request = &mut self.requests[index];
        request.stage = Stage::Running;
        for &side in to {
            let is_target_before_commit = side == Side::Target && request.route == Route::Mirrored;
            let chance = match (&request.ask, side) {
                (Ask::Write { .. }, Side::Source) => self.faults.write_source,
                (Ask::Write { .. }, Side::Target) if is_target_before_commit => self.faults.write_target,
                (Ask::Flush, Side::Target) if is_target_before_commit => self.faults.guest_flush,
                _ => 0,
            };
            let left: Vec<u32> = request.sectors.clone().collect();
            let fails_at =
                self.dice.per_mille(chance).then(|| self.dice.below(left.len() as u32 + 1) as usize);
            let mark = matches!(request.ask, Ask::Flush).then(|| self.disks[index_of(side)].flush_begins());
            request.sides[index_of(side)] =
                Transfer { is_used: true, left, is_done: false, fails_at, failed: false, mark };
        }
    }

    fn transfer(&mut self, index: usize) {
        let request = &mut self.requests[index];
        let unfinished = |side: &usize| request.sides[*side].is_used && !request.sides[*side].is_done;
        let first = self.dice.below(2) as usize;
        let side = [first, 1 - first].into_iter().find(unfinished).expect("a running request is on a disk");
        let transfer = &mut request.sides[side];
        let steps = if self.dice.one_in(2) { transfer.left.len() } else { 1 };
        for _ in 0..steps {
            if transfer.left.is_empty() || transfer.fails_at == Some(transfer.left.len()) {
                break;
            }
            let sector = self.dice.draw(&mut transfer.left);
            match request.ask {
                Ask::Read => request.read.push((sector, self.disks[side].read(sector))),
                Ask::Write { value, .. } => self.disks[side].land(sector, value),
                Ask::Flush => unreachable!("a flush has no sectors"),
            }
        }
        transfer.failed = transfer.fails_at == Some(transfer.left.len());
        if transfer.failed || transfer.left.is_empty() {
            transfer.is_done = true;
            if let Some(mark) = transfer.mark.take() {
                if transfer.failed {
                    self.disks[side].flush_fails(&mut self.dice);
                    self.is_flush_lost = true;
                    // The guest is going to be told by what is its disk now.
                    self.is_loss_told |= self.is_commit_durable;
                } else {
                    self.disks[side].flush_succeeds(&mark);
                }
                // Where one flush of the target has failed, no other one may claim to have made up for it.
                transfer.failed |= side == 1 && self.is_flush_lost;
            }
        }
        if request.sides.iter().all(|transfer| transfer.is_done || !transfer.is_used) {
            request.stage = Stage::Ended;
        }
    }

    fn end(&mut self, index: usize) {
        let request = &self.requests[index];
        let (id, route) = (request.id, request.route);
        let side = if route == Route::Target { 1 } else { 0 };
        let is_ok = !request.sides[side].failed;
        let target_failed = request.sides[1].failed;
        match request.ask {
            Ask::Write { .. } if route == Route::Tracked => {
                let extents = self.extents_of(&request.sectors);
                self.apply(Event::Dirtied(extents));
                self.complete(index, is_ok);
            }
            Ask::Write { .. } if route == Route::Mirrored => {
                let target = request.sides[1]
                    .is_used
                    .then(|| if target_failed { Err("write".into()) } else { Ok(()) });
                self.requests[index].stage = Stage::Waiting;
                self.apply(Event::WriteEnd { id, source_ok: is_ok, target });
            }
            Ask::Flush if route == Route::Mirrored && target_failed => {
                self.requests[index].stage = Stage::Waiting;
                self.apply(Event::FlushFailed { id, error: "flush".into() });
            }
            Ask::Read | Ask::Write { .. } | Ask::Flush => self.complete(index, is_ok),
        }
    }

    /// The machine says that the guest may be told.
    pub(crate) fn complete_write(&mut self, id: u64, result_of: Side) {
        let index = self.requests.iter().position(|request| request.id == id).expect("a write that ended");
        let request = &self.requests[index];
        assert!(request.stage == Stage::Waiting, "write {id} is completed before it ended");
        match result_of {
            Side::Source => assert!(self.route != Route::Target, "the guest is told the old disk's result"),
            Side::Target => {
                assert!(self.route == Route::Target, "a target's error before the commit is the guest's")
            }
        }
        let failed = request.sides[index_of(result_of)].failed;
        self.tally.held += u32::from(result_of == Side::Target && request.sides[1].failed);
        self.complete(index, !failed);
    }

    fn complete(&mut self, index: usize, is_ok: bool) {
        let request = self.requests.swap_remove(index);
        self.trace(|| format!("guest {} is told {is_ok}", request.id));
        match request.ask {
            Ask::Read => {
                for (sector, value) in request.read {
                    self.oracle.read(sector, value, request.begun);
                }
            }
            Ask::Write { .. } => self.oracle.write_ends(request.id, request.sectors, is_ok),
            Ask::Flush if is_ok => {
                self.oracle.flush_ends(request.begun);
                self.check_flushed();
            }
            Ask::Flush => {}
        }
    }

    /// Whether each write of this range is to be looked at as being under way.
    pub(crate) fn is_being_written(&self, sector: u32) -> bool {
        self.requests.iter().any(|request| request.is_on_its_way() && request.sectors.contains(&sector))
    }

    /// The daemon dies: what is on its way lands or not. The guest's requests stay, and are done again.
    pub(crate) fn drop_requests_on_disks(&mut self) {
        for request in &mut self.requests {
            for (side, transfer) in request.sides.iter().enumerate() {
                if let (Ask::Write { value, .. }, Stage::Running) = (&request.ask, request.stage) {
                    for &sector in transfer.left.iter().filter(|_| transfer.is_used && !transfer.failed) {
                        if self.dice.one_in(2) {
                            self.disks[side].land(sector, *value);
                        }
                    }
                }
            }
            request.stage = Stage::Issued;
            request.sides = [Transfer::default(), Transfer::default()];
            request.read.clear();
        }
    }

    pub(crate) fn check_no_request_hangs(&self, steps_max: u32) {
        for request in &self.requests {
            let age = self.steps - request.begun_step;
            assert!(
                age < steps_max,
                "{request:?} has been under way for {age} steps in {:?}",
                self.machine.state()
            );
        }
    }

    pub(crate) fn extents_of(&self, sectors: &Range<u32>) -> ExtentRange {
        let first = sectors.start / self.sectors_per_extent;
        ExtentRange { first, count: sectors.end.div_ceil(self.sectors_per_extent) - first }
    }
}

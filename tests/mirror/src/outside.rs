//! What the machine asks for: scans, copies, verifications, flushes, records, and the steps of an ending.

use mirror::{CopyResult, Event, ExtentRange, Record, RoaringBitmap, Route, VerifyResult};

use crate::disk::FlushMark;
use crate::history::{SECTOR_BYTES, Sim};

/// How a copy or verification is going to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Fine,
    SourceError,
    TargetError,
    TargetFull,
}

/// Something that was asked for and has not ended.
#[derive(Debug)]
pub(crate) enum Job {
    Scan { next: u32, found: RoaringBitmap },
    Copy { id: u64, range: ExtentRange, to_read: Vec<u32>, to_write: Vec<(u32, u32)>, fate: Fate },
    Verify { id: u64, to_read: Vec<(u32, usize)>, read: Vec<[Option<u32>; 2]>, first: u32, fate: Fate },
    Flush { mark: FlushMark },
    Record(Record),
    Finish,
    DeleteSource,
    DiscardTarget,
}

impl Sim {
    pub(crate) fn new_copy(&mut self, id: u64, range: ExtentRange) -> Job {
        let fate = match () {
            () if self.dice.per_mille(self.faults.copy_source) => Fate::SourceError,
            () if self.dice.per_mille(self.faults.copy_target) => Fate::TargetError,
            () if self.dice.per_mille(self.faults.copy_full) => Fate::TargetFull,
            () => Fate::Fine,
        };
        Job::Copy { id, range, to_read: self.sectors_of(range).collect(), to_write: Vec::new(), fate }
    }

    pub(crate) fn new_verification(&mut self, id: u64, range: ExtentRange) -> Job {
        let fate = match () {
            () if self.dice.per_mille(self.faults.verify_source) => Fate::SourceError,
            () if self.dice.per_mille(self.faults.verify_target) => Fate::TargetError,
            () => Fate::Fine,
        };
        let sectors = self.sectors_of(range);
        let to_read = sectors.clone().flat_map(|sector| [(sector, 0), (sector, 1)]).collect();
        Job::Verify { id, to_read, read: vec![[None; 2]; sectors.len()], first: sectors.start, fate }
    }

    pub(crate) fn sectors_of(&self, range: ExtentRange) -> std::ops::Range<u32> {
        let (first, end) = (range.first * self.sectors_per_extent, range.end() * self.sectors_per_extent);
        assert!(first < end && first < self.sectors, "{range:?} has no sectors");
        first..end.min(self.sectors)
    }

    pub(crate) fn is_copying(&self, extents: ExtentRange) -> bool {
        self.jobs.iter().any(|job| matches!(job, Job::Copy { range, .. } if range.overlaps(extents)))
    }

    /// One small thing happens to a job.
    pub(crate) fn advance_job(&mut self, index: usize) {
        let mut job = self.jobs.swap_remove(index);
        let steps = if self.dice.one_in(2) { self.dice.within(2, 16) } else { 1 };
        for _ in 0..steps {
            if let Some(event) = self.advance(&mut job) {
                self.apply(event);
                return;
            }
        }
        self.jobs.push(job);
    }

    fn advance(&mut self, job: &mut Job) -> Option<Event> {
        match job {
            Job::Scan { next, found } => {
                if self.dice.per_mille(self.faults.scan) {
                    return Some(Event::ScanFailed("scan".into()));
                }
                let extent = ExtentRange { first: *next, count: 1 };
                let holds_data = self.sectors_of(extent).any(|sector| self.disks[0].read(sector) != 0);
                if holds_data || self.dice.one_in(16) {
                    found.insert(*next);
                }
                *next += 1;
                (*next == self.extents).then(|| {
                    self.is_scanned = true;
                    Event::Scanned(std::mem::take(found))
                })
            }
            Job::Copy { .. } => self.advance_copy(job),
            Job::Verify { .. } => self.advance_verification(job),
            Job::Flush { mark } => {
                let is_bad = self.dice.per_mille(self.faults.flush);
                if is_bad {
                    self.disks[1].flush_fails(&mut self.dice);
                } else {
                    self.disks[1].flush_succeeds(mark);
                }
                // A guest's flush that failed meanwhile makes this one worthless.
                self.is_flush_lost |= is_bad;
                let is_bad = self.is_flush_lost;
                Some(Event::TargetFlushed(if is_bad { Err("flush".into()) } else { Ok(()) }))
            }
            Job::Record(record) => Some(self.end_record(record)),
            Job::Finish => {
                let is_bad = self.dice.per_mille(self.faults.finish);
                self.is_finished |= !is_bad || self.dice.one_in(2);
                Some(Event::TargetFinished(if is_bad { Err("rename".into()) } else { Ok(()) }))
            }
            Job::DeleteSource => {
                let is_bad = self.dice.per_mille(self.faults.delete);
                self.disks[0].is_deleted |= !is_bad || self.dice.one_in(2);
                Some(Event::SourceDeleted(if is_bad { Err("unlink".into()) } else { Ok(()) }))
            }
            Job::DiscardTarget => {
                let is_bad = self.dice.per_mille(self.faults.discard);
                self.disks[1].is_deleted |= !is_bad || self.dice.one_in(2);
                Some(Event::TargetDiscarded(if is_bad { Err("unlink".into()) } else { Ok(()) }))
            }
        }
    }

    fn advance_copy(&mut self, job: &mut Job) -> Option<Event> {
        let Job::Copy { id, range, to_read, to_write, fate } = job else {
            unreachable!("only called for copies")
        };
        let id = *id;
        if !to_read.is_empty() {
            if *fate == Fate::SourceError && self.dice.one_in(to_read.len() as u32) {
                return Some(Event::CopyEnd { id, result: CopyResult::SourceError("read".into()) });
            }
            let sector = self.dice.draw(to_read);
            let mut value = self.disks[0].read(sector);
            if self.dice.per_mille(self.faults.corrupt) {
                value = u32::MAX - 1;
                self.tally.corruptions += 1;
                self.is_corrupted = true;
            }
            to_write.push((sector, value));
            return None;
        }
        match fate {
            Fate::TargetError if self.dice.one_in(to_write.len() as u32 + 1) => {
                return Some(Event::CopyEnd { id, result: CopyResult::TargetError("write".into()) });
            }
            Fate::TargetFull if self.dice.one_in(to_write.len() as u32 + 1) => {
                return Some(Event::CopyEnd { id, result: CopyResult::TargetFull("write".into()) });
            }
            _ => {}
        }
        if !to_write.is_empty() {
            let (sector, value) = self.dice.draw(to_write);
            self.disks[1].land(sector, value);
            return None;
        }
        let bytes_written = u64::from(self.sectors_of(*range).len() as u32) * SECTOR_BYTES;
        Some(Event::CopyEnd { id, result: CopyResult::Done { bytes_written, bytes_zero: 0 } })
    }

    fn advance_verification(&mut self, job: &mut Job) -> Option<Event> {
        let Job::Verify { id, to_read, read, first, fate } = job else {
            unreachable!("only called for verifications")
        };
        let id = *id;
        if !to_read.is_empty() {
            let (sector, side) = self.dice.draw(to_read);
            read[(sector - *first) as usize][side] = Some(self.disks[side].read(sector));
            return None;
        }
        let different = read.iter().position(|values| values[0] != values[1]);
        let result = match (fate, different) {
            (Fate::SourceError, _) => VerifyResult::SourceError("read".into()),
            (Fate::Fine, None) => VerifyResult::Equal,
            (Fate::Fine, Some(index)) => {
                self.tally.differences += 1;
                VerifyResult::Different { offset: u64::from(*first + index as u32) * SECTOR_BYTES }
            }
            (Fate::TargetError | Fate::TargetFull, _) => VerifyResult::TargetError("read".into()),
        };
        Some(Event::VerifyEnd { id, result })
    }

    fn end_record(&mut self, record: &Record) -> Event {
        if self.dice.per_mille(self.faults.record) {
            self.journal.tear(record, &mut self.dice);
            self.tally.records_failed += 1;
            return Event::Recorded(Err("fsync".into()));
        }
        self.journal.append(record);
        match record {
            Record::Committed { .. } => {
                self.is_commit_durable = true;
                self.is_loss_told |= self.is_flush_lost;
            }
            Record::TargetFinished => self.is_finish_recorded = true,
            _ => {}
        }
        Event::Recorded(Ok(()))
    }

    /// The daemon dies: what is on its way lands or not.
    pub(crate) fn drop_jobs_on_disks(&mut self) {
        for job in std::mem::take(&mut self.jobs) {
            match job {
                Job::Copy { to_write, .. } => {
                    for (sector, value) in to_write {
                        if self.dice.one_in(2) {
                            self.disks[1].land(sector, value);
                        }
                    }
                }
                Job::Record(record) => self.journal.tear(&record, &mut self.dice),
                Job::Finish => self.is_finished |= self.dice.one_in(2),
                Job::DeleteSource => self.disks[0].is_deleted |= self.dice.one_in(2),
                Job::DiscardTarget => self.disks[1].is_deleted |= self.dice.one_in(2),
                Job::Scan { .. } | Job::Verify { .. } | Job::Flush { .. } => {}
            }
        }
    }

    /// Checks of what is asked for, before it is begun.
    pub(crate) fn check_copy(&self, range: ExtentRange) {
        assert!(!self.is_copying(range), "two copies of {range:?} at a time");
        if self.route == Route::Mirrored {
            for request in self.requests.iter().filter(|request| request.is_mirrored_in_flight()) {
                let extents = self.extents_of(&request.sectors);
                assert!(
                    !extents.overlaps(range),
                    "M2: a copy of {range:?} starts during write {}",
                    request.id
                );
            }
        }
    }
}

//! Reading back on both sides, beside the guest.
//!
//! Ranges are compared while nothing is dirty and while guest writes go on: nobody waits. A difference counts only if
//! no guest write touched the range since the comparison was asked for; else it is compared again, now extent by extent.
//! An extent that was touched each of the first `ROUNDS_BESIDE_GUEST` times is then compared with guest writes to it
//! (and to nothing else) waiting until it is read: so each extent is compared a bounded number of times, and an extent
//! under constant writes is verified too.

use roaring::RoaringBitmap;

use super::Machine;
use super::queue::{Slot, Work};
use crate::{Action, Config, CopyId, ExtentRange, Tick, Verify, VerifyResult};

/// How often an extent is compared while guest writes to it go on: first as part of a range, then alone.
const ROUNDS_BESIDE_GUEST: u32 = 3;
/// One extent of so many is compared where samples are asked for.
const EXTENTS_PER_SAMPLE: u32 = 64;

#[derive(Debug)]
struct InFlight {
    id: CopyId,
    range: ExtentRange,
    /// Something was written to it since it was asked for, so a difference means nothing.
    is_touched: bool,
}

/// What is verified, and what is not yet.
#[derive(Debug)]
pub(super) struct Verifier {
    what: Verify,
    extents: u32,
    seed: u64,
    /// Full: the next extent. Sample: the next sample, of `samples()`.
    position: u32,
    /// To be compared again, one by one: in this round, and in the next one.
    now: RoaringBitmap,
    later: RoaringBitmap,
    round: u32,
    in_flight: Vec<InFlight>,
    guards_waiting: u32,
}

impl Verifier {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            what: config.verify,
            extents: config.extent_count(),
            seed: u64::from(crc32c::crc32c(config.plan.job.as_bytes())),
            position: 0,
            now: RoaringBitmap::new(),
            later: RoaringBitmap::new(),
            round: 1,
            in_flight: Vec::new(),
            guards_waiting: 0,
        }
    }

    /// The samples: one of each group, the first extent and the last one.
    fn samples(&self) -> u32 {
        self.extents.div_ceil(EXTENTS_PER_SAMPLE) + 2
    }

    fn positions(&self) -> u32 {
        match self.what {
            Verify::None => 0,
            Verify::Sample => self.samples(),
            Verify::Full => self.extents,
        }
    }

    fn sample(&self, index: u32) -> u32 {
        let groups = self.samples() - 2;
        if index >= groups {
            return if index == groups { 0 } else { self.extents - 1 };
        }
        let first = index * EXTENTS_PER_SAMPLE;
        let count = EXTENTS_PER_SAMPLE.min(self.extents - first);
        first + (scrambled(self.seed ^ (u64::from(index) << 32)) % u64::from(count)) as u32
    }

    /// Extents that are compared at least.
    pub(super) fn extents_to_verify(&self) -> u32 {
        self.positions()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.position == self.positions()
            && self.now.is_empty()
            && self.later.is_empty()
            && self.in_flight.is_empty()
            && self.guards_waiting == 0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    fn in_flight(&self) -> u32 {
        self.in_flight.len() as u32 + self.guards_waiting
    }

    /// The next range, of so many extents at most, and whether guest writes to it have to wait.
    fn next(&mut self, extents_max: u32) -> Option<(ExtentRange, bool)> {
        if self.position < self.positions() {
            let range = match self.what {
                Verify::Full => {
                    let count = extents_max.min(self.extents - self.position);
                    ExtentRange { first: self.position, count }
                }
                _ => ExtentRange { first: self.sample(self.position), count: 1 },
            };
            self.position += if self.what == Verify::Full { range.count } else { 1 };
            return Some((range, false));
        }
        if self.now.is_empty() && self.in_flight() == 0 && !self.later.is_empty() {
            std::mem::swap(&mut self.now, &mut self.later);
            self.round += 1;
        }
        let first = self.now.min()?;
        self.now.remove(first);
        Some((ExtentRange { first, count: 1 }, self.round > ROUNDS_BESIDE_GUEST))
    }

    /// Something is (or is about to be) written to these extents.
    pub(super) fn touch(&mut self, range: ExtentRange) {
        for verification in &mut self.in_flight {
            verification.is_touched |= verification.range.overlaps(range);
        }
    }

    /// These extents may differ again: what was verified of them has to be verified anew.
    pub(super) fn outdate(&mut self, range: ExtentRange) {
        self.touch(range);
        match self.what {
            Verify::None => {}
            // Samples are few: take them all again.
            Verify::Sample => self.restart(),
            Verify::Full => {
                let end = range.end().min(self.position);
                if range.first < end {
                    self.later.insert_range(range.first..end);
                }
            }
        }
    }

    /// All of it has to be verified anew.
    pub(super) fn restart(&mut self) {
        self.position = 0;
        self.now.clear();
        self.later.clear();
        self.round = 1;
        for verification in &mut self.in_flight {
            verification.is_touched = true;
        }
    }

    /// A guard left the queue without having run.
    pub(super) fn put_back(&mut self, range: ExtentRange) {
        self.guards_waiting -= 1;
        self.later.insert_range(range.first..range.end());
    }
}

/// Spreads any number over 64 bits (the finish of splitmix64).
fn scrambled(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

impl Machine {
    /// Begins comparisons; whether all is verified.
    pub(super) fn pump_verifier(&mut self, now: Tick, actions: &mut Vec<Action>) -> bool {
        let allowed = self.governor.verifications();
        let extents_max = u32::try_from(allowed.bytes / self.config.extent_size).unwrap_or(u32::MAX);
        while self.verifier.in_flight() < allowed.in_flight && !self.verifier.is_complete() {
            self.pace_at = self.free_at(now);
            if self.pace_at.is_some() {
                break;
            }
            let Some((range, is_guarded)) = self.verifier.next(extents_max) else { break };
            self.pace.take(self.bytes_of(range));
            let id = self.next_id();
            if is_guarded {
                self.verifier.guards_waiting += 1;
                self.queue.insert(Work::Guard(id), range, (0, 0));
                self.start_ready(now, actions);
            } else {
                self.start_verification(now, id, range, actions);
            }
        }
        self.verifier.is_complete()
    }

    fn start_verification(&mut self, now: Tick, id: CopyId, range: ExtentRange, actions: &mut Vec<Action>) {
        assert!(self.is_synced(), "{range:?} would be compared though the sides are not held equal");
        let is_touched = self.queue.is_written(range);
        self.verifier.in_flight.push(InFlight { id, range, is_touched });
        self.governor.begun(now);
        actions.push(Action::Verify { id, range });
    }

    /// The guard's turn has come: no guest write to its extents is in flight, and none will start until it ends.
    pub(super) fn start_guarded(
        &mut self,
        now: Tick,
        slot: Slot,
        id: CopyId,
        range: ExtentRange,
        actions: &mut Vec<Action>,
    ) {
        if !self.is_synced() {
            return self.undo_waiting(Work::Guard(id), slot);
        }
        self.verifier.guards_waiting -= 1;
        self.start_verification(now, id, range, actions);
    }

    pub(super) fn verify_ended(
        &mut self,
        now: Tick,
        id: CopyId,
        result: VerifyResult,
        actions: &mut Vec<Action>,
    ) {
        let index = self.verifier.in_flight.iter().position(|verification| verification.id == id);
        let Some(index) = index else { panic!("verification {id} ended without having begun") };
        let InFlight { range, is_touched, .. } = self.verifier.in_flight.swap_remove(index);
        if let Some(slot) = self.queue.other_slot(id) {
            self.queue.remove(slot);
        }
        self.governor.ended(now, self.bytes_of(range));
        if result == VerifyResult::Equal {
            let bytes = self.bytes_of(range);
            self.counts.bytes_verified += bytes;
            self.meter.note(now, bytes);
        }
        if !self.is_open() {
            return;
        }
        match result {
            VerifyResult::Equal => {}
            VerifyResult::Different { .. } if is_touched => {
                self.verifier.later.insert_range(range.first..range.end());
            }
            VerifyResult::Different { offset } => self.fail(
                format!("verification found the target different from the source at byte {offset}, with no guest write there"),
                actions,
            ),
            VerifyResult::SourceError(error) => {
                self.fail(format!("the source could not be read to verify the target: {error}"), actions);
            }
            // Writing it again may mend it.
            VerifyResult::TargetError(error) => {
                self.mark_dirty(range);
                self.target_failed(now, error, actions);
            }
        }
    }
}

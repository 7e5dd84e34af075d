//! How much copying and verifying may ask of the disks while a guest uses them.
//!
//! What makes a guest's request slow is the work that it meets at the disk, so the governor says how much of that may be
//! there at once: a *window* of bytes. A large window is several copies in flight, of full size; a smaller one makes them
//! smaller first, down to one extent each, and then fewer; one of less than an extent leaves pauses between copies, long
//! as the copies were by the part of an extent that the window has. So a slow disk is left alone for longer than a fast
//! one, without any rate being known.
//!
//! ```text
//!   copy_bytes_max x in flight ◄──────────── extent x in flight ◄──── one extent ◄──── one extent, then a pause ...
//!              (size shrinks)                        (number shrinks)
//! ```
//!
//! What the guest's 99th percentile may be is its budget or, without one, what it sees when nothing is copied, and two
//! fifths; what a guest sees is a tenth of a millisecond more than what is heard. That is looked at again and again: the move *rests* for a moment, one twentieth of the time and at first more
//! often. The window grows
//! while the guest is well within that, stays as it is where the guest is just within, and shrinks when it is not.
//! Each judgement is made of requests that saw the present window, so that the answer to a change is heard before the
//! next one is made.
//!
//! Two things hold whatever is heard: a guest that asks for next to nothing holds nothing up, and a move that is slower
//! than the floor while it works gets a larger window, not a smaller one. So the move ends. Without a budget the pauses are
//! bounded too, so that the floor of a fast disk is higher.

use std::collections::VecDeque;

use crate::{Latencies, Tick};

/// The rate of a move below which the guest's latency does not bring it, in bytes a second, with a budget ...
const FLOOR_WITH_BUDGET: u64 = 8 << 20;
/// ... and without one.
const FLOOR: u64 = 32 << 20;
/// Fewer requests than one in this time are next to nothing.
const IDLE_US_PER_REQUEST: u64 = 200_000;
/// What was heard for so long says how busy the guest is, and is shown.
const HEARD_US: u64 = 2_000_000;

/// A window is judged by so many requests, after so long ...
const JUDGED_REQUESTS: u64 = 100;
const JUDGED_US: u64 = 500_000;
/// ... or, before the guest was ever slowed down too much, after so long ...
const FIRST_JUDGED_US: u64 = 200_000;
/// ... or, of a slow guest, after so long by however many there are ...
const JUDGED_US_MAX: u64 = 2_000_000;
/// ... or sooner, when one in so many is too slow.
const OUTRAGE: u64 = 25;

/// Between this part of what is allowed and all of it, the window stays as it is.
const CONTENT: f64 = 0.85;
/// The window is multiplied by this much at most, and at first.
const GROWTH_MAX: f64 = 1.25;
const FIRST_GROWTH: f64 = 2.0;
/// It is multiplied by something between these where it was too large.
const SHRINKING: std::ops::RangeInclusive<f64> = 0.3..=0.9;
/// This part of an extent is the window at first: what is allowed is found from below.
const FIRST_WINDOW_PART: f64 = 1.0 / 8.0;
/// No window is a smaller part of an extent, with a budget ...
const WINDOW_PART_MIN_WITH_BUDGET: f64 = 1.0 / 4096.0;
/// ... and without one: a pause is at most seven times as long as the copy before it. On a fast disk less hardly changes a
/// guest's 99th percentile, and what that is in rests is too uncertain to give up nearly all of the disk for it.
const WINDOW_PART_MIN: f64 = 1.0 / 8.0;

/// A rest ends when it was quiet for so long ...
const QUIET_US: u64 = 200_000;
/// ... or after so long.
const REST_US_MAX: u64 = 500_000;
/// The next one comes after this many times its length ...
const WORK_PER_REST: u64 = 20;
/// ... or, until there were so many, after this many.
const FIRST_RESTS: usize = 3;
const WORK_PER_FIRST_REST: u64 = 4;
/// Rests that are remembered.
const RESTS_KEPT: usize = 5;
/// Without a budget the guest's 99th percentile may be so many tenths of what it is in rests ...
const TENTHS_OF_QUIET: u64 = 14;
/// ... and of so much more: a guest waits for its own interrupt and for the worker to wake up, too, of which nothing is heard
/// here. Without this a disk that answers in a tenth of a millisecond would be copied at the floor, and no guest see why.
const UNHEARD_US: u64 = 100;

/// What the governor works with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) extent_size: u64,
    pub(super) copy_bytes_max: u64,
    pub(super) in_flight_max: u32,
}

/// What may be begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allowance {
    /// Copies, or verifications, at once.
    pub(super) in_flight: u32,
    /// Bytes of each.
    pub(super) bytes: u64,
}

/// Requests that ended after `since` and until the next hearing.
#[derive(Debug)]
struct Heard {
    since: Tick,
    latencies: Latencies,
}

#[derive(Debug)]
struct Rest {
    since: Tick,
    quiet_us: u64,
    quiet: Latencies,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Governor {
    limits: Limits,
    budget_us: Option<u64>,
    /// Bytes.
    window: f64,
    /// Whether the window was never too large.
    is_first: bool,
    /// Nothing was heard, or next to nothing: all is allowed.
    is_idle: bool,
    last_heard: Option<Tick>,
    recent: VecDeque<Heard>,
    /// What the present window is judged by, and since when.
    judged: Latencies,
    judged_us: u64,
    rest: Option<Rest>,
    rest_due: Tick,
    /// Of the last rests.
    quiet: VecDeque<Latencies>,
    in_flight: u32,
    /// Something was in flight since the last hearing.
    has_worked: bool,
    /// When something was last begun while nothing was in flight.
    begun_at: Tick,
    /// What was done with the present window, and the time for it, pauses included.
    work_bytes: u64,
    work_us: u64,
    /// The end of the pause between two copies.
    pause_until: Tick,
}

impl Governor {
    pub(super) fn new(limits: Limits, budget_us: Option<u64>) -> Self {
        Self {
            limits,
            budget_us,
            window: limits.extent_size as f64 * FIRST_WINDOW_PART,
            is_first: true,
            is_idle: true,
            last_heard: None,
            recent: VecDeque::new(),
            judged: Latencies::default(),
            judged_us: 0,
            rest: None,
            rest_due: Tick::default(),
            quiet: VecDeque::new(),
            in_flight: 0,
            has_worked: false,
            begun_at: Tick::default(),
            work_bytes: 0,
            work_us: 0,
            pause_until: Tick::default(),
        }
    }

    pub(super) fn budget_us(&self) -> Option<u64> {
        self.budget_us
    }

    pub(super) fn set_budget(&mut self, now: Tick, budget_us: Option<u64>) {
        if budget_us == self.budget_us {
            return;
        }
        self.budget_us = budget_us;
        self.rest = None;
        self.rest_due = now;
        self.is_first = true;
        self.judge_anew();
    }

    /// The guest's 99th percentile of the last two seconds, in microseconds.
    pub(super) fn guest_p99_us(&self) -> Option<u64> {
        self.recently().p99_us()
    }

    fn recently(&self) -> Latencies {
        self.recent.iter().flat_map(|heard| heard.latencies.iter()).collect()
    }

    /// What the 99th percentile may be, as far as that is known.
    fn allowed_us(&self) -> Option<u64> {
        if self.budget_us.is_some() {
            return self.budget_us;
        }
        self.quiet_p99_us().map(|us| us.saturating_add(UNHEARD_US).saturating_mul(TENTHS_OF_QUIET) / 10)
    }

    /// What the guest sees when nothing is copied: of the rests' percentiles the middle one, since whatever else the machine
    /// did in one rest would raise that of all of them together. Where a rest has too few requests for a percentile of its
    /// own, that of all together.
    fn quiet_p99_us(&self) -> Option<u64> {
        if self.quiet.iter().any(|rest| rest.count() < JUDGED_REQUESTS) {
            return self.quiet.iter().flat_map(Latencies::iter).collect::<Latencies>().p99_us();
        }
        let mut each: Vec<u64> = self.quiet.iter().filter_map(Latencies::p99_us).collect();
        each.sort_unstable();
        each.get(each.len().saturating_sub(1) / 2).copied()
    }

    fn window_max(&self) -> f64 {
        self.limits.copy_bytes_max as f64 * f64::from(self.limits.in_flight_max)
    }

    fn floor(&self) -> u64 {
        if self.budget_us.is_some() { FLOOR_WITH_BUDGET } else { FLOOR }
    }

    /// What may be copied at once.
    pub(super) fn copies(&self) -> Allowance {
        if self.is_idle {
            return Allowance { in_flight: self.limits.in_flight_max, bytes: self.limits.copy_bytes_max };
        }
        let in_flight = self.window / self.limits.extent_size as f64;
        let in_flight = in_flight.clamp(1.0, f64::from(self.limits.in_flight_max)) as u32;
        Allowance { in_flight, bytes: self.whole_extents(self.window / f64::from(in_flight)) }
    }

    /// What may be compared at once: each is read on both sides.
    pub(super) fn verifications(&self) -> Allowance {
        if self.is_idle {
            return self.copies();
        }
        Allowance { in_flight: 1, bytes: self.whole_extents(self.window / 2.0) }
    }

    fn whole_extents(&self, bytes: f64) -> u64 {
        let Limits { extent_size, copy_bytes_max, .. } = self.limits;
        (bytes as u64 / extent_size * extent_size).clamp(extent_size, copy_bytes_max)
    }

    /// `None` when work may begin now, else when to ask again.
    pub(super) fn free_at(&mut self, now: Tick) -> Option<Tick> {
        if let Some(rest) = &self.rest {
            let end = rest.since.plus_us(REST_US_MAX);
            if now < end {
                return Some(end);
            }
            // Nothing is heard any more.
            self.end_rest(now);
        }
        (!self.is_idle && now < self.pause_until).then_some(self.pause_until)
    }

    pub(super) fn begun(&mut self, now: Tick) {
        if self.in_flight == 0 {
            self.begun_at = now;
        }
        self.in_flight += 1;
        self.has_worked = true;
    }

    pub(super) fn ended(&mut self, now: Tick, bytes: u64) {
        assert!(self.in_flight > 0, "work ended that was not begun");
        self.in_flight -= 1;
        self.work_bytes += bytes;
        if self.in_flight > 0 {
            return;
        }
        let took_us = now.us_since(self.begun_at);
        self.work_us += took_us;
        self.pause(now, took_us, bytes, self.window / self.limits.extent_size as f64);
    }

    /// The caller did work of its own from `begun` on, in pieces whose size is not the governor's to say. So the pause after
    /// each makes up for the whole of what the window lacks.
    pub(super) fn did_beside(&mut self, begun: Tick, now: Tick, bytes: u64) {
        self.has_worked = true;
        self.work_bytes += bytes;
        let took_us = now.us_since(begun);
        self.work_us += took_us;
        self.pause(now, took_us, bytes, self.window / self.window_max());
    }

    /// A pause after work, which then took this share of the time.
    fn pause(&mut self, now: Tick, took_us: u64, bytes: u64, share: f64) {
        if self.is_idle || share >= 1.0 {
            return;
        }
        let pause_us = took_us as f64 * (1.0 / share - 1.0);
        let at_floor_us = (bytes.saturating_mul(1_000_000) / self.floor()).saturating_sub(took_us);
        let pause_us = (pause_us as u64).min(at_floor_us);
        self.work_us += pause_us;
        self.pause_until = now.plus_us(pause_us);
    }

    /// The guest's requests since the last hearing.
    pub(super) fn hear(&mut self, now: Tick, latencies: Latencies) {
        let since = self.last_heard.replace(now).unwrap_or(now);
        let is_quiet = !std::mem::replace(&mut self.has_worked, self.in_flight > 0);
        let us = now.us_since(since);
        self.recent.push_back(Heard { since, latencies: latencies.clone() });
        while self.recent.front().is_some_and(|heard| now.us_since(heard.since) > HEARD_US) {
            self.recent.pop_front();
        }
        self.look_whether_idle(now);
        if self.is_idle {
            self.rest = None;
            return self.judge_anew();
        }
        if self.budget_us.is_none() && self.rest.is_none() && now >= self.rest_due {
            self.rest = Some(Rest { since: now, quiet_us: 0, quiet: Latencies::default() });
        }
        if let Some(rest) = &mut self.rest {
            if is_quiet {
                rest.quiet_us += us;
                rest.quiet.add(&latencies);
            }
            if rest.quiet_us >= QUIET_US || now.us_since(rest.since) >= REST_US_MAX {
                self.end_rest(now);
            }
        } else if !is_quiet {
            self.judged.add(&latencies);
            self.judged_us += us;
            self.judge();
        }
    }

    /// A request that took long may be why there were few.
    fn look_whether_idle(&mut self, now: Tick) {
        let recently = self.recently();
        let heard_us = self.recent.front().map_or(0, |first| now.us_since(first.since));
        let is_slow = self.allowed_us().is_some_and(|allowed| recently.slower_than(allowed) > 0);
        let count = recently.count();
        self.is_idle = count == 0 || (count * IDLE_US_PER_REQUEST < heard_us && !is_slow);
    }

    fn end_rest(&mut self, now: Tick) {
        let Some(rest) = self.rest.take() else { return };
        if rest.quiet.count() > 0 {
            self.quiet.push_back(rest.quiet);
        }
        let work = if self.quiet.len() < FIRST_RESTS { WORK_PER_FIRST_REST } else { WORK_PER_REST };
        self.rest_due = now.plus_us(now.us_since(rest.since) * work);
        if self.quiet.len() > RESTS_KEPT {
            self.quiet.pop_front();
        }
        // What ends now has waited, or is late news of the time before.
        self.judge_anew();
    }

    fn judge_anew(&mut self) {
        self.judged = Latencies::default();
        (self.judged_us, self.work_bytes, self.work_us) = (0, 0, 0);
    }

    fn judge(&mut self) {
        let (Some(allowed), Some(p99)) = (self.allowed_us(), self.judged.p99_us()) else { return };
        let count = self.judged.count();
        let is_outrage = count >= JUDGED_REQUESTS && self.judged.slower_than(allowed) * OUTRAGE > count;
        let needed_us = match count {
            JUDGED_REQUESTS.. if self.is_first => FIRST_JUDGED_US,
            JUDGED_REQUESTS.. => JUDGED_US,
            _ => JUDGED_US_MAX,
        };
        if self.judged_us < needed_us && !is_outrage {
            return;
        }
        let room = allowed as f64 / (p99 as f64).max(1.0);
        let factor = if room < 1.0 {
            self.is_first = false;
            room.clamp(*SHRINKING.start(), *SHRINKING.end()).max(self.to_floor())
        } else if room * CONTENT < 1.0 {
            1.0
        } else if self.is_first {
            FIRST_GROWTH
        } else {
            (room * CONTENT).sqrt().clamp(1.0, GROWTH_MAX)
        };
        let part_min = if self.budget_us.is_some() { WINDOW_PART_MIN_WITH_BUDGET } else { WINDOW_PART_MIN };
        let window_min = self.limits.extent_size as f64 * part_min;
        self.window = (self.window * factor).clamp(window_min, self.window_max());
        self.judge_anew();
    }

    /// What the window has to be multiplied by for the floor's rate.
    fn to_floor(&self) -> f64 {
        let floor_bytes = self.floor() as f64 * self.work_us as f64 / 1e6;
        (floor_bytes / (self.work_bytes as f64).max(1.0)).min(GROWTH_MAX)
    }
}

#[cfg(test)]
mod tests;

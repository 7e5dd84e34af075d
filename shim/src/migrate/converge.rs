//! After each round: copy another one, pause now, or do something about a guest that writes faster than it is copied. Pure:
//! no clock, no machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pages::PAGE_BYTES;

/// Most rounds while the machine runs. After that it is as if the time were up.
pub const ROUNDS_MAX: u32 = 1000;
/// First share of time that processors rest when they write too fast, percent.
pub const THROTTLE_FIRST: u8 = 20;
/// What is added at each further step, percent.
pub const THROTTLE_STEP: u8 = 10;
/// Largest share, percent.
pub const THROTTLE_MAX: u8 = 99;
/// Rounds in a row that gain too little before something is done about it.
pub const STALLED_ROUNDS: u32 = 2;
/// A round gains too little if it leaves more than this share of what it copied, percent.
pub const STALLED_PERCENT: u64 = 70;
/// Time that pause, state and commit take besides the pages, as it is estimated before it is known.
pub const FIXED_COST: Duration = Duration::from_millis(20);

/// What to do when the time is up and the machine is still writing too fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Give up; the machine goes on where it is.
    #[default]
    Cancel,
    /// Pause it and move what is left, however long that takes.
    Force,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest time that the machine may stand still.
    pub downtime: Duration,
    /// Longest time until the machine is paused.
    pub timeout: Option<Duration>,
    /// What to do then.
    pub on_timeout: OnTimeout,
    /// Whether processors may be slowed down.
    pub auto_converge: bool,
    /// Whether the machine may run before all its pages are there.
    pub postcopy: bool,
}

/// What is known after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Its number, from 0: the first one copies everything.
    pub number: u32,
    /// Pages with content that it copied.
    pub copied: u64,
    /// Pages that were written meanwhile.
    pub dirty: u64,
    /// How long it took.
    pub took: Duration,
    /// Time since the migration began.
    pub elapsed: Duration,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Copy what was written meanwhile.
    Copy,
    /// The same, with processors that rest this share of the time, percent.
    Throttle(u8),
    /// Pause the machine and copy the rest.
    Pause,
    /// Pause the machine and run it on the target at once; the rest follows.
    Postcopy,
    /// Give up, for this reason.
    GiveUp(String),
}

/// Decides round by round.
#[derive(Debug, Clone)]
pub struct Convergence {
    limits: Limits,
    /// Bytes of memory copied per second, as of the last round that says something about it.
    rate: Option<u64>,
    stalled: u32,
    throttle: u8,
    expected: Option<Duration>,
}

/// Fewer pages than these say nothing about the rate of copying.
const RATE_PAGES_MIN: u64 = 256;

impl Convergence {
    /// At the beginning.
    pub fn new(limits: Limits) -> Self {
        Self { limits, rate: None, stalled: 0, throttle: 0, expected: None }
    }

    /// Bytes of memory copied per second, if that is known.
    pub fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// The downtime that was estimated after the last round.
    pub fn expected_downtime(&self) -> Option<Duration> {
        self.expected
    }

    /// Share of time that processors rest, percent.
    pub fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Whether the time is up.
    pub fn is_late(&self, elapsed: Duration) -> bool {
        self.limits.timeout.is_some_and(|timeout| elapsed >= timeout)
    }

    /// Whether being late ends the attempt.
    pub fn gives_up_when_late(&self) -> bool {
        self.limits.on_timeout == OnTimeout::Cancel && !self.limits.postcopy
    }

    /// What comes after this round.
    pub fn after(&mut self, round: &Round) -> Decision {
        self.learn(round);
        let expected = self.estimate(round.dirty);
        self.expected = Some(expected);
        if expected <= self.limits.downtime || round.dirty == 0 {
            return Decision::Pause;
        }
        if self.is_late(round.elapsed) || round.number + 1 >= ROUNDS_MAX {
            return self.late(round, expected);
        }
        if round.dirty * 100 <= round.copied * STALLED_PERCENT {
            self.stalled = 0;
            return Decision::Copy;
        }
        self.stalled += 1;
        if self.stalled < STALLED_ROUNDS {
            return Decision::Copy;
        }
        if self.limits.postcopy {
            return Decision::Postcopy;
        }
        if self.limits.auto_converge && self.throttle < THROTTLE_MAX {
            self.stalled = 0;
            self.throttle = match self.throttle {
                0 => THROTTLE_FIRST,
                throttle => throttle.saturating_add(THROTTLE_STEP).min(THROTTLE_MAX),
            };
            return Decision::Throttle(self.throttle);
        }
        Decision::Copy
    }

    fn learn(&mut self, round: &Round) {
        let micros = round.took.as_micros().max(1);
        let rate = u128::from(round.copied) * PAGE_BYTES as u128 * 1_000_000 / micros;
        if round.copied >= RATE_PAGES_MIN || self.rate.is_none() {
            self.rate = Some(u64::try_from(rate).unwrap_or(u64::MAX).max(1));
        }
    }

    /// How long the machine would stand still with so many pages left.
    fn estimate(&self, dirty: u64) -> Duration {
        let rate = u128::from(self.rate.unwrap_or(1).max(1));
        let micros = u128::from(dirty) * PAGE_BYTES as u128 * 1_000_000 / rate;
        FIXED_COST.saturating_add(Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)))
    }

    fn late(&self, round: &Round, expected: Duration) -> Decision {
        if self.limits.postcopy {
            return Decision::Postcopy;
        }
        match self.limits.on_timeout {
            OnTimeout::Force => Decision::Pause,
            OnTimeout::Cancel => Decision::GiveUp(format!(
                "the guest writes its memory faster than it is copied: after {} rounds in {:.1} s, {} MiB are left, which would \
                 stop it for {} ms instead of at most {} ms; allow a longer downtime, auto-converge or post-copy",
                round.number + 1,
                round.elapsed.as_secs_f64(),
                (round.dirty * PAGE_BYTES as u64) >> 20,
                expected.as_millis(),
                self.limits.downtime.as_millis()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits() -> Limits {
        Limits {
            downtime: Duration::from_millis(300),
            timeout: Some(Duration::from_secs(60)),
            on_timeout: OnTimeout::Cancel,
            auto_converge: false,
            postcopy: false,
        }
    }

    /// 25,600 pages (100 MiB) in 1 s.
    fn round(number: u32, dirty: u64) -> Round {
        Round {
            number,
            copied: 25_600,
            dirty,
            took: Duration::from_secs(1),
            elapsed: Duration::from_secs(u64::from(number) + 1),
        }
    }

    #[test]
    fn the_machine_is_paused_when_the_rest_fits_into_the_downtime() {
        let mut convergence = Convergence::new(limits());
        assert_eq!(convergence.after(&round(0, 25_600)), Decision::Copy);
        assert_eq!(convergence.after(&round(1, 7_200)), Decision::Copy);
        assert_eq!(convergence.after(&round(2, 7_100)), Decision::Pause);
        assert_eq!(convergence.expected_downtime().expect("known").as_millis(), 297);
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_slowed_down_step_by_step() {
        let mut convergence = Convergence::new(Limits { auto_converge: true, ..limits() });
        let mut steps = Vec::new();
        for number in 0..30 {
            if let Decision::Throttle(percent) = convergence.after(&round(number, 25_000)) {
                steps.push(percent);
            }
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }

    #[test]
    fn post_copy_takes_over_when_copying_does_not_gain() {
        let mut convergence = Convergence::new(Limits { postcopy: true, ..limits() });
        assert_eq!(convergence.after(&round(0, 25_000)), Decision::Copy);
        assert_eq!(convergence.after(&round(1, 25_000)), Decision::Postcopy);
    }

    #[test]
    fn when_the_time_is_up_it_gives_up_or_forces_as_asked() {
        let late = round(60, 25_000);
        let Decision::GiveUp(reason) = Convergence::new(limits()).after(&late) else {
            panic!("must give up")
        };
        assert!(reason.contains("faster than it is copied") && reason.contains("97 MiB"), "{reason}");
        let force = Limits { on_timeout: OnTimeout::Force, ..limits() };
        assert_eq!(Convergence::new(force).after(&late), Decision::Pause);
        let postcopy = Limits { postcopy: true, ..limits() };
        assert_eq!(Convergence::new(postcopy).after(&late), Decision::Postcopy);
    }

    #[test]
    fn an_idle_guest_is_paused_after_the_first_round() {
        let mut convergence = Convergence::new(limits());
        let idle = Round { copied: 0, dirty: 0, ..round(0, 0) };
        assert_eq!(convergence.after(&idle), Decision::Pause);
    }

    proptest! {
        #[test]
        fn it_ends_whatever_the_guest_does(
            rounds in proptest::collection::vec((0u64..1 << 28, 0u64..1 << 28, 0u64..1 << 40), 1..50),
            auto_converge: bool, postcopy: bool, force: bool, timeout in proptest::option::of(0u64..1 << 20),
        ) {
            let on_timeout = if force { OnTimeout::Force } else { OnTimeout::Cancel };
            let timeout = timeout.map(Duration::from_secs);
            let limits = Limits { auto_converge, postcopy, on_timeout, timeout, ..limits() };
            let mut convergence = Convergence::new(limits);
            let mut elapsed = Duration::ZERO;
            for number in 0.. {
                prop_assert!(number < ROUNDS_MAX);
                let (copied, dirty, micros) = rounds[number as usize % rounds.len()];
                let took = Duration::from_micros(micros);
                elapsed += took;
                match convergence.after(&Round { number, copied, dirty, took, elapsed }) {
                    Decision::Copy => {}
                    Decision::Throttle(percent) => prop_assert!(auto_converge && (20..=99).contains(&percent)),
                    Decision::Postcopy => { prop_assert!(postcopy); break }
                    Decision::GiveUp(_) => { prop_assert!(!postcopy && !force); break }
                    Decision::Pause => break,
                }
            }
        }
    }
}

//! What the dice choose for a history: the move's parameters, and what fails.

use mirror::{Config, MirrorMode, OnTargetError, Plan, SwitchMode, Verify};

use crate::dice::Dice;
use crate::history::SECTOR_BYTES;

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
    pub(crate) fn chosen(dice: &mut Dice) -> Self {
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

/// Any move.
pub(crate) fn chosen_config(dice: &mut Dice) -> Config {
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
        max_guest_p99_us: dice.one_in(2).then(|| u64::from(dice.within(1, 2_000))),
        copies_in_flight_max: dice.within(1, 4),
        copy_bytes_max: extent_size * u64::from(dice.within(1, 6)),
    }
}

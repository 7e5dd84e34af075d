//! Does a disk that holds little stay small when it is moved, and does it move in the time of what it holds?

use anyhow::{Result, ensure};

use crate::choice::{Common, Kind, RivalChoice, check_size, compare};
use crate::machine;
use crate::report::Comparison;
use crate::server::Plan;
use crate::size::{GIB, MIB, show_size};
use crate::trial::Trial;

/// Pieces in which the data lies, spread over the disk.
pub const PIECES: u64 = 16;
/// What the rival gets instead of a disk that it would inflate.
const RIVAL_SIZE: u64 = 4 * GIB;
/// What that one holds.
const RIVAL_HELD: u64 = 64 * MIB;

/// The disk.
#[derive(Debug, Clone, Copy)]
pub struct Thin {
    /// Its size.
    pub size: u64,
    /// What it holds, in 16 pieces.
    pub held: u64,
    /// Its format, which it keeps.
    pub format: Kind,
}

/// Moves a thin disk to another image of its format, without load.
///
/// # Errors
/// When blockd can't be measured.
pub fn run(common: &Common, thin: Thin) -> Result<Comparison> {
    check_size(thin.size)?;
    ensure!(
        thin.held <= thin.size && thin.held.is_multiple_of(PIECES * MIB),
        "--held {} of {}: give a multiple of 16M that fits",
        show_size(thin.held),
        show_size(thin.size)
    );
    let ours = trial(common, thin.format, thin.size, thin.held);
    machine::need_room(&ours.dir, thin.held * 4 + GIB)?;
    let full = common.rival == RivalChoice::Full || thin.size <= RIVAL_SIZE;
    let theirs = if full { ours.clone() } else { trial(common, thin.format, RIVAL_SIZE, RIVAL_HELD) };
    // The rival's target takes the disk's full size.
    let room = machine::need_room(&ours.dir, theirs.plan.size + theirs.held_bytes() * 2 + GIB);
    let no_rival = common.no_rival().or_else(|| room.err().map(|error| error.to_string()));
    let mut question = format!(
        "A {} of {} that holds {} is moved",
        thin.format.name().to_uppercase(),
        show_size(thin.size),
        show_size(thin.held)
    );
    if no_rival.is_none() && !full {
        question.push_str(&format!(
            " (qemu-storage-daemon inflates the target to its full size, so that it was given {} holding {}: compare \
             the percentages; --rival full gives it the same disk)",
            show_size(RIVAL_SIZE),
            show_size(RIVAL_HELD)
        ));
    }
    compare(question, &ours, no_rival.map_or(Ok(&theirs), Err))
}

fn trial(common: &Common, format: Kind, size: u64, held: u64) -> Trial {
    let image = format.image();
    let plan = Plan {
        from: image,
        to: image,
        size,
        verify: "full".into(),
        max_guest_p99_us: None,
        patience: common.patience(),
        own_thread: true,
    };
    let (held, seed) = (pieces(size, held), common.seed);
    Trial { dir: common.dir(), plan, held, guest: None, seed, read_back: false }
}

/// Where `held` bytes lie on a disk of `size`.
pub fn pieces(size: u64, held: u64) -> Vec<std::ops::Range<u64>> {
    let (stride, piece) = (size / PIECES / MIB * MIB, held / PIECES);
    (0..PIECES).map(|index| index * stride..index * stride + piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_and_make_up_what_is_held() {
        let found = pieces(64 * GIB, GIB);
        assert_eq!(found.iter().map(|range| range.end - range.start).sum::<u64>(), GIB);
        assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
        assert!(found.last().unwrap().end <= 64 * GIB);
        assert_eq!(pieces(GIB, GIB).last().unwrap().end, GIB);
    }
}

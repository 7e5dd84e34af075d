//! What do more disks, more queues and larger images cost?
//!
//! ```text
//!   spread_out.rs   requests for each second of processor time: 1 to 64 disks, 1 to 8 queues on one
//!   memory.rs       what an idle disk takes, and an image of 64 TiB
//!   fairness.rs     16 moves at once
//! ```

mod fairness;
mod memory;
mod spread_out;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Map, Value};

use crate::choice::{Common, Effort};
use crate::finding::Finding;
use crate::machine;
use crate::size::{MIB, parse_size};

/// How far to go.
#[derive(Debug, Clone, Args)]
// The group of the question that has these has the same name.
#[group(skip)]
pub struct Scale {
    /// Most disks at once; 1, 2, 4 and so on up to it are measured
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub disks: u32,
    /// Most queues of one disk; 1, 2, 4 and so on up to it are measured
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub queues: u32,
    /// Moves at once
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=64))]
    pub moves: u32,
    /// Size of each disk that is moved, all of which is filled
    #[arg(long, default_value = "64M", value_parser = parse_size)]
    pub move_size: u64,
    /// Idle disks, besides one, to measure what each takes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub idle_disks: u32,
    /// Pages all over an image of 64 TiB that are written and read
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub places: u32,
}

/// What all parts need.
struct Ask<'a> {
    common: &'a Common,
    scale: &'a Scale,
    effort: Effort,
    finding: &'a mut Finding,
    figures: &'a mut Map<String, Value>,
}

/// Measures blockd alone as it gets more to do.
///
/// # Errors
/// When it can't be measured, or any data is wrong.
pub fn run(common: &Common, scale: &Scale, effort: Effort) -> Result<Finding> {
    ensure!(scale.move_size.is_multiple_of(MIB), "--move-size: give a whole number of MiB");
    let disks = u64::from(scale.disks) * spread_out::SIZE;
    let moves = u64::from(scale.moves) * scale.move_size * 2;
    machine::need_room(&common.memory_dir(), disks.max(moves) + 1024 * MIB)?;
    let mut finding = Finding::new("scale", "More disks, more queues, larger images");
    let mut figures = Map::new();
    finding.notes.push(format!(
        "This machine has {} cores, which the daemon's threads share with the one thread of the front end: from there on \
         more disks or queues can't make more requests in all, but what each costs must not grow.",
        std::thread::available_parallelism().map_or(1, usize::from)
    ));
    let mut ask = Ask { common, scale, effort, finding: &mut finding, figures: &mut figures };
    spread_out::disks(&mut ask)?;
    spread_out::queues(&mut ask)?;
    memory::run(&mut ask)?;
    fairness::run(&mut ask)?;
    finding.figures = Value::Object(figures);
    Ok(finding)
}

/// 1, 2, 4 and so on up to `most`, which is the last.
fn doubling(most: u32) -> Vec<u32> {
    let mut counts: Vec<u32> =
        std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < most).collect();
    counts.push(most);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_double_up_to_the_most() {
        assert_eq!(doubling(64), [1, 2, 4, 8, 16, 32, 64]);
        assert_eq!(doubling(6), [1, 2, 4, 6]);
        assert_eq!(doubling(1), [1]);
    }
}

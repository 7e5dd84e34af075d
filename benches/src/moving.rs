//! How fast is a full disk moved under a busy guest, and what does the guest notice?

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::choice::{Common, Kind, check_size, compare};
use crate::load::Pace;
use crate::machine;
use crate::report::Comparison;
use crate::server::Plan;
use crate::size::{MIB, parse_size, show_size};
use crate::trial::{Guest, Trial};

/// The load of a move.
#[derive(Debug, Clone, Args)]
pub struct Load {
    /// Size of the disk, all of which is filled
    #[arg(long, default_value = "4G", value_parser = parse_size)]
    pub size: u64,
    /// Requests a second of the guest: random pages, read and written in equal parts
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate: u32,
    /// Most requests in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub depth: u32,
    /// Seconds of load before the move
    #[arg(long, default_value_t = 10)]
    pub before: u32,
    /// Seconds of load after the move
    #[arg(long, default_value_t = 5)]
    pub after: u32,
    /// What blockd reads back before it deletes the source
    #[arg(long, default_value = "full", value_parser = ["none", "sample", "full"])]
    pub verify: String,
    /// What blockd is to keep the guest's 99th percentile within, in milliseconds
    #[arg(long, value_name = "MS", value_parser = parse_us)]
    pub max_guest_p99: Option<u64>,
}

fn parse_us(text: &str) -> Result<u64, String> {
    let ms = text.parse::<f64>().ok().filter(|ms| (0.001..=60_000.0).contains(ms));
    ms.map(|ms| (ms * 1e3) as u64)
        .ok_or_else(|| format!("`{text}` is no time: give milliseconds, 0.001 to 60000"))
}

/// Moves a full disk under load.
///
/// # Errors
/// When blockd can't be measured.
pub fn run(common: &Common, load: &Load, from: Kind, to: Kind) -> Result<Comparison> {
    check_size(load.size)?;
    let dir = common.dir();
    // Source, target, and the raw copy by which the target's file is checked.
    machine::need_room(&dir, load.size / 100 * 310 + 256 * MIB)?;
    let plan = Plan {
        from: from.image(),
        to: to.image(),
        size: load.size,
        verify: load.verify.clone(),
        max_guest_p99_us: load.max_guest_p99,
        patience: common.patience(),
        own_thread: true,
    };
    let guest = Guest {
        pace: Pace { rate: f64::from(load.rate), depth: load.depth as usize },
        before: Duration::from_secs(load.before.into()),
        after: Duration::from_secs(load.after.into()),
    };
    let trial = Trial {
        dir,
        plan,
        held: std::iter::once(0..load.size).collect(),
        guest: Some(guest),
        seed: common.seed,
        read_back: true,
    };
    let question = format!(
        "A full {} of {} becomes a {} while its guest makes {} requests a second",
        from.name().to_uppercase(),
        show_size(load.size),
        to.name().to_uppercase(),
        load.rate
    );
    compare(question, &trial, common.no_rival().map_or(Ok(&trial), Err))
}

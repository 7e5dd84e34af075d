//! What does it take to move a running machine between two processes of `kvm-shim` on this host?
//!
//! ```text
//!   rate.rs          GiB/s over a Unix socket, TCP and TLS, beside iperf3 (iperf, certificates)
//!   downtime.rs      how long machines stand still: sizes, rates of writing, with and without a disk
//!   logging.rs       what logging the pages that it writes costs the guest
//!   compression.rs   bytes on the wire, and the time it takes
//!   postcopy.rs      how long the guest waits for pages that are not there yet
//!      └── traveller.rs   a machine that moves from process to process, with the guest that verifies everything
//! ```

mod certificates;
mod compression;
mod downtime;
mod iperf;
mod logging;
mod postcopy;
mod rate;
mod traveller;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::choice::{Common, parse_rounds};
use crate::finding::Finding;
use crate::machine;
use crate::size::{GIB, MIB, parse_size, show_size};

/// A part of the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// How fast memory is copied
    Rate,
    /// How long machines stand still
    Downtime,
    /// What logging written pages costs the guest
    Logging,
    /// What compression saves
    Compression,
    /// How long the guest waits for pages in post-copy
    Postcopy,
}

/// The migrations.
#[derive(Debug, Clone, Args)]
// The group of the question that has these has the same name.
#[group(skip)]
pub struct Migrate {
    /// Only this part; repeatable
    #[arg(long = "part", value_enum)]
    pub parts: Vec<Part>,
    /// Moves of the large machine for each figure of downtime; the small one moves half as often again [default: 20; quick: 4]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub moves: Option<u32>,
    /// Rounds; each has a turn of everything that is compared [default: 3; quick: 1]
    #[arg(long, value_parser = parse_rounds)]
    pub rounds: Option<usize>,
    /// Memory of the small machine
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub small: u64,
    /// Memory of the large machine
    #[arg(long, default_value = "2G", value_parser = parse_size)]
    pub large: u64,
    /// Seconds after which the large machine is not moved any more while it writes at one rate, and the table says so; half of it
    /// for the small one [default: 45; quick: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub case_seconds: Option<u32>,
    /// Less of everything, in a minute or so
    #[arg(long)]
    pub quick: bool,
}

impl Migrate {
    /// What `results` asks for.
    pub fn usual() -> Self {
        Self {
            parts: Vec::new(),
            moves: None,
            rounds: None,
            small: 256 * MIB,
            large: 2 * GIB,
            case_seconds: None,
            quick: false,
        }
    }

    fn moves(&self) -> u32 {
        self.moves.unwrap_or(if self.quick { 4 } else { 20 })
    }

    fn postcopy_moves(&self) -> u32 {
        self.moves().div_ceil(2)
    }

    fn case_seconds(&self) -> f64 {
        f64::from(self.case_seconds.unwrap_or(if self.quick { 3 } else { 45 }))
    }

    /// Memory of the machine that is sent compressed.
    fn compressed(&self) -> u64 {
        // In whole pieces of 2 MiB, which machines are made of.
        (self.large / 4 / (2 * MIB)).max(8) * 2 * MIB
    }

    fn phase(&self) -> Duration {
        Duration::from_millis(if self.quick { 500 } else { 1000 })
    }

    fn iperf_seconds(&self) -> u32 {
        if self.quick { 1 } else { 2 }
    }
}

/// What all parts need.
struct Ask<'a> {
    common: &'a Common,
    what: &'a Migrate,
    finding: &'a mut Finding,
    figures: &'a mut Map<String, Value>,
}

impl Ask<'_> {
    fn rounds(&self) -> usize {
        self.what.rounds.unwrap_or(if self.what.quick { 1 } else { 3 })
    }

    fn folder(&self) -> Result<TempDir> {
        Common::folder_in(&self.common.memory_dir())
    }
}

/// Moves machines.
///
/// # Errors
/// If there is no KVM, a machine is lost, or its data is wrong.
pub fn run(common: &Common, what: &Migrate) -> Result<Finding> {
    look_around(what)?;
    let mut finding = Finding::new("migrate", "Running machines moved from process to process on one host");
    finding.notes.push(format!(
        "This machine has {} cores, on which source, target, guest and, where there is a disk, blockd run together.",
        std::thread::available_parallelism().map_or(1, usize::from)
    ));
    let mut figures = Map::new();
    let mut ask = Ask { common, what, finding: &mut finding, figures: &mut figures };
    for part in Part::value_variants() {
        if !what.parts.is_empty() && !what.parts.contains(part) {
            continue;
        }
        match part {
            Part::Rate => rate::run(&mut ask)?,
            Part::Downtime => downtime::run(&mut ask)?,
            Part::Logging => logging::run(&mut ask)?,
            Part::Compression => compression::run(&mut ask)?,
            Part::Postcopy => postcopy::run(&mut ask)?,
        }
    }
    finding.figures = Value::Object(figures);
    Ok(finding)
}

/// Fails where machines can't be run at all.
fn look_around(what: &Migrate) -> Result<()> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").context(
        "no machine can be run here, as /dev/kvm can't be opened: load kvm_intel, kvm_amd or kvm_pvm, be allowed to open it, or ask \
         this on another host",
    )?;
    system_tests::daemon::binary("kvm-shim", "KVM_SHIM")?;
    for (name, size) in [("--small", what.small), ("--large", what.large)] {
        ensure!(
            size.is_multiple_of(2 * MIB) && size >= 16 * MIB,
            "{name}: a machine's memory is a multiple of 2M, and at least 16M"
        );
    }
    // Source and target have the memory at the same time.
    let needed = what.large.max(what.small) * 2 + GIB / 2;
    let free = machine::available_memory()?;
    ensure!(
        free >= needed,
        "{} of memory are available, and this needs {}: give a smaller --large",
        show_size(free),
        show_size(needed)
    );
    Ok(())
}
